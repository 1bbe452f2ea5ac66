"""Publish and subscribe beside requests; work queues. A plane is imported by its module's path, where it is chosen."""

from triton_distributed.events.base import EventPlane
from triton_distributed.events.event import Event
from triton_distributed.events.pulling import PulledMessages, QueuedMessage
from triton_distributed.events.queue import WorkQueue
from triton_distributed.events.subscription import Subscription

__all__ = ["Event", "EventPlane", "PulledMessages", "QueuedMessage", "Subscription", "WorkQueue"]

"""Events (publish and subscribe) and work queues. An event plane is imported by its module's path when it is chosen."""

from triton_distributed.events.base import EventPlane
from triton_distributed.events.event import Event
from triton_distributed.events.pulling import PulledMessages, QueuedMessage
from triton_distributed.events.queue import WorkQueue
from triton_distributed.events.subscription import Subscription

__all__ = ["Event", "EventPlane", "PulledMessages", "QueuedMessage", "Subscription", "WorkQueue"]

"""Discovery: instances are registered and watched. A backend is imported by its module's path when it is chosen."""

from triton_distributed.discovery.base import (
    Added,
    Answering,
    Change,
    Discovery,
    Marking,
    Removed,
    Sink,
    Snapshot,
    Watch,
)

__all__ = ["Added", "Answering", "Change", "Discovery", "Marking", "Removed", "Sink", "Snapshot", "Watch"]

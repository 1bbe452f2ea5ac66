"""One endpoint, shared by the watches of this process: followed in etcd's thread, published on the program's loop."""

from __future__ import annotations

import asyncio
import threading

from triton_distributed.discovery.base import Added, Removed
from triton_distributed.discovery.etcd.watch import Changes, EndpointWatch
from triton_distributed.discovery.watchers import Watchers
from triton_distributed.names import Instance
from triton_distributed.system.loop_thread import tell

MANY = 64
"""Number of simultaneous changes from which watches get a snapshot, because a table is rebuilt for each change."""


class SharedView:
    """Passes the changes that an `EndpointWatch` sees to the program's loop, in order.

    While the program's loop is busy, changes wait here and are passed on together. Their number is bounded by the
    changes of that time; a closed loop takes no further changes.

    Args:
        loop: the program's loop.

    Attributes:
        watchers: the watches, on the program's loop.
        instances: the published instances, by key.
        opening: done when the first list is in `instances`.
        users: the number of watches that are open or being opened.
    """

    opening: asyncio.Future[None]

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.watchers = Watchers()
        self.instances: dict[bytes, Instance] = {}
        self.users = 0
        self._loop = loop
        self._lock = threading.Lock()  # Protects `_waiting`.
        self._waiting: Changes = []
        # The following attributes belong to etcd's thread.
        self._source: EndpointWatch | None = None
        self._following: asyncio.Task[None] | None = None
        self._closed = False

    async def open(self, source: EndpointWatch) -> None:
        """List the endpoint, and follow it from then on. Runs in etcd's thread."""
        self._source = source
        await source.take_stock()
        if not self._closed:
            self._following = asyncio.create_task(source.run())

    def close(self) -> None:
        """Stop following. Runs in etcd's thread."""
        self._closed = True
        if self._following is not None:
            self._following.cancel()
        if self._source is not None:
            self._source.close()

    def publish(self, changes: Changes) -> None:
        """Pass changes to the program's loop. Runs in etcd's thread."""
        with self._lock:
            first = not self._waiting
            self._waiting += changes
        if first and not tell(self._loop, self._tell):
            self._waiting = []

    def _tell(self) -> None:
        with self._lock:
            changes, self._waiting = self._waiting, []
        for key, instance in changes:
            before = self.instances.pop(key, None)
            if instance is not None:
                self.instances[key] = instance
            if len(changes) >= MANY:
                continue
            if instance is not None:
                self.watchers.publish(Added(instance))
            elif before is not None:
                self.watchers.publish(Removed(before.endpoint, before.id))
        if len(changes) >= MANY:
            self.watchers.replace(self.instances.values())

"""One endpoint as the watches of this process share it: followed in etcd's thread, told on the program's loop."""

from __future__ import annotations

import asyncio
import threading

from triton_distributed.discovery.base import Added, Removed
from triton_distributed.discovery.etcd.watch import Changes, EndpointWatch
from triton_distributed.discovery.watchers import Watchers
from triton_distributed.names import Instance
from triton_distributed.system.loop_thread import tell

MANY = 64
"""Changes at once from which on watches get a snapshot: a table rebuilds itself for each change."""


class SharedView:
    """Carries what an `EndpointWatch` sees over to the program's loop, in order.

    While that loop is busy the changes wait here and come together; there are at most as many as instances and changes
    of a moment, since a loop that is closed takes nothing more.

    Args:
        loop: the program's.

    Attributes:
        watchers: the watches, on the program's loop.
        instances: by key, as they were told last.
        opening: done when the first list is in `instances`.
        users: watches that are open or being opened.
    """

    opening: asyncio.Future[None]

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.watchers = Watchers()
        self.instances: dict[bytes, Instance] = {}
        self.users = 0
        self._loop = loop
        self._lock = threading.Lock()  # around what follows
        self._waiting: Changes = []
        # what follows belongs to etcd's thread
        self._source: EndpointWatch | None = None
        self._following: asyncio.Task[None] | None = None
        self._closed = False

    async def open(self, source: EndpointWatch) -> None:
        """In etcd's thread: list the endpoint, and follow it from then on."""
        self._source = source
        await source.take_stock()
        if not self._closed:
            self._following = asyncio.create_task(source.run())

    def close(self) -> None:
        """In etcd's thread: stop following."""
        self._closed = True
        if self._following is not None:
            self._following.cancel()
        if self._source is not None:
            self._source.close()

    def publish(self, changes: Changes) -> None:
        """In etcd's thread: have the changes told."""
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

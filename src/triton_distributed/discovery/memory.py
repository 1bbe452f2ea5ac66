"""Discovery within one process, for tests and for programs whose workers and clients share an event loop."""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary, WeakValueDictionary

from triton_distributed.discovery.base import Added, Removed, Sink, Watch, same
from triton_distributed.discovery.record import BadRecord, decode, encode
from triton_distributed.discovery.watchers import Watcher, Watchers
from triton_distributed.errors import DiscoveryError
from triton_distributed.names import EndpointName, Instance


class MemoryHub:
    """The state that several `MemoryDiscovery` share on one event loop. Changes call the watches directly."""

    def __init__(self) -> None:
        # One entry for each registered instance. Closing the owner removes the entry.
        self.entries: dict[tuple[EndpointName, int], tuple[MemoryDiscovery, Instance]] = {}
        self.watchers = Watchers()


# Two runtimes on one loop find each other by the hub's name alone. Both levels are weak: a hub lives only while a
# discovery uses it, so no state is left over for the next test or another loop.
_hubs: WeakKeyDictionary[asyncio.AbstractEventLoop, WeakValueDictionary[str, MemoryHub]] = WeakKeyDictionary()


class MemoryDiscovery:
    """Registers instances in a hub within this process.

    Args:
        name: discoveries with the same name on the same running loop share a hub.
        hub: this hub instead of the loop's.
    """

    def __init__(self, name: str = "default", *, hub: MemoryHub | None = None) -> None:
        self.where = f"memory://{name}"
        self._name = name
        self._hub = hub
        self._watches: dict[Watcher, None] = {}
        self._closed = False

    def __repr__(self) -> str:
        return f"<MemoryDiscovery {self.where}{' closed' if self._closed else ''}>"

    async def register(self, instance: Instance) -> None:
        hub = self._open()
        try:
            # The instance passes through JSON, as in the other backends: this refuses the same values as they do, and
            # copies the metadata, which the caller may change later.
            instance = decode(encode(instance))
        except BadRecord as error:
            raise DiscoveryError("memory", self.where, str(error)) from error
        key = (instance.endpoint, instance.id)
        known = hub.entries.get(key)
        hub.entries[key] = (self, instance)
        if known is None or not same(known[1], instance):
            hub.watchers.publish(Added(instance))

    async def withdraw(self, instance: Instance) -> None:
        if self._hub is None:
            return
        key = (instance.endpoint, instance.id)
        known = self._hub.entries.get(key)
        if known is not None and known[0] is self:
            del self._hub.entries[key]
            self._hub.watchers.publish(Removed(*key))

    def mark(self, instance: Instance, busy: bool) -> None:
        """Do nothing: all clients run on the same loop."""

    async def watch(self, endpoint: EndpointName | None, sink: Sink) -> Watch:
        hub = self._open()
        present = [instance for _, instance in hub.entries.values()]
        watcher = hub.watchers.add(endpoint, sink, present, self._forget)
        if not watcher.closed:
            self._watches[watcher] = None
        return watcher

    async def close(self) -> None:
        self._closed = True
        for watcher in tuple(self._watches):
            watcher.close()
        if self._hub is not None:
            for owner, instance in tuple(self._hub.entries.values()):
                if owner is self:
                    await self.withdraw(instance)
        self._hub = None

    def _forget(self, watcher: Watcher) -> None:
        self._watches.pop(watcher, None)

    def _open(self) -> MemoryHub:
        if self._closed:
            raise DiscoveryError("memory", self.where, "it was closed")
        if self._hub is None:
            named = _hubs.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
            self._hub = named.get(self._name)
            if self._hub is None:
                self._hub = named[self._name] = MemoryHub()
        return self._hub

"""The simulated network and registry: all hosts, listeners and registrations."""

from __future__ import annotations

import asyncio
import errno
import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from harness.simulated.hosts import Host, HostsLoop
from harness.simulated.links import Link
from triton_distributed.discovery import Added, Change, Removed, Snapshot, Watch
from triton_distributed.discovery.base import Sink
from triton_distributed.discovery.memory import MemoryDiscovery, MemoryHub
from triton_distributed.errors import DiscoveryError
from triton_distributed.names import EndpointName, Instance
from triton_distributed.system.protocol import StreamProtocol
from triton_distributed.transport.address import Address

Factory = Callable[[], StreamProtocol]
BACKLOG_S = 0.01  # Seconds after which a process without descriptors tries to accept again.


class Switch:
    """Joins the hosts of one simulation.

    Args:
        loop: the loop.
        rng: the source of all randomness.
        tcp: whether a reset loses data under way, see `links`.
    """

    def __init__(self, loop: HostsLoop, rng: random.Random, tcp: bool) -> None:
        self.loop = loop
        self.rng = rng
        self.links: dict[Link, None] = {}
        self._tcp = tcp
        self._listening: dict[str, tuple[Host, Factory]] = {}
        self._numbers = 0

    def listen(self, host: Host, name: str, factory: Factory) -> Callable[[], None]:
        """Listen on `name`. The returned function stops listening."""
        if name in self._listening:
            raise OSError(errno.EADDRINUSE, f"{name} is listened on already")
        self._listening[name] = (host, factory)
        return lambda: self._listening.pop(name, None) and None

    def names_of(self, host: Host) -> list[str]:
        """The names on which a host listens."""
        return [name for name, (listener, _) in self._listening.items() if listener is host]

    def dial(self, host: Host, name: str, protocol: StreamProtocol) -> Link:
        """Join `protocol` to the listener of `name`.

        Raises:
            OSError: there is no listener, or `host` has no descriptors.
        """
        if host.no_fds:
            raise OSError(errno.EMFILE, "Too many open files")
        listening = self._listening.get(name)
        if listening is None or listening[0].dead or host.dead:
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"no host listens on {name}")
        acceptor, _ = listening
        self._numbers += 1
        link = Link(self._numbers, self.loop, self.rng, host, protocol, acceptor, tcp=self._tcp, forget=self._forget)
        self.links[link] = None
        self.loop.trace.note(self.loop.time(), f"link {self._numbers}: {host.name} dials {acceptor.name}")
        self._accept_later(link, name, self.rng.random() * 0.001)
        return link

    def _accept_later(self, link: Link, name: str, wait_s: float) -> None:
        context = link.accepted.host.context
        self.loop.call_at(self.loop.time() + wait_s, self._accept, link, name, context=context)

    def _accept(self, link: Link, name: str) -> None:
        """Accept a link. Runs in the listener's context."""
        host, factory = self._listening.get(name, (None, None))
        if link.accepted.lost:
            return
        if host is None or factory is None or host.dead:
            link.refuse()
        elif host.no_fds:
            self._accept_later(link, name, BACKLOG_S)
        else:
            link.accepted.start(factory())

    def _forget(self, link: Link) -> None:
        self.links.pop(link, None)

    def links_of(self, host: Host) -> list[Link]:
        """The connections of a host, dialled and accepted."""
        return [each for each in self.links if host in (each.dialled.host, each.accepted.host)]

    def kill(self, host: Host) -> None:
        """End all connections of a host, because its process is gone."""
        host.dead = True
        for name in self.names_of(host):
            del self._listening[name]
        for link in self.links_of(host):
            for end in link.ends:
                if end.host is host:
                    end.kill()


class HostNetwork:
    """The network as one host sees it. The host's runtime uses it for the scheme `memory`."""

    def __init__(self, switch: Switch, host: Host) -> None:
        self._switch, self._host = switch, host

    async def connect(self, address: Address, protocol: StreamProtocol) -> None:
        await asyncio.sleep(self._switch.rng.random() * 0.001)
        self._switch.dial(self._host, address.host, protocol)

    async def listen(self, address: Address, factory: Factory) -> Callable[[], None]:
        return self._switch.listen(self._host, address.host, factory)

    async def close(self) -> None:
        """Do nothing: sessions close their own connections."""


class Registry:
    """The registry of all hosts.

    Attributes:
        full: the registry is full: it stores nothing and reports no changes.
    """

    def __init__(self, loop: HostsLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.hub = MemoryHub()
        self.full = 0
        self._late: list[Callable[[], None]] = []

    def fill(self) -> None:
        """Store nothing more until as many calls of `clean`."""
        self.full += 1

    def clean(self) -> None:
        """Undo one `fill`. When there is room again, report the changes that were held back."""
        self.full -= 1
        if not self.full:
            late, self._late = self._late, []
            for each in late:
                each()

    def when_clean(self, what: Callable[[], None]) -> None:
        """Call `what` now, or when there is room again."""
        if self.full:
            self._late.append(what)
        else:
            what()

    def mark(self, instance_id: int, busy: bool) -> None:
        """Mark an instance as busy or not, as its watchdog does from a thread."""
        for key, (owner, instance) in list(self.hub.entries.items()):
            if instance.id == instance_id and instance.busy != busy:
                marked = replace(instance, busy=busy)
                self.hub.entries[key] = (owner, marked)
                self.hub.watchers.publish(Added(marked))


class HostDiscovery:
    """The registry as one host sees it. Its operations take a while and may fail."""

    def __init__(self, registry: Registry, host: Host) -> None:
        self.where = "simulated://registry"
        self._registry, self._host = registry, host
        self._inner = MemoryDiscovery("simulated", hub=registry.hub)

    async def register(self, instance: Instance) -> None:
        await self._while()
        if self._registry.full:
            raise DiscoveryError("simulated", self.where, "No space left on device")
        await self._inner.register(instance)

    async def withdraw(self, instance: Instance) -> None:
        await self._while()
        await self._inner.withdraw(instance)

    async def watch(self, endpoint: EndpointName | None, sink: Sink) -> Watch:
        await self._while()
        following = _Following(self._registry, self._host, sink)
        following.inner = await self._inner.watch(endpoint, following.take)
        return following

    async def close(self) -> None:
        await self._inner.close()

    def vanish(self) -> None:
        """Remove the registrations of a process that is gone."""
        for key, (owner, _) in list(self._registry.hub.entries.items()):
            if owner is self._inner:
                del self._registry.hub.entries[key]
                self._registry.hub.watchers.publish(Removed(*key))

    async def _while(self) -> None:
        await asyncio.sleep(self._registry.rng.random() * 0.005)


class _Following:
    """A watch that delivers its changes later, in their order, in the context of the watching process."""

    inner: Watch

    def __init__(self, registry: Registry, host: Host, sink: Sink) -> None:
        self._registry, self._host, self._sink = registry, host, sink
        self._changes: deque[Change] = deque()
        self._first = True
        self._due = self._closed = False

    def take(self, change: Change) -> None:
        if self._first and isinstance(change, Snapshot):
            self._first = False
            self._sink(change)
            return
        self._changes.append(change)
        self._later()

    def _later(self) -> None:
        if not self._due:
            self._due = True
            self._registry.when_clean(self._set)

    def _set(self) -> None:
        loop = self._registry.loop
        loop.call_at(loop.time() + self._registry.rng.random() * 0.01, self._tell, context=self._host.context)

    def _tell(self) -> None:
        self._due = False
        if self._closed:
            return
        self._sink(self._changes.popleft())
        if self._changes:
            self._later()

    def close(self) -> None:
        self._closed = True
        self.inner.close()

"""Applies the faults of a schedule to real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from triton_distributed.testing.chaos.disk import SmallDisk
from triton_distributed.testing.chaos.place import Place
from triton_distributed.testing.chaos.processes import WorkerEnded
from triton_distributed.testing.chaos.schedule import Fault, FaultKind
from triton_distributed.testing.proxy import FaultProxy
from triton_distributed.transport.address import Address
from triton_distributed.wire.hello import Hello, hello_frame

STRANGERS = 60  # Connections of one DUPLICATE: more than a session pool would ever make, fewer than a backlog.
STRANGER_S = 1.0  # Seconds for which idle connections of a DUPLICATE stay open.
# Seconds in which a connection must carry the bytes that TRUNCATE and CORRUPT wait for; a slower one is spared.
REACHED_S = 2.0
# Seconds in which a peer should give up a corrupted connection. A flipped bit in the length of a TLS record is found
# only after that many more bytes; on a silent connection, the PINGs after TRD_HEALTH_TIMEOUT_S bring them.
FOUND_S = 15.0

PROXIED = frozenset({FaultKind.CUT, FaultKind.DELAY, FaultKind.TRUNCATE, FaultKind.CORRUPT})
# Faults that need TCP. They lose bytes and so must end with a reset: an orderly end would tell the peer that it has all
# bytes, and no network does that. Unix sockets have no reset and no network.
ON_TCP = frozenset({FaultKind.TRUNCATE, FaultKind.CORRUPT})
LINUX_ONLY = frozenset({FaultKind.DISK_FULL, FaultKind.NO_FDS})


class Injector:
    """Applies faults to the workers of a cluster.

    Args:
        places: the workers.
        disk: the disk of discovery's folder; None if it cannot be filled.
        spare: workers that must be well besides the affected one; a fault that finds fewer is skipped.

    Attributes:
        done: the number of faults that were done, by kind.
        left_out: the number of faults that were skipped.
    """

    def __init__(self, places: Sequence[Place], disk: SmallDisk | None, spare: int) -> None:
        self._places, self._disk, self._spare = places, disk, spare
        self._loop = asyncio.get_running_loop()
        self.done: Counter[FaultKind] = Counter()
        self.left_out = 0
        self._strangers: set[asyncio.Task[None]] = set()  # The schedule bounds their number.
        self._do: dict[FaultKind, Callable[[Place, Fault], Coroutine[Any, Any, None]]] = {
            FaultKind.KILL: lambda place, _: place.kill(),
            FaultKind.DRAIN: lambda place, _: place.drain(),
            FaultKind.STOP: self._stop,
            FaultKind.BLOCK: self._block,
            FaultKind.CUT: self._cut,
            FaultKind.DELAY: self._delay,
            FaultKind.TRUNCATE: self._truncate,
            FaultKind.CORRUPT: self._corrupt,
            FaultKind.DUPLICATE: self._duplicate,
            FaultKind.DISK_FULL: self._fill,
            FaultKind.NO_FDS: self._no_fds,
        }

    async def run(self, faults: Iterable[Fault]) -> None:
        """Do each fault at its time. Return when all are over and every worker is back."""
        began = self._loop.time()
        async with asyncio.TaskGroup() as under_way:
            for fault in faults:
                await asyncio.sleep(max(0.0, began + fault.at_s - self._loop.time()))
                place = self._places[fault.worker]
                others = sum(each.well for each in self._places if each is not place)
                # A full disk needs all workers: one that started at that moment could not register.
                whole = fault.kind == FaultKind.DISK_FULL
                if not place.well or others < (len(self._places) - 1 if whole else self._spare):
                    self.left_out += 1
                    continue
                self.done[fault.kind] += 1
                under_way.create_task(self._hurt(place, fault))
        for task in self._strangers:
            task.cancel()
        await asyncio.gather(*self._strangers, return_exceptions=True)

    async def _hurt(self, place: Place, fault: Fault) -> None:
        with place, contextlib.suppress(WorkerEnded, ProcessLookupError):  # The place reports the end of its process.
            await self._do[fault.kind](place, fault)

    async def _stop(self, place: Place, fault: Fault) -> None:
        place.process.send(signal.SIGSTOP)
        await asyncio.sleep(fault.seconds)
        place.process.send(signal.SIGCONT)

    async def _block(self, place: Place, fault: Fault) -> None:
        await place.process.ask("block", seconds=fault.seconds)

    async def _cut(self, place: Place, fault: Fault) -> None:
        """Cut by a reset, or as if the worker's side had ended the connection in order, after all its bytes."""
        assert place.proxy is not None
        if place.proxy.address.startswith("unix") or int(fault.at_s * 1000) % 2:
            place.proxy.half_close()
        else:
            place.proxy.cut(reset=True)

    async def _truncate(self, place: Place, fault: Fault) -> None:
        assert place.proxy is not None
        place.proxy.truncate_after(fault.amount)
        await _safe(place.proxy, REACHED_S)
        place.proxy.spare()

    async def _corrupt(self, place: Place, fault: Fault) -> None:
        assert place.proxy is not None
        place.proxy.corrupt_after(fault.amount)
        await _safe(place.proxy, REACHED_S)
        place.proxy.spare()
        await _safe(place.proxy, FOUND_S)

    async def _delay(self, place: Place, fault: Fault) -> None:
        assert place.proxy is not None
        place.proxy.up.delay_s = place.proxy.down.delay_s = fault.seconds / 10
        await asyncio.sleep(fault.seconds)
        place.proxy.up.delay_s = place.proxy.down.delay_s = 0.0

    async def _fill(self, place: Place, fault: Fault) -> None:
        assert self._disk is not None
        for each in self._places:
            each.may_start.clear()
        self._disk.fill()
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            self._disk.free()
            for each in self._places:
                each.may_start.set()

    async def _no_fds(self, place: Place, fault: Fault) -> None:
        if sys.platform != "linux":
            return
        pid = place.process.pid
        taken = {int(each) for each in os.listdir(f"/proc/{pid}/fd")}
        free = next(number for number in range(len(taken) + 1) if number not in taken)
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, before[1]))
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, before)

    async def _duplicate(self, place: Place, fault: Fault) -> None:
        """Open many connections. Half of them stay for a while, silent or amid a hello; the others close at once."""
        found = await place.process.ask("look")
        addresses = [Address.parse(each) for each in found["addresses"]]
        if place.proxy is not None:
            addresses = [Address.parse(place.proxy.address)]
        hello = hello_frame(Hello(agent="a stranger", nonce=1))
        for number in range(STRANGERS):
            sock = await _dial(addresses[number % len(addresses)])
            if sock is None:
                continue
            with contextlib.suppress(OSError):
                sock.send(hello[: number % len(hello)])
            if number % 2:
                sock.close()
            else:
                task = self._loop.create_task(_leave(sock))
                self._strangers.add(task)
                task.add_done_callback(self._strangers.discard)


async def _safe(proxy: FaultProxy, patience_s: float) -> None:
    """Wait until no connection through the proxy is threatened, for at most `patience_s` seconds."""
    deadline = asyncio.get_running_loop().time() + patience_s
    while proxy.threatened:
        if asyncio.get_running_loop().time() > deadline:
            return
        await asyncio.sleep(0.01)


async def _dial(address: Address) -> socket.socket | None:
    family = socket.AF_UNIX if address.scheme == "unix" else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        async with asyncio.timeout(1.0):
            target = address.host if address.scheme == "unix" else (address.host, address.port)
            await asyncio.get_running_loop().sock_connect(sock, target)
    except OSError:
        sock.close()
        return None
    return sock


async def _leave(sock: socket.socket) -> None:
    with sock:
        await asyncio.sleep(STRANGER_S)

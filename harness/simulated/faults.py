"""Carries out the faults of a schedule on the members of a simulation."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.simulated.members import Caller, Worker
from harness.simulated.network import Registry, Switch
from triton_distributed.errors import TritonError
from triton_distributed.testing.chaos.schedule import Fault, FaultKind, Recovery

NOTICED_S = 0.2  # Seconds after which a watchdog notices a stuck loop, see TRD_WATCHDOG_S.
AGAIN_S = 0.1  # Seconds after which a supervisor restarts a worker that could not register.


@dataclass(frozen=True, slots=True)
class ClientStops:
    """When and for how long clients are stopped.

    Attributes:
        duration_s: virtual seconds in which stops begin.
        longest_s: virtual seconds of the longest stop.
    """

    duration_s: float
    longest_s: float


class Inflictor:
    """Carries out the faults of a schedule.

    Args:
        switch: the network between all hosts.
        registry: the registry of all hosts.
        workers: the workers that suffer faults; a successor takes the place of its predecessor in this list.
        make_worker: starts the process of a worker, given its number and generation.
        hurt: gets a worker's number and the beginning and end of the time in which it was not well, seconds.
        callers: the clients.
        faults: the faults.
        rng: the source of the choices that the schedule leaves open.
        recovery: how long a worker counts as not well after the end of a fault.

    Attributes:
        hurt_now: the numbers of the workers that are not well.
        done: the number of faults of each kind; `left_out` counts skipped ones, as their worker was not well yet.
    """

    def __init__(
        self,
        switch: Switch,
        registry: Registry,
        workers: list[Worker],
        make_worker: Callable[[int, int], Worker],
        hurt: Callable[[int, float, float], None],
        callers: Sequence[Caller],
        faults: Sequence[Fault],
        rng: random.Random,
        recovery: Recovery,
    ) -> None:
        self._switch, self._registry, self._workers = switch, registry, workers
        self._make_worker, self._hurt, self._loop = make_worker, hurt, switch.loop
        self._callers = callers
        self._faults = faults
        self._rng = rng
        self._recovery = recovery
        self._generations = [0] * len(workers)
        self._leaving: list[asyncio.Task[None]] = []
        self.hurt_now: set[int] = set()
        self.done: Counter[FaultKind] = Counter()
        self.left_out = 0

    async def run(self, client_stops: ClientStops | None) -> None:
        """Carry out all faults; return when every worker is well again.

        Args:
            client_stops: how clients are stopped meanwhile; None if they are not stopped.
        """
        loop = self._loop
        started = loop.time()
        async with asyncio.TaskGroup() as under_way:
            if client_stops is not None:
                for caller in self._callers:
                    under_way.create_task(self._stop_client(caller, client_stops))
            for fault in self._faults:
                await asyncio.sleep(started + fault.at_s - loop.time())
                # The fault may have taken longer than the schedule allows, for example a start while the disk was full.
                if fault.worker in self.hurt_now:
                    self.left_out += 1
                else:
                    self.done[fault.kind] += 1
                    loop.trace.note(loop.time(), f"FAULT {fault}")
                    under_way.create_task(self._inflict(fault))
        await asyncio.gather(*self._leaving)

    async def _inflict(self, fault: Fault) -> None:
        number, loop = fault.worker, self._loop
        began = loop.time()
        self.hurt_now.add(number)
        await _KINDS[fault.kind](self, self._workers[number], fault)
        await asyncio.sleep(self._recovery.other_s)
        if fault.kind in (FaultKind.TRUNCATE, FaultKind.CORRUPT):
            for end in self._ends(self._workers[number]):
                end.mend()
        self.hurt_now.discard(number)
        self._hurt(number, began, loop.time())

    async def _stop_client(self, caller: Caller, stops: ClientStops) -> None:
        """Stop a client now and then while faults begin."""
        rng, loop = self._rng, self._loop
        until = loop.time() + stops.duration_s
        while True:
            await asyncio.sleep(rng.expovariate(1 / stops.duration_s))
            if loop.time() > until:
                return
            loop.trace.note(loop.time(), f"{caller.host.name} is stopped")
            caller.host.stop()
            await asyncio.sleep(rng.random() * stops.longest_s)
            caller.host.go_on()

    def _ends(self, worker: Worker) -> list[Any]:
        return [end for link in self._switch.links_of(worker.host) for end in link.ends]

    async def _successor(self, number: int) -> None:
        """Start another process in the place of this one, and repeat that until it has registered."""
        await asyncio.sleep(self._rng.random() * 0.4)
        while True:
            self._generations[number] += 1
            worker = self._make_worker(number, self._generations[number])
            if await worker.registered():
                self._workers[number] = worker
                return
            await worker.leave()
            await asyncio.sleep(AGAIN_S)

    # The kinds of faults.

    async def _kill(self, worker: Worker, fault: Fault) -> None:
        worker.kill()
        self._leaving.append(asyncio.create_task(worker.bury()))
        await self._successor(fault.worker)

    async def _drain(self, worker: Worker, fault: Fault) -> None:
        worker.host.context.run(worker.runtime.shutdown)
        self._leaving.append(asyncio.create_task(worker.leave()))
        await self._successor(fault.worker)

    async def _stop(self, worker: Worker, fault: Fault) -> None:
        worker.host.stop()
        await asyncio.sleep(fault.seconds)
        worker.host.go_on()

    async def _block(self, worker: Worker, fault: Fault) -> None:
        worker.host.stop()
        if fault.seconds > NOTICED_S:
            await asyncio.sleep(NOTICED_S)
            self._registry.mark(worker.runtime.instance_id, True)
        await asyncio.sleep(max(0.0, fault.seconds - NOTICED_S) or fault.seconds)
        worker.host.go_on()
        self._registry.mark(worker.runtime.instance_id, False)

    async def _cut(self, worker: Worker, _: Fault) -> None:
        for link in self._switch.links_of(worker.host):
            link.reset("cut")

    async def _delay(self, worker: Worker, fault: Fault) -> None:
        worker.host.slow_s += fault.seconds / 10
        await asyncio.sleep(fault.seconds)
        worker.host.slow_s -= fault.seconds / 10

    async def _duplicate(self, worker: Worker, _: Fault) -> None:
        switch, rng = self._switch, self._rng
        for name in switch.names_of(worker.host):
            for _number in range(10):
                stranger = _Stranger(rng)
                switch.dial(self._callers[0].host, name, stranger)
                if rng.random() < 0.5:
                    self._loop.call_later(rng.random() * 0.2, stranger.leave)

    async def _truncate(self, worker: Worker, fault: Fault) -> None:
        for end in self._ends(worker):
            end.truncate(fault.amount)

    async def _corrupt(self, worker: Worker, fault: Fault) -> None:
        for link in self._switch.links_of(worker.host):
            link.ends[int(self._rng.random() * 2)].garble(fault.amount)

    async def _disk_full(self, worker: Worker, fault: Fault) -> None:
        await worker.pause()
        self._registry.fill()
        late = asyncio.create_task(self._resume(worker))
        await asyncio.sleep(fault.seconds)
        self._registry.clean()
        await late

    async def _resume(self, worker: Worker) -> None:
        while True:
            try:
                await worker.resume()
            except TritonError:
                await asyncio.sleep(AGAIN_S)
            else:
                return

    async def _no_fds(self, worker: Worker, fault: Fault) -> None:
        worker.host.no_fds = True
        await self._cut(worker, fault)
        await asyncio.sleep(fault.seconds)
        worker.host.no_fds = False


class _Stranger(asyncio.Protocol):
    """Opens a connection and sends invalid bytes, or no bytes at all."""

    def __init__(self, rng: random.Random) -> None:
        self._words = rng.choice([b"", b"\x00", b"GET / HTTP/1.1\r\n\r\n", bytes(14), b"\xff" * 100])
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._words)

    def leave(self) -> None:
        """End it."""
        if self._transport is not None:
            self._transport.abort()


_KINDS: dict[FaultKind, Callable[[Inflictor, Worker, Fault], Any]] = {
    FaultKind.KILL: Inflictor._kill,
    FaultKind.STOP: Inflictor._stop,
    FaultKind.BLOCK: Inflictor._block,
    FaultKind.CUT: Inflictor._cut,
    FaultKind.DELAY: Inflictor._delay,
    FaultKind.DUPLICATE: Inflictor._duplicate,
    FaultKind.TRUNCATE: Inflictor._truncate,
    FaultKind.CORRUPT: Inflictor._corrupt,
    FaultKind.DISK_FULL: Inflictor._disk_full,
    FaultKind.NO_FDS: Inflictor._no_fds,
    FaultKind.DRAIN: Inflictor._drain,
}

"""A whole system in one thread under faults, in virtual time: thousands of schedules a minute, each repeatable.

Workers and clients are real runtimes on one loop. Between them are `links` that misbehave and a `network.Registry` that
fails; `hosts` stops and resumes single processes. The simulation of each `FaultKind`:

    kill        the process has no more effect on others; its kernel sends what it had; a successor starts
    stop        its callbacks and timers wait, and its connections with them
    block       the same; the simulation marks the worker busy, in place of the watchdog's thread
    cut         its connections end: on TCP with the loss of data under way, else as when a peer closes
    delay       its connections deliver later
    duplicate   connections that send a part of a hello, or noise, and end or stay
    truncate    its connections are reset after some number of bytes in either direction
    corrupt     after some number of bytes, all data from the next frame on arrives as noise, see `links`
    disk full   no process can register or learn of changes; the paused instance of the worker cannot come back
    no fds      its connections are cut and it accepts none
    drain       the runtime is shut down under load; a successor starts
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from harness.caller import make_calls
from harness.oracle import Oracle, Ticket
from harness.requests import ENDPOINT, TWO_WAY, Variety, Work, plans
from harness.simulated import checks
from harness.simulated.faults import ClientStops, Inflictor
from harness.simulated.hosts import Host, HostsLoop, Trace
from harness.simulated.members import Caller, Worker
from harness.simulated.network import Registry, Switch
from triton_distributed.config import Config
from triton_distributed.errors import TritonError
from triton_distributed.serving import endpoint
from triton_distributed.testing.chaos.report import Report
from triton_distributed.testing.chaos.schedule import FaultKind, Recovery, schedule

PATIENCE_S = 20.0  # The timeout of a call with a long one.
# Several faults of at most a second may delay a call, each detected by a timeout of half a second. They take less than
# this.
LONGEST_S = 15.0
ENDED_S = 60.0  # Virtual seconds after the last call began, in which all calls must end.
FOUND_S = 15.0  # Seconds to find every worker again: probes are at most 5 s apart, and dials fail in 0.5 s.
MANY = 1000  # Streams of a session. This is more than the number of calls.
RECOVERY = Recovery(restart_s=1.0, other_s=0.3)


EVERYTHING = Variety(largest=2**14, two_way=True, cancels=0.1, directly=0.1, priorities=True, waits=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one simulation.

    Attributes:
        workers: the number of workers; `clients` likewise.
        duration_s: virtual seconds in which calls and faults begin.
        calls_per_s: the calls of all clients together.
        faults_per_s: the average number of faults.
        longest_s: the longest duration of a fault, virtual seconds.
        spare: the number of workers that are well at any time.
        kinds: the kinds of faults.
        variety: the kinds of calls.
        max_inflight: the limit of each worker's endpoints.
        window_bytes: see TRD_WINDOW_BYTES; session_window_bytes, max_streams and drain_timeout_s likewise.
        token: see TRD_TOKEN.
        tcp: whether a reset loses data under way.
        policy: the policy of the clients.
        client_stops: clients, too, are sometimes stopped for a while.
        client_leaves: the first client shuts down at some time, even with calls under way.
    """

    workers: int = 3
    clients: int = 2
    duration_s: float = 3.0
    calls_per_s: float = 14.0
    faults_per_s: float = 2.0
    longest_s: float = 1.0
    spare: int = 1
    kinds: tuple[FaultKind, ...] = tuple(FaultKind)
    variety: Variety = EVERYTHING
    max_inflight: int | None = None
    window_bytes: int = 256 * 1024
    session_window_bytes: int = 64 * 1024 * 1024
    max_streams: int = 100_000
    drain_timeout_s: float = 3.0
    token: str = ""
    tcp: bool = False
    policy: str = "round_robin"
    client_stops: bool = False
    client_leaves: bool = False


def settings_of(seed: int) -> Settings:
    """Return settings that differ from seed to seed, so that a thousand seeds test a thousand systems."""
    rng = random.Random(f"settings {seed}")
    largest = 2 ** rng.choice([8, 10, 10, 12, 14]) if rng.random() < 0.97 else 2**19
    return Settings(
        workers=rng.choice([2, 3, 3, 3, 4]),
        faults_per_s=rng.choice([1.0, 2.0, 4.0]),
        longest_s=rng.choice([0.3, 1.0, 1.0, 2.0]),
        variety=replace(EVERYTHING, largest=largest),
        max_inflight=rng.choice([None, None, None, 1, 3]),
        window_bytes=rng.choice([4096, 16 * 1024, 256 * 1024]),
        session_window_bytes=rng.choice([64 * 1024, 64 * 1024 * 1024]),
        max_streams=rng.choice([2, 100_000, 100_000, 100_000]),
        drain_timeout_s=rng.choice([0.0, 0.05, 3.0, 3.0]),
        token=rng.choice(["", "", "a secret that all share"]),
        tcp=rng.random() < 0.5,
        policy=rng.choice(["round_robin", "random", "least_loaded", "p2c"]),
        client_stops=rng.random() < 0.3,
        client_leaves=rng.random() < 0.3,
    )


@dataclass(slots=True)
class Result(Report):
    """The result of one simulation. Its times are virtual.

    Attributes:
        digest: the hash of all events; the same seed gives the same hash.
    """

    digest: str = ""


def simulate(seed: int, settings: Settings | None = None, tell: Callable[[str], object] | None = None) -> Result:
    """Run one schedule to its end and judge it.

    Args:
        seed: the seed of all randomness.
        settings: the settings; by default the seed's.
        tell: called with each line of the trace.
    """
    result = Result()
    trace = Trace(tell)
    collecting, logged = gc.isenabled(), logging.root.manager.disable
    gc.disable()  # The time of its runs would depend on earlier code.
    times_from_s, endpoint.TIMES_FROM_S = endpoint.TIMES_FROM_S, 0.0  # They are of the real clock: each end has them.
    logging.disable(logging.ERROR)  # Reporting a handler's error takes longer than the call.
    simulation = Simulation(seed, settings or settings_of(seed), result)
    try:
        with asyncio.Runner(loop_factory=lambda: HostsLoop(f"runtimes {seed}", trace)) as runner:
            runner.get_loop().set_exception_handler(simulation.unhandled)
            try:
                runner.run(simulation.run())
            except (TritonError, TimeoutError) as error:  # A deadlock, a livelock, or a worker that does not come back.
                result.violations.append(f"{type(error).__name__}: {error}")
            del runner
            gc.collect()  # Reports errors that were never retrieved.
    finally:
        logging.disable(logged)
        endpoint.TIMES_FROM_S = times_from_s
        if collecting:
            gc.enable()
    result.digest = trace.digest()
    return result


class _Told(Oracle):
    """An oracle whose verdicts are part of the trace."""

    loop: HostsLoop

    def _end(self, ticket: Ticket, outcome: str, now: float) -> None:
        super()._end(ticket, outcome, now)
        work = ticket.plan.work
        self.loop.trace.note(now, f"call {work.id} ({work.shape}) {outcome}, {ticket.items} of {work.items} items")

    def _accuse(self, ticket: Ticket, what: str, kind: str) -> None:
        super()._accuse(ticket, what, kind)
        self.loop.trace.note(self.loop.time(), f"VIOLATION {self.violations[-1]}")


class Simulation:
    """One system, from its start to its end."""

    def __init__(self, seed: int, settings: Settings, result: Result) -> None:
        self.settings = settings
        self.result = result
        self._seed = seed
        self._rng = random.Random(f"network {seed}")
        self._config = Config(
            discovery="memory",
            handle_signals=False,
            watchdog_s=0.0,
            window_bytes=settings.window_bytes,
            session_window_bytes=settings.session_window_bytes,
            max_streams=settings.max_streams,
            token=settings.token,
            connect_timeout_s=0.5,
            health_timeout_s=1.0,
            drain_timeout_s=settings.drain_timeout_s,
        )
        self._begun: Counter[int] = Counter()
        self._hurt: list[tuple[int, float, float]] = []  # The worker's number, from when to when.

    def unhandled(self, _: Any, context: dict[str, Any]) -> None:
        """Record an error that asyncio could not raise anywhere."""
        error = context.get("exception")
        self.result.violations.append(f"asyncio: {context.get('message')}: {error!r}")

    async def run(self) -> None:
        """Run the whole simulation."""
        settings = self.settings
        self.loop = cast(HostsLoop, asyncio.get_running_loop())
        began = self.loop.time()
        self.switch = Switch(self.loop, self._rng, settings.tcp)
        self.registry = Registry(self.loop, self._rng)
        self.oracle = _Told(
            strict=settings.spare > 0,
            spared=self._spared,
            limited=settings.max_inflight is not None or settings.max_streams < MANY,
            longest_s=LONGEST_S,
        )
        self.oracle.loop = self.loop
        self.workers = [self.make_worker(number, 0) for number in range(settings.workers)]
        for worker in self.workers:
            await worker.registered()
        callers = [self._make_caller(number) for number in range(settings.clients)]
        for caller in callers:
            await caller.open(settings.policy)
        try:
            await self._work(callers)
            await self._look(callers)
        finally:
            await self._end(callers)
        self.oracle.close(self._begun)
        self.result.violations[:0] = self.oracle.violations
        self.result.outcomes = self.oracle.outcomes()
        self.result.worst_gap_s, self.result.worst_call_s = self.oracle.worst_gap_s(), self.oracle.worst_call_s()
        self.result.seconds = self.loop.time() - began

    def make_worker(self, number: int, generation: int) -> Worker:
        """Start a worker's process."""
        host = Host(self.loop, f"worker {number}.{generation}")
        return Worker(host, self.switch, self.registry, self._config, self._begun, self.settings.max_inflight)

    def _make_caller(self, number: int) -> Caller:
        return Caller(Host(self.loop, f"client {number}"), self.switch, self.registry, self._config)

    def _spared(self, began_s: float, ended_s: float) -> bool:
        hurt = {number for number, from_s, to_s in self._hurt if from_s <= ended_s and began_s <= to_s}
        return len(hurt | self.inflictor.hurt_now) < self.settings.workers

    async def _work(self, callers: list[Caller]) -> None:
        """Make the calls and the faults."""
        settings = self.settings
        faults = schedule(
            self._seed,
            duration_s=settings.duration_s,
            workers=settings.workers,
            kinds=settings.kinds,
            faults_per_s=settings.faults_per_s,
            longest_s=settings.longest_s,
            spare=settings.spare,
            recovery=RECOVERY,
        )
        self.inflictor = Inflictor(
            self.switch,
            self.registry,
            self.workers,
            self.make_worker,
            lambda number, from_s, to_s: self._hurt.append((number, from_s, to_s)),
            callers,
            faults,
            self._rng,
            RECOVERY,
        )
        calls = plans(
            self._seed,
            duration_s=settings.duration_s,
            calls_per_s=settings.calls_per_s,
            patience_s=PATIENCE_S,
            variety=settings.variety,
        )
        calling = [
            caller.spawn(
                make_calls(
                    {ENDPOINT: caller.answer, TWO_WAY: caller.echo},
                    calls[number :: len(callers)],
                    self.oracle,
                    self.loop.time,
                )
            )
            for number, caller in enumerate(callers)
        ]
        leaving = asyncio.create_task(self._leave(callers[0])) if settings.client_leaves else None
        async with asyncio.timeout(settings.duration_s + ENDED_S):
            stops = ClientStops(settings.duration_s, settings.longest_s) if settings.client_stops else None
            await self.inflictor.run(stops)
            if leaving is not None:
                await leaving
        self.result.faults, self.result.left_out = self.inflictor.done, self.inflictor.left_out
        _, late = await asyncio.wait(calling, timeout=settings.duration_s + ENDED_S)
        if late:
            self.loop.trace.stop()  # Tasks of a group are cancelled in any order.
            for each in late:
                each.cancel()
            await asyncio.wait(late)
        for each in calling:
            if not each.cancelled() and each.exception() is not None:
                self.result.violations.append(f"the caller failed: {each.exception()!r}")

    async def _leave(self, caller: Caller) -> None:
        await asyncio.sleep(self._rng.random() * self.settings.duration_s)
        self.loop.trace.note(self.loop.time(), f"{caller.host.name} leaves")
        await caller.close()

    async def _look(self, callers: list[Caller]) -> None:
        """Check what is left after all processes are well again."""
        violations = self.result.violations
        until = self.loop.time() + FOUND_S
        here = callers[1:] if self.settings.client_leaves else callers
        while any(each for caller in here for each in checks.found(caller, self.workers)):
            await asyncio.sleep(0.1)
            if self.loop.time() > until:
                break
        for caller in here:
            violations += checks.found(caller, self.workers)
            for worker in self.workers:
                await self._last_call(caller, worker)
        await asyncio.sleep(1.0)  # The strangers' hellos time out, and losses are detected.
        for member in (*callers, *self.workers):
            violations += checks.idle(member)

    async def _last_call(self, caller: Caller, worker: Worker) -> None:
        work = Work(-1, "unary", 1)
        try:
            stream = caller.answer.direct(work, worker.runtime.instance_id, annotated=False, timeout=PATIENCE_S)
            answers = await caller.spawn(_all(stream))
            if answers != [work.item(0)]:
                self.result.violations.append(f"the last call to {worker.host.name} got {answers!r:.80}")
        except Exception as error:
            self.result.violations.append(f"the last call to {worker.host.name} failed: {error!r}")
        self._begun.pop(-1, None)

    async def _end(self, callers: list[Caller]) -> None:
        """Close everything and check what is left."""
        for caller in callers:
            await caller.close()
        for worker in self.workers:
            await worker.leave()
        await asyncio.sleep(self._config.connect_timeout_s + 0.5)  # Peers that read nothing are closed by then.
        self.result.violations += checks.closed(self.loop, self.switch, self.registry)


async def _all(stream: Any) -> list[Any]:
    return [each async for each in stream]

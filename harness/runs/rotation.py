"""Measures how long clients still call a worker that was killed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import statistics
import time
from pathlib import Path
from typing import Any

from harness.fleet import CLIENTS, WORKERS, service
from harness.member import Member
from harness.report import Found
from harness.requests import ENDPOINT, Shape, Work
from harness.waiting import until
from triton_distributed.names import Instance
from triton_distributed.runtime import Client, DistributedRuntime
from triton_distributed.transport.address import Address

WATCHING = 2  # Clients in each client process, each with its own sessions.
WORK = Work(-1, Shape.UNARY, 1)
CALL_S = 0.002  # Seconds between two calls, which is the precision of the result.
BEFORE_S, AFTER_S = 0.1, 0.3
LIMIT_S = 0.05


class Noting:
    """A policy that takes the instances in turn. It gets the same candidates as any policy of a user.

    Attributes:
        offered_at: when the watched instance was last among the candidates of a call.
        without_at: when it was first missing after that.
        sent_at: when a call was last sent to it.
    """

    def __init__(self) -> None:
        self._turn = 0
        self._watched = 0
        self.offered_at = self.without_at = self.sent_at = 0.0

    def watch(self, instance_id: int) -> None:
        """Begin to watch an instance."""
        self._watched = instance_id
        self.offered_at = self.without_at = self.sent_at = 0.0

    def __call__(self, request: Any, instances: tuple[Instance, ...], load: Any) -> Instance:
        self._turn += 1
        chosen = instances[self._turn % len(instances)]
        now = time.monotonic()
        if any(each.id == self._watched for each in instances):
            self.offered_at, self.without_at = now, 0.0
        elif not self.without_at:
            self.without_at = now
        if chosen.id == self._watched:
            self.sent_at = now
        return chosen


class Watching:
    """A client with a `Noting` policy, in its own runtime."""

    def __init__(self, runtime: DistributedRuntime, client: Client, policy: Noting) -> None:
        self._runtime, self._client, self._policy = runtime, client, policy
        self._failed: list[str] = []
        self._running: set[asyncio.Task[None]] = set()
        self._pacing: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls) -> Watching:
        policy = Noting()
        runtime = DistributedRuntime()
        return cls(runtime, await runtime.endpoint(ENDPOINT).client(policy=policy), policy)

    async def begin(self, instance_id: int, workers: int) -> None:
        """Connect to every instance, and begin to call."""
        await until(lambda: len(self._client.candidates.instances) == workers, "all workers are candidates")
        for each in self._client.candidates.instances:
            async for _ in self._client.direct(WORK, each.id):
                pass
        self._policy.watch(instance_id)
        self._pacing = asyncio.ensure_future(self._pace())

    async def _pace(self) -> None:
        while True:
            task = asyncio.ensure_future(self._one())
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            await asyncio.sleep(CALL_S)

    async def _one(self) -> None:
        try:
            await self._client.call(WORK, idempotent=True)
        except Exception as error:
            self._failed.append(f"{type(error).__name__}: {error}")

    async def end(self) -> dict[str, Any]:
        """Stop calling, and return the noted times."""
        assert self._pacing is not None
        self._pacing.cancel()
        await asyncio.wait([self._pacing, *self._running])
        failed, self._failed = self._failed, []
        policy = self._policy
        return {
            "offered_at": policy.offered_at,
            "without_at": policy.without_at,
            "sent_at": policy.sent_at,
            "failed": failed[:5],
        }

    async def close(self) -> None:
        """Close its runtime."""
        await self._runtime.close()


async def watch(member: Member, _: str) -> None:
    """The part of a client process: clients that note their candidates."""
    watching = [await Watching.start() for _ in range(WATCHING)]

    async def aim(instance_id: int, workers: int) -> None:
        await asyncio.gather(*(each.begin(instance_id, workers) for each in watching))

    async def seen() -> list[dict[str, Any]]:
        return await asyncio.gather(*(each.end() for each in watching))

    async def close() -> None:
        await asyncio.gather(*(each.close() for each in watching))

    member.questions |= {"connect": lambda ids: None, "aim": aim, "seen": seen}
    member.closing.append(close)


def _connect(addresses: list[str]) -> socket.socket | None:
    """Return a bare connection to a worker; None if the worker has no socket."""
    for each in map(Address.parse, addresses):
        if each.scheme == "unix":
            found = socket.socket(socket.AF_UNIX)
            found.connect(each.host)
            return found
        if each.scheme == "tcp":
            return socket.create_connection((each.host, each.port))
    return None


def _reset_at(observer: socket.socket) -> float:
    """Block until the kernel reports the loss of the connection; return that time."""
    with contextlib.suppress(ConnectionError):
        while observer.recv(4096):
            pass
    return time.monotonic()


async def rotation(settings: dict[str, str], kills: int) -> Found:
    """Kill workers, each with all clients connected and calling, and replace them.

    The clock starts when a bare socket that is connected to the worker sees the reset. Each client makes a call every
    2 ms. It notes its last call with the worker among the candidates, and the first call without it. Over NATS there is
    no reset. There the clock starts with the kill, and nothing is promised.
    """
    last, first, sent = list[float](), list[float](), list[float]()
    never, sockets = 0, True
    words: list[str] = []
    part = f"harness.worker:serve:{Path(settings['TRD_DIR']) / 'begun'}"
    async with service(settings, part, "harness.runs.rotation:watch") as fleet:
        for number in range(kills):
            name = WORKERS[number % len(WORKERS)]
            worker = fleet.processes[name]
            addresses = await worker.ask("addresses")
            await fleet.ask(CLIENTS, "aim", instance_id=worker.instance_id, workers=len(WORKERS))
            await asyncio.sleep(BEFORE_S)
            observer = _connect(addresses)
            watching = None if observer is None else asyncio.ensure_future(asyncio.to_thread(_reset_at, observer))
            at = await fleet.kill(name)
            sockets = observer is not None
            if watching is not None and observer is not None:
                at = await watching
                observer.close()
            await asyncio.sleep(AFTER_S)
            for each in [client for process in (await fleet.ask(CLIENTS, "seen")).values() for client in process]:
                words += each["failed"]
                never += not each["without_at"]
                if each["without_at"]:
                    last.append(max(0.0, each["offered_at"] - at))
                    first.append(max(0.0, each["without_at"] - at))
                    sent.append(max(0.0, each["sent_at"] - at))
            await fleet.replace(name)
    found = Found(words=words[:20])
    found.figures = {
        "kills": kills,
        "clients": len(CLIENTS) * WATCHING,
        "never": never,
        "failed": len(words),
    }
    for name, times in (("last", last), ("first", first), ("sent", sent)):
        if times:
            found.figures[f"{name}_p50_ms"] = statistics.median(times) * 1000
            found.figures[f"{name}_max_ms"] = max(times) * 1000
            found.figures[f"{name}_ms"] = [round(each * 1000, 3) for each in sorted(times)]
    if sockets:
        worst = max(last, default=0.0)
        found.promise(
            f"no call that is made {LIMIT_S * 1000:.0f} ms after the reset is offered the dead worker",
            not never and worst <= LIMIT_S,
            f"{never} clients go on" if never else f"the last one {worst * 1000:.1f} ms after it",
        )
    found.promise("none of the idempotent calls fails meanwhile", not words, f"{len(words)} did")
    return found

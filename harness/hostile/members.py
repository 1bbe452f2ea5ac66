"""The processes of a hostile run: parts of `harness.member`."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from harness.hostile.attacks import ATTACKS
from harness.hostile.liar import LIES, Liar
from harness.hostile.raw import WORKER
from harness.load import Kind, Load, touch
from harness.member import Member
from harness.oracle import Oracle
from harness.report import percentile
from harness.requests import ENDPOINT, Plan, Shape, Work, handler
from harness.worker import NoJournal
from triton_distributed.errors import TritonError
from triton_distributed.runtime import Client, DistributedRuntime

DIAL_EVERY_S = 0.5
BELIEVED = 8  # Calls at once to a worker that lies.
BULK = bytes(15_000)


async def echo(request: Any) -> AsyncIterator[Any]:
    yield request


async def hold(request: Any) -> AsyncIterator[Any]:
    await asyncio.get_running_loop().create_future()
    yield None


async def endless(request: Any) -> AsyncIterator[int]:
    number = 0
    while True:
        yield number
        number += 1


async def bulk(request: Any) -> AsyncIterator[bytes]:
    while True:
        yield BULK


async def upload(requests: AsyncIterator[Any]) -> AsyncIterator[int]:
    """Read requests without end, and let other tasks run in between."""
    async for _ in requests:
        await asyncio.sleep(0)
    yield 0


async def deaf(requests: AsyncIterator[Any]) -> AsyncIterator[int]:
    """Never read requests."""
    await asyncio.get_running_loop().create_future()
    yield 0


async def sip(requests: AsyncIterator[Any]) -> AsyncIterator[int]:
    """Take one request, and wait."""
    async for _ in requests:
        await asyncio.get_running_loop().create_future()
    yield 0


TARGETS = {f"{WORKER}.{each.__name__}": each for each in (echo, hold, endless, bulk, upload, deaf, sip)}


async def target(member: Member) -> None:
    """The part of the worker."""
    member.serve(ENDPOINT, handler(NoJournal()))
    for path, function in TARGETS.items():
        member.serve(path, function)


async def attack(member: Member) -> None:
    """The part of the attacker: one question for each attack, which returns the attack's counts."""
    for name, kind in ATTACKS.items():

        async def answer(address: str, seconds: float, run: Any = kind.run) -> Any:
            return await asyncio.to_thread(run, address, time.monotonic() + seconds)

        member.questions[name] = answer


async def lie(member: Member, address: str) -> None:
    """The part of the worker that lies: one question for each lie, which returns the bytes sent since the previous one.

    Args:
        address: the `host,port` to listen on.
    """
    liar = Liar()
    host, _, port = address.partition(",")
    server = await asyncio.start_server(liar.serve, host, int(port))

    async def close() -> None:
        server.close()

    member.questions |= {name: lambda name=name: liar.tell(name) for name in (*LIES, "silence")}
    member.closing.append(close)


async def behave(member: Member) -> None:
    """The part of the client: calls at a steady pace, and new connections.

    A call is due whether or not the previous one has ended. Its latency counts from the time when it was due.
    """
    clients = {ENDPOINT: await member.runtime.endpoint(ENDPOINT).client()}
    await touch(clients[ENDPOINT], clients[ENDPOINT].instance_ids())
    lies = await member.runtime.endpoint(f"{WORKER}.lies").client()

    async def load(seconds: float, rate: float, believe: bool = False) -> dict[str, Any]:
        return await Phase(clients, lies if believe else None).run(seconds, rate)

    member.questions["load"] = load


def _unary(_: random.Random, request_id: int) -> Plan:
    return Plan(Work(request_id, Shape.UNARY, 1))


class Phase:
    """One phase's calls and dials.

    Args:
        clients: the clients of the endpoint.
        lies: the client of the worker that lies; None if there is none.
    """

    def __init__(self, clients: dict[str, Client], lies: Client | None) -> None:
        self._lies = lies
        self._oracle = Oracle(strict=True)
        self._load = Load(clients, self._oracle, [Kind("unary", 1, _unary)], random.Random(1), 0, 100_000)
        self._dials_s: list[float] = []
        self._lied_to = 0
        self._failed: Counter[str] = Counter()

    async def run(self, seconds: float, rate: float) -> dict[str, Any]:
        """Call for this many seconds, and wait for the last answers."""
        others = [asyncio.ensure_future(self._believe()) for _ in range(BELIEVED) if self._lies is not None]
        dialling = asyncio.ensure_future(self._dial_often(seconds))
        self._load.go(rate)
        await asyncio.sleep(seconds)
        try:
            await self._load.rest()
        except TimeoutError as error:
            self._failed[str(error)] += 1
        await dialling
        for each in others:
            each.cancel()
        if others:
            await asyncio.wait(others)
        await self._load.close()
        self._failed.update(words.partition(": ")[2] for words in self._oracle.violations)
        self._failed.update(f"call: {t.outcome}" for t in self._oracle.tickets if t.outcome != "answered")
        took = [t.ended_s - t.began_s for t in self._oracle.tickets if t.outcome == "answered"]
        return {
            "calls": len(took),
            "p50_ms": 1e3 * percentile(took, 0.5),
            "p99_ms": 1e3 * percentile(took, 0.99),
            "max_ms": 1e3 * max(took, default=0.0),
            "dials": len(self._dials_s),
            "dial_max_ms": 1e3 * max(self._dials_s, default=0.0),
            "failed": dict(self._failed.most_common(20)),
            "lied_to": self._lied_to,
        }

    async def _dial_often(self, seconds: float) -> None:
        dials = set()
        for _ in range(int(seconds / DIAL_EVERY_S)):
            dials.add(asyncio.ensure_future(self._dial()))
            await asyncio.sleep(DIAL_EVERY_S)
        if dials:
            await asyncio.wait(dials)

    async def _dial(self) -> None:
        """Make a new client's first call, on its own connection."""
        started = time.perf_counter()
        try:
            async with DistributedRuntime() as runtime:
                client = await runtime.endpoint(ENDPOINT).client()
                await touch(client, client.instance_ids())
                self._dials_s.append(time.perf_counter() - started)
        except Exception as error:
            self._failed[f"dial: {type(error).__name__}: {error}"[:300]] += 1

    async def _believe(self) -> None:
        """Call the worker that lies, over and over. Each lie must end as an error."""
        assert self._lies is not None
        while True:
            try:
                async for _ in self._lies.generate(1, annotated=False, timeout=1.0):
                    self._lied_to += 1
            except (TritonError, ValueError):
                self._lied_to += 1
            except Exception as error:
                self._failed[f"lies: {type(error).__name__}: {error}"[:300]] += 1
            await asyncio.sleep(0.01)

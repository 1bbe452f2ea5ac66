"""The calls of the soak by kind: what each does, what it must get, and which errors it may get instead."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.soak.handlers import COMPONENT, ERRORS, NAMESPACE, Point, number, word
from benchmarks.soak.news import PASSING, SUBJECT, News, tell
from benchmarks.soak.waiting import patiently, until
from triton_distributed.config import KIB, MIB, Config
from triton_distributed.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    Draining,
    InstanceNotFound,
    InvalidRequest,
    NoInstances,
    Overloaded,
    Paused,
    RemoteError,
    StreamIncomplete,
)
from triton_distributed.runtime import Client, Context, DistributedRuntime, ResponseStream

ENDPOINTS = {  # by name, with the policy of its client
    "facts": "round_robin",
    "numbers": "p2c",
    "plain": "random",
    "arrays": "least_loaded",
    "both": "round_robin",
    "failing": "round_robin",
    "typed": "round_robin",
    "sleepy": "p2c",
    "steps": "round_robin",
    "narrow": "random",
    "relay": "least_loaded",
    "coming": "round_robin",
}
MOST_ITEMS = 500
CROWD = 60  # calls at once to an endpoint where three workers run 2 each and let 4 wait
PRIORITIES = (-128, -1, 0, 1, 127)  # few: a worker remembers how well it estimates the wait of each
NOTHING = object()


class WrongAnswer(Exception):
    """An answer is not what its request asks for."""


class Caller:
    """What the calls of one client process are made with."""

    def __init__(self, runtime: DistributedRuntime, name: str, news: News, rng: random.Random) -> None:
        self.runtime, self.name, self.news, self.rng = runtime, name, news, rng
        self.clients: dict[str, Client] = {}

    async def open(self) -> None:
        """Make a client of every endpoint."""
        component = self.runtime.namespace(NAMESPACE).component(COMPONENT)
        for each, policy in ENDPOINTS.items():
            self.clients[each] = await component.endpoint(each).client(policy)

    @property
    def open_calls(self) -> int:
        """Calls that have not ended."""
        return sum(each.stats.inflight for each in self.clients.values())


def same(found: object, wanted: object) -> None:
    """Raise WrongAnswer where two values differ."""
    if found != wanted:
        raise WrongAnswer(f"{found!r:.300} instead of {wanted!r:.300}")


async def read(stream: AsyncIterator[Any], wanted: Iterable[Any]) -> None:
    """Read a stream to its end: it must have these items, in this order, and no others.

    Raises:
        WrongAnswer: it has not.
    """
    rest = iter(wanted)
    async for item in stream:
        same(item, next(rest, NOTHING))
    left = next(rest, NOTHING)
    if left is not NOTHING:
        raise WrongAnswer(f"the stream ended before {left!r:.300}")


def some_numbers(rng: random.Random, most: int = MOST_ITEMS, pause_s: float = 0.0, size: int = 0) -> dict[str, Any]:
    """A request of `numbers`."""
    return {
        "first": rng.randrange(1 << 32),
        "count": rng.randint(1, most),
        "size": size or rng.choice((8, 40, 200)),
        "pause_s": pause_s,
    }


def those(request: dict[str, Any]) -> Iterator[Any]:
    """What `numbers` answers."""
    return (number(request["first"] + k, request["size"]) for k in range(request["count"]))


# --- what ends as it should ------------------------------------------------------------------------------------------


async def unary(caller: Caller) -> None:
    rng = caller.rng
    text = word(rng.randrange(1 << 32), rng.choice((0, 20, 2_000)))
    request = rng.choice((text, {"text": text, "list": [1, 2.5, None, True], "n": rng.random()}, [text] * 3))
    same((await caller.clients["facts"].call(request))["asked"], request)


async def streamed(caller: Caller) -> None:
    request = some_numbers(caller.rng)
    if caller.rng.random() < 0.5:
        await read(caller.clients["numbers"].generate(request, annotated=False), those(request))
    else:
        stream = caller.clients["numbers"].generate(request)
        await read((item.data() async for item in stream), those(request))


async def threaded(caller: Caller, instance_id: int | None = None) -> None:
    request, client = some_numbers(caller.rng, 200), caller.clients["plain"]
    if instance_id is None:
        await read(client.generate(request, annotated=False), those(request))
    else:
        await read(client.direct(request, instance_id, annotated=False), those(request))


async def arrays(caller: Caller) -> None:
    rng = caller.rng
    size = int(KIB * (MIB // KIB) ** rng.random())  # as often between 1 and 2 KiB as between 512 KiB and 1 MiB
    array = np.resize(np.frombuffer(rng.randbytes(256), np.uint8), size)
    turn, times = 0, rng.randint(1, 3)
    async for item in caller.clients["arrays"].generate({"times": times, "array": array}, annotated=False):
        same(item["turn"], turn)
        if not np.array_equal(item["array"], array ^ turn):
            raise WrongAnswer(f"array {turn} of {size} bytes differs")
        turn += 1
    same(turn, times)


async def _requests(first: int, count: int, pause_s: float) -> AsyncIterator[Any]:
    for k in range(count):
        if pause_s:
            await asyncio.sleep(pause_s)
        yield {"i": first + k, "size": 20}


async def two_way(caller: Caller) -> None:
    first, count = caller.rng.randrange(1 << 32), caller.rng.randint(1, 100)
    requests = _requests(first, count, caller.rng.choice((0.0, 0.001)))
    stream = caller.clients["both"].generate(requests, annotated=False)
    await read(stream, (number(first + k, 20) for k in range(count)))


async def relayed(caller: Caller) -> None:
    request = some_numbers(caller.rng, 100)
    await read(caller.clients["relay"].generate(request, annotated=False), those(request))


async def resumed(caller: Caller) -> None:
    request = {"count": caller.rng.randint(1, MOST_ITEMS), "size": 40, "pause_s": 0.02}
    stream = caller.clients["steps"].generate(request, annotated=False, resume=True)
    await read(stream, (number(i, 40) for i in range(request["count"])))


async def idempotent(caller: Caller) -> None:
    n = caller.rng.randrange(1 << 32)
    request = {"s": caller.rng.choice((0.0, 0.01, 0.2)), "n": n}
    same(await caller.clients["sleepy"].call(request, idempotent=True), n)


async def hedged(caller: Caller) -> None:
    n = caller.rng.randrange(1 << 32)
    request = {"s": caller.rng.choice((0.0, 0.05)), "n": n}
    same(await caller.clients["sleepy"].call(request, idempotent=True, hedge_after_s=0.01), n)


async def direct(caller: Caller) -> None:
    client = caller.clients["facts"]
    instance = caller.rng.choice(client.instance_ids())
    async for answer in client.direct("you", instance, annotated=False):
        same(answer, {"asked": "you", "by": instance})


async def slow_reader(caller: Caller) -> None:
    request = some_numbers(caller.rng, 200, size=8 * KIB)
    left = those(request)
    async for item in caller.clients["numbers"].generate(request, annotated=False):
        same(item, next(left, NOTHING))
        if item["i"] % 20 == 0:
            await asyncio.sleep(0.05)
    same(next(left, NOTHING), NOTHING)


async def news(caller: Caller) -> None:
    await caller.news.publish()


async def newcomer(caller: Caller) -> None:
    """One more client of an endpoint that has some."""
    client = await caller.runtime.endpoint(f"{NAMESPACE}.{COMPONENT}.facts").client(
        caller.rng.choice(("p2c", "random"))
    )
    same((await client.call("new"))["asked"], "new")


async def passing(caller: Caller) -> None:
    """Two runtimes that stay for one call: one serves an endpoint and the other calls it, and hears an event."""
    config = Config.from_env(handle_signals=False)
    path = f"{NAMESPACE}.{PASSING}.{caller.name}"
    n = caller.rng.randrange(1 << 32)

    async def echo(request: Any) -> Any:
        return request

    async with DistributedRuntime(config=config) as here, DistributedRuntime(config=config) as there:
        serving = here.endpoint(path).serve_endpoint(echo)
        client = await there.endpoint(path).client()
        await until(lambda: here.instance_id in client.instance_ids(), "the endpoint of a new runtime is seen")
        same(await client.direct(n, here.instance_id, annotated=False).__anext__(), n)
        subscription = await there.namespace(NAMESPACE).component(COMPONENT).subscribe(SUBJECT)
        await tell(here, PASSING, n)
        async for event in subscription:
            if event.data["by"] == PASSING and event.data["n"] == n:
                break
    await patiently(serving)


# --- what must fail --------------------------------------------------------------------------------------------------


async def failing(caller: Caller) -> str:
    """A handler that raises, or a request that does not fit."""
    rng = caller.rng
    name = rng.choice((*ERRORS, "InvalidRequest"))
    if name == "InvalidRequest":
        try:
            await caller.clients["typed"].call({"x": 1, "y": "two"})
        except InvalidRequest:
            return name
        raise WrongAnswer("a request that does not fit was served")
    request = {"type": name, "after": rng.randint(0, 5), "words": word(rng.randrange(1 << 32), 20)}
    seen: list[Any] = []
    try:
        async for item in caller.clients["failing"].generate(request, annotated=False):
            seen.append(item)  # noqa: PERF401 - a comprehension would lose them at the error
    except RemoteError as error:
        if not isinstance(error, ERRORS[name]) or error.type_name != name or request["words"] not in error.message:
            raise WrongAnswer(f"{error!r} instead of {name}") from error
        same(seen, list(range(request["after"])))
        return name
    raise WrongAnswer(f"a handler that raises {name} ended well")


async def fitting(caller: Caller) -> None:
    x, y = caller.rng.randrange(1000), caller.rng.randrange(1000)
    same(await caller.clients["typed"].call(Point(x, y)), x * y)


async def too_late(caller: Caller) -> str:
    """A deadline that runs out within a stream of a second, or behind a relay."""
    rng = caller.rng
    request = {**some_numbers(rng, pause_s=0.02), "count": MOST_ITEMS}
    left = those(request)
    try:
        client = caller.clients[rng.choice(("numbers", "relay"))]
        async for item in client.generate(request, annotated=False, timeout=rng.uniform(0.002, 0.15)):
            same(item, next(left, NOTHING))
    except DeadlineExceeded:
        return "DeadlineExceeded"
    raise WrongAnswer("a stream of a second ended well within its deadline")


async def narrow(caller: Caller) -> str:
    """A crowd before an endpoint that takes few at once: each is served, or refused with `Overloaded`."""
    outcomes = await asyncio.gather(*(_narrow(caller, n) for n in range(CROWD)))
    if "ok" not in outcomes:
        raise WrongAnswer("of a crowd nobody was served")
    return "some refused" if "Overloaded" in outcomes else "all served"


async def _narrow(caller: Caller, n: int) -> str:
    try:
        same(await caller.clients["narrow"].call({"n": n}, priority=caller.rng.choice(PRIORITIES)), n)
    except (Overloaded, StreamIncomplete) as error:
        return type(error).__name__
    return "ok"


# --- what is left ----------------------------------------------------------------------------------------------------


async def cancelled(caller: Caller) -> str:
    """A call that is left at some moment."""
    moment = caller.rng.choice(tuple(MOMENTS))
    name = caller.rng.choice(("numbers", "relay", "plain"))
    request = {**some_numbers(caller.rng, pause_s=caller.rng.choice((0.0, 0.02))), "count": MOST_ITEMS}
    context = Context()
    stream = caller.clients[name].generate(request, annotated=False, context=context)
    await MOMENTS[moment](caller, stream, request, context)
    return moment


async def _before_it_leaves(_: Caller, stream: ResponseStream, *rest: Any) -> None:
    stream.cancel()


async def _unread(_: Caller, stream: ResponseStream, *rest: Any) -> None:
    del stream


async def _before_the_first_item(_: Caller, stream: ResponseStream, *rest: Any) -> None:
    await stream
    await stream.aclose()


async def _within(caller: Caller, stream: ResponseStream, request: dict[str, Any], _: Context) -> None:
    left, last = those(request), caller.rng.randrange(MOST_ITEMS - 1)
    async for item in stream:
        same(item, next(left, NOTHING))
        if item["i"] - request["first"] == last:
            break


async def _with_its_task(caller: Caller, stream: ResponseStream, request: dict[str, Any], _: Context) -> None:
    task = asyncio.create_task(read(stream, those(request)))
    del stream
    await asyncio.wait({task}, timeout=caller.rng.uniform(0, 0.05))
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()


async def _killed(caller: Caller, stream: ResponseStream, request: dict[str, Any], context: Context) -> None:
    left, last = those(request), caller.rng.randrange(MOST_ITEMS - 1)
    with contextlib.suppress(asyncio.CancelledError):
        async for item in stream:
            same(item, next(left, NOTHING))
            if item["i"] - request["first"] == last:
                context.kill()


async def _two_way_within(caller: Caller, stream: ResponseStream, request: dict[str, Any], _: Context) -> None:
    stream.cancel()
    first, last = request["first"], caller.rng.randrange(50)
    wanted = first
    async for item in caller.clients["both"].generate(_requests(first, 1_000, 0.001), annotated=False):
        same(item, number(wanted, 20))
        wanted += 1
        if wanted > first + last:
            break


MOMENTS: dict[str, Callable[[Caller, ResponseStream, dict[str, Any], Context], Awaitable[None]]] = {
    "before it leaves": _before_it_leaves,
    "unread": _unread,
    "before the first item": _before_the_first_item,
    "within": _within,
    "with its task": _with_its_task,
    "killed": _killed,
    "two-way": _two_way_within,
}


async def coming(caller: Caller) -> str | None:
    """An endpoint that comes and goes."""
    n = caller.rng.randrange(1 << 32)
    try:
        same(await caller.clients["coming"].call(n), n)
    except NoInstances:
        return "NoInstances"
    return None


# --- the mix ---------------------------------------------------------------------------------------------------------


def _broken(error: Exception) -> bool:
    """A stream that broke; behind a relay the relay's own."""
    return isinstance(error, StreamIncomplete)


def _one_instance(error: Exception) -> bool:
    """Of a call that cannot go elsewhere: to one instance, or streaming its requests."""
    return isinstance(error, (StreamIncomplete, ConnectionFailed, Draining, Paused, InstanceNotFound))


def _never(error: Exception) -> bool:
    return False


@dataclass(frozen=True)
class Kind:
    """A kind of call.

    Attributes:
        work: makes one; returns how it ended, None for well.
        weight: how often, relative to the others.
        permits: whether an error is one that was promised.
    """

    work: Callable[[Caller], Awaitable[str | None]]
    weight: float
    permits: Callable[[Exception], bool] = field(default=_broken)

    @property
    def name(self) -> str:
        return self.work.__name__


KINDS = (
    Kind(unary, 20),
    Kind(streamed, 12),
    Kind(threaded, 4),
    Kind(arrays, 8),
    Kind(two_way, 5, _one_instance),
    Kind(relayed, 4),
    Kind(resumed, 4, _never),
    Kind(idempotent, 4, _never),
    Kind(hedged, 4, _never),
    Kind(direct, 5, _one_instance),
    Kind(slow_reader, 1),
    Kind(news, 6, _never),
    Kind(newcomer, 1),
    Kind(passing, 0.5, _never),
    Kind(failing, 6),
    Kind(fitting, 2),
    Kind(too_late, 4),
    Kind(narrow, 0.5, _never),
    Kind(cancelled, 12, _one_instance),
    Kind(coming, 4, _one_instance),
)

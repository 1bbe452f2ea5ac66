"""The native API: what calls return, which handlers fit a contract, and the slips that checkers must find."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, assert_type

import triton_distributed as trd


@dataclass
class Texts:
    texts: list[str]


@dataclass
class Vectors:
    vectors: list[float]


@dataclass
class Token:
    text: str


EMBED = trd.Unary[Texts, Vectors]("t.typing.embed")
GENERATE = trd.Stream[str, Token]("t.typing.generate")
CHAT = trd.Bidirectional[str, Token]("t.typing.chat")
MAYBE = trd.Unary[int, int | None]("t.typing.maybe")


# Handlers that fit.


@trd.serve(EMBED, max_inflight=64, max_queue=8, metadata={"model": "small"})
def plain(request: Texts) -> Vectors:
    return Vectors([0.0])


@trd.serve(EMBED)
async def unary(request: Texts, context: trd.Context) -> Vectors:
    return Vectors([context.remaining_s() or 0.0])


@trd.serve(GENERATE)
async def generate(prompt: str, context: trd.Context) -> AsyncIterator[Token]:
    yield Token(prompt)


@trd.serve(GENERATE)
def threaded(prompt: str) -> Iterator[Token]:
    yield Token(prompt)


@trd.serve(CHAT)
async def chat(turns: AsyncIterator[str]) -> AsyncIterator[Token]:
    async for turn in turns:
        yield Token(turn)


@trd.serve(MAYBE)
async def maybe(request: int) -> int | None:
    return None


class Model:
    @trd.serve(EMBED)
    async def embed(self, request: Texts) -> Vectors:
        return Vectors([])

    @trd.serve(GENERATE)
    async def generate(self, prompt: str, context: trd.Context) -> AsyncIterator[Token]:
        yield Token(prompt)


@trd.serve("t.typing.script")
async def script(name: str) -> int:
    return len(name)


def stays_a_function() -> None:
    assert_type(plain(Texts([])), Vectors)
    assert_type(unary, Callable[[Texts, trd.Context], Coroutine[Any, Any, Vectors]])
    assert_type(asyncio.run(script("a")), int)


# Calls.


async def calls(model: Model) -> None:
    async with trd.connect() as here:
        answer = await here.call(EMBED, Texts(["a"]), timeout=2, policy="p2c", idempotent=True, hedge_after_s=0.1)
        assert_type(answer, Vectors)
        assert_type(await here.call(MAYBE, 1), int | None)
        assert_type(await here.call("t.typing.script", "a"), Any)
        async for token in here.stream(GENERATE, "a", resume=True):
            assert_type(token, Token)
        async with here.stream(GENERATE, "a") as tokens:
            await tokens.accepted()
            assert_type(await anext(tokens), Token)
        await here.send(GENERATE, "a", priority=3)
        served = await here.serve(EMBED, model.embed, max_inflight=2)
        assert_type(served, trd.Served)
        await here.serve(generate)
        await served.until_drained()
        await here.wait_for_instances(EMBED, 3, timeout=5)
        assert_type(await here.instances(EMBED), list[trd.InstanceStatus])


async def nested() -> None:
    assert_type(await trd.call(EMBED, Texts([])), Vectors)
    async for token in trd.stream(GENERATE, "a"):
        assert_type(token, Token)


# Slips.


async def slips(model: Model) -> None:
    async with trd.connect() as here:
        await here.call(EMBED, Texts([]), timout=2)  # refused: call-overload, reportCallIssue
        await here.call(EMBED, "a")  # refused: misc, reportArgumentType
        await here.call(EMBED, {"texts": ["a"]})  # refused: misc, reportArgumentType
        await here.call(GENERATE, "a")  # refused: call-overload, reportArgumentType
        await here.call(EMBED, Texts([]), resume=True)  # refused: call-overload, reportCallIssue
        await here.call(EMBED, Texts([]), timeout="2")  # refused: call-overload, reportArgumentType
        await here.call(EMBED)  # refused: call-overload, reportCallIssue
        print((await here.call(EMBED, Texts([]))).vectorz)  # refused: attr-defined, reportAttributeAccessIssue
        (await here.call(MAYBE, 1)) + 1  # refused: operator, reportOptionalOperand
        here.stream(EMBED, Texts([]))  # refused: call-overload, reportArgumentType
        here.stream(GENERATE, 1)  # refused: misc, reportArgumentType
        here.stream(CHAT, ["a"])  # refused: call-overload, reportArgumentType
        for _ in here.stream(GENERATE, "a"):  # refused: attr-defined, reportGeneralTypeIssues
            pass
        await here.send(CHAT, "a")  # refused: arg-type, reportArgumentType
        await here.serve(EMBED, generate)  # refused: arg-type, reportArgumentType
        await here.serve(GENERATE, model.embed)  # refused: arg-type, reportArgumentType
        await here.serve(EMBED, plain, max_inflght=3)  # refused: call-overload, reportCallIssue
        here.call(EMBED, Texts([]))  # refused: unused-coroutine, reportUnusedCoroutine
        await trd.call(EMBED, 3)  # refused: misc, reportArgumentType
        await here.wait_for_instances(EMBED, "3")  # refused: arg-type, reportArgumentType


@trd.serve(EMBED, max_inflght=3)  # refused: call-overload, reportCallIssue
def misspelt(request: Texts) -> Vectors:
    return Vectors([])


@trd.serve(EMBED)  # refused: arg-type, reportArgumentType
def other_request(request: str) -> Vectors:
    return Vectors([])


@trd.serve(EMBED)  # refused: arg-type, reportArgumentType
def other_answer(request: Texts) -> Texts:
    return request


@trd.serve(EMBED)  # refused: arg-type, reportArgumentType
async def stream_of_unary(request: Texts) -> AsyncIterator[Vectors]:
    yield Vectors([])


@trd.serve(GENERATE)  # refused: arg-type, reportArgumentType
async def one_of_many(prompt: str) -> Token:
    return Token(prompt)


@trd.serve(GENERATE)  # refused: arg-type, reportArgumentType
async def other_items(prompt: str) -> AsyncIterator[str]:
    yield prompt


@trd.serve(EMBED)  # refused: arg-type, reportArgumentType
def three(request: Texts, context: trd.Context, extra: int) -> Vectors:
    return Vectors([])


@trd.serve(CHAT)  # refused: arg-type, reportArgumentType
async def not_two_way(turn: str) -> AsyncIterator[Token]:
    yield Token(turn)


def used_wrongly() -> None:
    plain("a")  # refused: arg-type, reportArgumentType


@trd.route("POST /engine/sleep")
@trd.route("POST /sleep")
async def sleep(body: Any) -> dict[str, int]:
    if not body:
        raise trd.HttpError(400, "say how deep")
    return {"level": 1}


@trd.health_check
def device() -> str | None:
    return "too hot"


@trd.health_check(timeout_s=3)
async def engine_works() -> bool:
    return True


class OnPort:
    @trd.serve("demo.back.infer", canary={"prompt": "?"})
    async def infer(self, request: str) -> str:
        return request

    @trd.route("POST /wake")
    def wake(self) -> None:
        return None

    @trd.health_check
    async def is_awake(self) -> bool:
        return True


async def on_the_status_port(here: trd.Connection, made: OnPort) -> None:
    assert_type(await sleep({}), dict[str, int])
    assert_type(device(), str | None)
    assert_type(await engine_works(), bool)
    assert_type(await made.is_awake(), bool)
    here.route("GET /state", made.wake)
    here.health_check(made.is_awake, timeout_s=2)
    assert_type(here.runtime.status_port.url, str)


def slips_of_the_status_port(here: trd.Connection) -> None:
    trd.route(sleep)  # refused: arg-type, reportArgumentType
    trd.health_check(3)  # refused: call-overload, reportArgumentType
    here.health_check(sleep)  # refused: arg-type, reportArgumentType
    trd.HttpError("409", "busy")  # refused: arg-type, reportArgumentType

"""The fixture `trd_fake`: answers and errors without a worker."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fastapi import FastAPI

import triton_distributed.fastapi as trd_fastapi
from tests.runtime.cluster import longer
from tests.testing.contracts import LENGTHS, LETTERS, TWICE, UPPER, Text, twice
from tests.timing import MS, PATIENCE_S
from triton_distributed import (
    ContractMismatch,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RemoteError,
    StreamIncomplete,
    Unary,
    connect,
    connect_sync,
)
from triton_distributed.testing import Fake, LocalConnection, LocalSyncConnection, UnexpectedCall

with warnings.catch_warnings():  # Starlette prefers another HTTP client from some release on.
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient

BUSY = Overloaded("t/components/fixture/upper", 7, "busy", 1, 2.5)


async def test_answers_come_in_order_and_the_last_one_stays(trd: LocalConnection, trd_fake: Fake) -> None:
    trd_fake[UPPER].returns(Text("one")).returns(Text("two"))
    assert [(await trd.call(UPPER, Text(each))).text for each in "abc"] == ["one", "two", "two"]
    assert trd_fake[UPPER].requests == [Text("a"), Text("b"), Text("c")]
    trd_fake[UPPER].returns(Text("new"))
    assert await trd.call(UPPER, Text("d")) == Text("new")


async def test_an_error_of_the_runtime_is_raised_as_the_runtime_raises_it(trd: LocalConnection, trd_fake: Fake) -> None:
    trd_fake[UPPER].raises(BUSY).returns(Text("A"))
    with pytest.raises(Overloaded) as caught:
        await trd.call(UPPER, Text("a"))
    assert (caught.value.retry_after_s, isinstance(caught.value, RemoteError)) == (2.5, False)
    assert await trd.call(UPPER, Text("b")) == Text("A")
    trd_fake[LETTERS].raises(BUSY)
    async with trd.stream(LETTERS, Text("c")) as items:
        with pytest.raises(Overloaded):
            await items.accepted()
    assert [each.text for each in (*trd_fake[UPPER].requests, *trd_fake[LETTERS].requests)] == ["a", "b", "c"]


async def test_an_error_of_a_handler_arrives_as_from_a_worker(trd: LocalConnection, trd_fake: Fake) -> None:
    trd_fake[LETTERS].yields(Text("a"), Text("b"), raises=KeyError("c"))
    items = []
    with pytest.raises(KeyError) as caught:
        async for item in trd.stream(LETTERS, Text("abc")):
            items.append(item)
    assert items == [Text("a"), Text("b")]
    assert isinstance(caught.value, RemoteError)


async def answer_later(request: Text) -> Text:
    await asyncio.sleep(0)
    return Text(request.text * 2)


async def items_later(request: Text) -> AsyncIterator[Text]:
    for each in request.text:
        yield Text(each)


def items_now(request: Text) -> Iterator[Text]:
    for each in request.text:
        yield Text(each)


@pytest.mark.parametrize("function", [lambda request: Text(request.text * 2), answer_later])
async def test_a_function_answers(trd: LocalConnection, trd_fake: Fake, function: Any) -> None:
    trd_fake[UPPER].answers(function)
    assert await trd.call(UPPER, Text("ab")) == Text("abab")


@pytest.mark.parametrize("function", [items_later, items_now])
async def test_a_generator_answers(trd: LocalConnection, trd_fake: Fake, function: Any) -> None:
    trd_fake[LETTERS].answers(function)
    assert [each.text async for each in trd.stream(LETTERS, Text("ab"))] == ["a", "b"]


async def test_requests_of_a_stream_are_recorded(trd: LocalConnection, trd_fake: Fake) -> None:
    async def requests() -> AsyncIterator[Text]:
        for each in "ab":
            yield Text(each)

    trd_fake[LENGTHS].yields(3, 4)
    assert [each async for each in trd.stream(LENGTHS, requests())] == [3, 4]
    assert trd_fake[LENGTHS].requests == [Text("a"), Text("b")]


async def test_a_deadline_and_a_cancellation_reach_the_function(trd: LocalConnection, trd_fake: Fake) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def never(request: Text) -> Text:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return request

    trd_fake[UPPER].answers(never)
    await trd.wait_for_instances(UPPER, 1, timeout=PATIENCE_S)
    for seconds in longer(20 * MS):  # On a busy machine the time may be over before the function begins.
        with pytest.raises(DeadlineExceeded):
            await trd.call(UPPER, Text("a"), timeout=seconds)
        if began.is_set():
            break
    await ended.wait()


async def test_requests_and_contracts_are_checked_as_by_a_worker(trd: LocalConnection, trd_fake: Fake) -> None:
    trd_fake[UPPER].returns(Text("A"))
    with pytest.raises(InvalidRequest):
        await trd.call(str(UPPER.name), {"text": 1})
    with pytest.raises(ContractMismatch):
        await trd.call(Unary[Text, int](str(UPPER.name)), Text("a"))


async def test_a_name_is_faked_without_types(trd: LocalConnection, trd_fake: Fake) -> None:
    trd_fake["a.b.c"].returns(None)
    assert await trd.call("a.b.c", 1) is None
    trd_fake["a.b.c"].yields(1, None)
    assert [each async for each in trd.stream("a.b.c", 1)] == [1, None]


async def test_handlers_that_are_served_call_the_fakes(trd: LocalConnection, trd_fake: Fake) -> None:
    trd_fake[UPPER].returns(Text("X"))
    await trd.serve(twice)
    assert await trd.call(TWICE, Text("a")) == Text("XX")
    trd_fake[TWICE].returns(Text("faked"))
    assert await trd.call(TWICE, Text("a")) == Text("faked")


async def test_a_function_may_call_other_endpoints(trd: LocalConnection, trd_fake: Fake) -> None:
    trd_fake[UPPER].returns(Text("X"))
    trd_fake[TWICE].answers(twice)
    assert await trd.call(TWICE, Text("a")) == Text("XX")


async def test_each_connection_uses_the_fakes(trd_fake: Fake) -> None:
    trd_fake[UPPER].returns(Text("A"))
    async with connect() as one, connect() as other:
        await one.wait_for_instances(UPPER)
        assert [await each.call(UPPER, Text("a")) for each in (one, other)] == [Text("A")] * 2


def test_plain_code_uses_the_fakes(trd_fake: Fake, trd_sync: LocalSyncConnection) -> None:
    trd_fake[UPPER].raises(BUSY).returns(Text("A"))
    with pytest.raises(Overloaded):
        trd_sync.call(UPPER, Text("a"))
    assert connect_sync().call(UPPER, Text("a")) == Text("A")


@pytest.mark.virtual_time
async def test_fakes_in_virtual_time(trd: LocalConnection, trd_fake: Fake) -> None:
    async def slow(request: Text) -> Text:
        await asyncio.sleep(3600)
        return request

    trd_fake[UPPER].answers(slow)
    assert await trd.call(UPPER, Text("a")) == Text("a")


# mistakes of the test


def test_what_does_not_fit_the_contract_is_refused_at_once(trd_fake: Fake) -> None:
    for make, words in (
        (lambda: trd_fake[UPPER].returns({"text": 1}), 'trd_fake\\["t.fixture.upper"\\]'),  # type: ignore[arg-type]
        (lambda: trd_fake[UPPER].yields(Text("a")), "answers once: use returns"),
        (lambda: trd_fake[LETTERS].returns(Text("a")), "answers with items: use yields"),
        (lambda: trd_fake[LETTERS].yields(Text("a"), 2), "trd_fake"),  # type: ignore[arg-type]
        (lambda: trd_fake[UPPER].raises(KeyError), r"raises\(KeyError\(…\)\)"),  # type: ignore[arg-type]
        (lambda: trd_fake[UPPER].answers(Text("a")), "use returns"),  # type: ignore[arg-type]
        (lambda: trd_fake[UPPER].answers(items_now), "does not fit"),
        (lambda: trd_fake[Unary[int, int]("t.fixture.upper")], "is faked as"),
        (
            lambda: trd_fake[LETTERS].yields(Text("a"), raises=StreamIncomplete("", 1, "", "")),
            r"await worker\.kill\(\)",
        ),
    ):
        with pytest.raises(TypeError, match=words):
            make()


async def test_an_unexpected_call_names_the_endpoint(trd: LocalConnection, trd_fake: Fake) -> None:
    trd_fake[UPPER].returns(Text("A"))
    with pytest.raises(UnexpectedCall, match=r'"t\.fixture\.letters": .* faked endpoints: t\.fixture\.upper'):
        trd.stream(LETTERS, Text("a"))
    with pytest.raises(UnexpectedCall):
        _ = trd_fake["a.b.c"].requests
        await trd.call("a.b.c", 1)
    assert len(trd_fake.problems) == 2
    trd_fake.problems.clear()  # The end of the test would raise them.


# HTTP


def app() -> FastAPI:
    made = FastAPI(lifespan=trd_fastapi.lifespan())
    trd_fastapi.install(made)

    @made.post("/upper")
    async def _(body: Text, here: trd_fastapi.Here) -> Text:
        return await here.call(UPPER, body)

    return made


def test_a_test_client_uses_the_fakes(trd_fake: Fake) -> None:
    trd_fake[UPPER].raises(BUSY).returns(Text("A"))
    with TestClient(app()) as client:
        refused = client.post("/upper", json={"text": "a"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "3")
        assert client.post("/upper", json={"text": "b"}).json() == {"text": "A"}


def test_a_test_client_reaches_handlers(trd_sync: LocalSyncConnection) -> None:
    trd_sync.serve(UPPER, lambda request: Text(request.text.upper()))
    with TestClient(app()) as client:
        assert client.post("/upper", json={"text": "a"}).json() == {"text": "A"}

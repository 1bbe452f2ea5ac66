"""Native calls: typed values, waiting, contracts that do not fit, calls within handlers."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydantic
import pytest

import triton_distributed as trd
from tests.api.contracts import EACH, MAYBE, MEASURE, TALK, Lengths, Texts, each, maybe, measure, talk
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.runtime.worker import Serving

SETTINGS = trd.Config(discovery="memory")


@pytest.fixture
async def here() -> AsyncIterator[trd.Connection]:
    async with trd.connect(SETTINGS) as made:
        yield made


async def test_answers_have_the_declared_type(here: trd.Connection) -> None:
    await here.serve(measure)
    await here.serve(each)
    assert await here.call(MEASURE, Texts(["a", "bc"])) == Lengths([1, 2])
    assert [item async for item in here.stream(EACH, Texts(["a", "bc"]))] == [Lengths([1]), Lengths([2])]


async def test_two_way(here: trd.Connection) -> None:
    async def requests() -> AsyncIterator[Texts]:
        yield Texts(["a"])
        yield Texts(["bc", ""])

    await here.serve(talk)
    assert [item async for item in here.stream(TALK, requests())] == [Lengths([1]), Lengths([2, 0])]


async def test_none_is_a_value(here: trd.Connection) -> None:
    await here.serve(maybe)
    assert [item async for item in here.stream(MAYBE, 2)] == [0, None, 1, None]
    stream = here.stream(MAYBE, 1)
    assert [await anext(stream), await anext(stream)] == [0, None]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


class Model(pydantic.BaseModel):
    text: str = pydantic.Field(alias="theText")

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def size(self) -> int:
        return len(self.text)


async def test_models_and_arrays_arrive_as_what_they_were(here: trd.Connection) -> None:
    models = trd.Stream[Model, Model]("test.api.models")
    arrays = trd.Unary[np.ndarray[Any, Any], np.ndarray[Any, Any]]("test.api.arrays")

    async def twice(request: Model, context: trd.Context) -> AsyncIterator[Model]:
        context.checkpoint(1)
        yield request
        yield request

    async def halved(request: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return request / 2

    await here.serve(models, twice)
    await here.serve(arrays, halved)
    sent = Model(theText="abc")
    assert [item async for item in here.stream(models, sent)] == [sent, sent]
    assert [item async for item in here.stream(models, sent, resume=True)] == [sent, sent]
    answer = await here.call(arrays, np.full((64, 1024), 3.0, np.float32))
    assert answer.dtype == np.float32
    assert answer.shape == (64, 1024)
    assert float(answer[5, 5]) == 1.5


async def test_an_answer_of_another_type_is_an_error(here: trd.Connection) -> None:
    async def wrong(request: int) -> Any:
        yield "three"

    await here.serve("test.api.maybe", wrong)
    with pytest.raises(trd.TritonError, match=r"sent an item that does not fit the contract: .*int.*str"):
        await anext(here.stream(MAYBE, 1))


async def test_the_worker_checks_requests_by_the_contract(here: trd.Connection) -> None:
    untyped = trd.Unary[Texts, Any]("test.api.untyped")

    async def handler(request):
        return type(request).__name__

    await here.serve(untyped, handler)
    assert await here.call(untyped, Texts(["a"])) == "Texts"
    with pytest.raises(trd.InvalidRequest, match="texts"):
        await here.call("test.api.untyped", {"texts": 5})


async def test_a_call_waits_for_a_first_instance(here: trd.Connection) -> None:
    call = asyncio.create_task(here.call(MEASURE, Texts(["a"])))
    stream = here.stream(EACH, Texts(["a"]))
    reader = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    await here.serve(measure)
    await here.serve(each)
    assert await call == Lengths([1])
    assert await reader == Lengths([1])


async def test_a_call_waits_again_if_its_only_instance_is_gone(here: trd.Connection) -> None:
    served = await here.serve(measure)
    async with trd.connect(SETTINGS) as caller:
        assert await caller.call(MEASURE, Texts(["a"])) == Lengths([1])  # Now it has a connection to the worker.
        await served.stop()
        with pytest.raises(trd.DeadlineExceeded):
            await caller.call(MEASURE, Texts(["a"]), timeout=0.05)
        call = asyncio.create_task(caller.call(MEASURE, Texts(["ab"])))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not call.done()
        await here.serve(measure)  # The same runtime, so the instance has the same id.
        assert await call == Lengths([2])


async def test_a_waiting_call_names_itself_when_its_connection_is_closed() -> None:
    here = trd.connect(SETTINGS)
    call = asyncio.create_task(here.call(MEASURE, Texts([])))
    await asyncio.sleep(0)
    await here.close()
    with pytest.raises(trd.RuntimeClosed, match="^a call: "):
        await call


async def test_waiting_takes_no_longer_than_the_calls_time(here: trd.Connection) -> None:
    with pytest.raises(
        trd.NoInstances, match=r"no instance of endpoint .*/measure\" within 0.01 s .*start a worker that"
    ):
        await here.call(MEASURE, Texts([]), timeout=0.01)


async def test_a_call_says_if_discovery_has_not_answered() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"http://127.0.0.1:{silent.getsockname()[1]}"
        async with trd.connect(trd.Config(discovery="etcd", etcd_endpoints=place)) as here:
            with pytest.raises(trd.DeadlineExceeded, match=rf"\({place}: it has not answered yet\)"):
                await here.call(MEASURE, Texts([]), timeout=0.01)


async def test_a_call_without_a_timeout_gives_up(here: trd.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_distributed.calling.services.FIRST_INSTANCE_S", 0.01)
    with pytest.raises(trd.NoInstances, match="test/components/api/measure"):
        await here.call(MEASURE, Texts([]))


@dataclass
class Misspelt:
    text: list[str]


async def test_contracts_that_do_not_fit_fail_at_the_first_call(here: trd.Connection) -> None:
    await here.serve(measure)
    other = trd.Unary[Misspelt, Lengths]("test.api.measure")
    for _ in range(2):  # The first call does not know the instances yet, the second one does.
        with pytest.raises(trd.ContractMismatch, match=r"calls a field 'text', and the worker calls it 'texts'"):
            await here.call(other, Misspelt([]))
    stream = trd.Stream[Texts, Lengths]("test.api.measure")
    with pytest.raises(trd.ContractMismatch, match="calls it as stream, and the worker serves it as unary"):
        await anext(here.stream(stream, Texts([])))


async def test_instances_that_fit_are_called_when_others_do_not(here: trd.Connection) -> None:
    other = trd.Unary[Misspelt, Lengths]("test.api.measure")

    async def of_other(request: Misspelt) -> Lengths:
        return Lengths([-1])

    await here.serve(measure)
    async with trd.connect(SETTINGS) as second:
        await second.serve(other, of_other)
        await here.wait_for_instances(MEASURE)
        for _ in range(4):
            assert await here.call(MEASURE, Texts(["a"])) == Lengths([1])
            assert await here.call(other, Misspelt([])) == Lengths([-1])


async def test_a_retry_goes_only_to_instances_that_fit(here: trd.Connection) -> None:
    other = trd.Unary[Misspelt, Lengths]("test.api.measure")
    began = asyncio.Event()

    async def of_other(request: Misspelt) -> Lengths:
        return Lengths([-1])

    async def stays(request: Texts) -> Lengths:
        began.set()
        await asyncio.Event().wait()
        raise NotImplementedError

    def prefers_other(request: Any, instances: tuple[trd.Instance, ...], load: Any) -> trd.Instance:
        return next((each for each in instances if each.id == wrong.runtime.instance_id), instances[-1])

    async with trd.connect(SETTINGS) as first, trd.connect(SETTINGS) as wrong, trd.connect(SETTINGS) as right:
        served = await first.serve(MEASURE, stays)
        await here.wait_for_instances(MEASURE)
        # When the call begins, all instances fit.
        call = asyncio.create_task(here.call(MEASURE, Texts(["a"]), policy=prefers_other, idempotent=True))
        await began.wait()
        await wrong.serve(other, of_other)
        await right.serve(measure)
        await here.wait_for_instances(MEASURE, 3)
        await served.stop()
        assert await call == Lengths([1])


async def test_a_handler_calls_without_a_client_object(here: trd.Connection) -> None:
    outer = trd.Stream[Texts, Lengths]("test.api.outer")

    @trd.serve(outer)
    async def relay(request: Texts) -> AsyncIterator[Lengths]:
        yield await trd.call(MEASURE, request)
        async for item in trd.stream(EACH, request):
            yield item

    serving = trd.connect(SETTINGS)  # It is not entered, so only the handler knows it.
    try:
        for handler in (measure, each, relay):
            await serving.serve(handler)
        items = [item async for item in here.stream(outer, Texts(["a", "bc"]))]
        assert items == [Lengths([1, 2]), Lengths([1]), Lengths([2])]
    finally:
        await serving.close()


async def test_without_a_connection_there_is_none() -> None:
    with pytest.raises(RuntimeError, match="there is no connection here: call from a handler, or in"):
        await trd.call(MEASURE, Texts([]))


def test_connect_needs_a_loop() -> None:
    with pytest.raises(RuntimeError, match=r"connect\(\) needs a running event loop"):
        trd.connect()


@asynccontextmanager
async def endless(here: trd.Connection) -> AsyncIterator[tuple[trd.Stream[int, int], asyncio.Event, asyncio.Event]]:
    began, ended = asyncio.Event(), asyncio.Event()
    contract = trd.Stream[int, int]("test.api.endless")

    async def handler(request: int) -> AsyncIterator[int]:
        began.set()
        try:
            while True:
                yield request
        finally:
            ended.set()

    served = await here.serve(contract, handler)
    yield contract, began, ended
    await served.stop()


async def test_leaving_a_stream_cancels_its_handler(here: trd.Connection) -> None:
    async with endless(here) as (contract, _, ended):
        async with here.stream(contract, 1) as stream:
            assert await anext(stream) == 1
            under_way = stream.ended
        await ended.wait()
        assert (under_way, stream.ended) == (False, True)
        with pytest.raises(trd.StreamClosed):
            await anext(stream)


async def test_a_stream_that_is_dropped_unread_cancels_its_handler(here: trd.Connection) -> None:
    async with endless(here) as (contract, began, ended):
        stream = here.stream(contract, 1)
        await began.wait()
        del stream
        gc.collect()
        await ended.wait()


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda here: here.call(EACH, Texts([])), r"call\(\): .* is stream: use stream\(\)"),
        (lambda here: here.stream(MEASURE, Texts([])), r"stream\(\): .* is unary: use call\(\)"),
        (lambda here: here.call(MEASURE, Texts([]), timout=1), r"call\(\) got an unexpected keyword argument 'timout'"),
        (lambda here: here.serve(lambda request: 1), "is not declared: decorate it with @trd.serve"),
        (
            lambda here: here.serve(measure, max_inflight=1),
            r"@trd.serve has the options of .*: pass max_inflight= there",
        ),
        (lambda here: here.serve(MEASURE, measure, max_inflght=1), r"serve\(\) got an unexpected .*'max_inflght'"),
        (
            lambda here: here.call(MEASURE, Texts([]), hedge_after_s=1, idempotent=True, timout=1),
            r"Connection.call\(\) got an unexpected keyword argument 'timout'",
        ),
        (lambda here: here.send(MEASURE, Texts([]), annotated=False), r"unexpected keyword argument 'annotated'$"),
        (lambda here: here.serve(MEASURE, each), "does not fit .*: it makes a stream"),
        (lambda here: here.call(MEASURE, object()), "cannot travel"),
    ],
)
async def test_slips_are_type_errors(here: trd.Connection, use: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        found = use(here)
        await found


class Measures:
    @trd.serve(MEASURE)
    async def declared(self, request: Texts) -> Lengths:
        return Lengths([len(request.texts)])

    async def bare(self, request: Texts) -> Lengths:
        return Lengths([])


async def test_a_method_is_served_with_its_object(here: trd.Connection) -> None:
    serve: Any = here.serve
    for slip, name in (serve(Measures.declared), "declared"), (serve(MEASURE, Measures.bare), "bare"):
        with pytest.raises(
            TypeError, match=rf"Measures.{name} is a method without its object: .* `Measures\(…\).{name}`"
        ):
            await slip
    await here.serve(Measures().declared)
    assert await here.call(MEASURE, Texts(["a"])) == Lengths([1])


async def test_the_kind_of_a_contract_is_checked_at_each_use(here: trd.Connection) -> None:
    use: Any = here
    with pytest.raises(TimeoutError):
        await here.wait_for_instances(EACH, timeout=0)
    here.stream(EACH, Texts([])).cancel()
    here.stream(TALK, nothing()).cancel()
    for verb in (use.call(EACH, Texts([])), use.send(TALK, nothing())):
        with pytest.raises(TypeError, match=r"use stream\(\)"):
            await verb


async def nothing() -> AsyncIterator[Texts]:
    return
    yield


async def test_a_connection_that_is_closed_leaves_nothing_in_its_runtime() -> None:
    async with DistributedRuntime(config=SETTINGS) as runtime:
        for _ in range(3):
            async with trd.connect(runtime=runtime) as here:
                here.stream(EACH, Texts([])).cancel()
        listeners = runtime.candidates(EACH.name).table.listeners
        assert [each for each in listeners if "Target" in repr(each)] == []


async def test_handlers_of_a_runtime_outlive_the_connection_that_served_them() -> None:
    other = trd.Unary[Misspelt, Lengths]("test.api.measure")

    async def relay(request: Texts) -> Lengths:
        return await trd.call(MEASURE, request)

    async def of_other(request: Misspelt) -> Lengths:
        return Lengths([-1])

    async with DistributedRuntime(config=SETTINGS) as runtime, trd.connect(SETTINGS) as here:
        async with trd.connect(runtime=runtime) as first:
            await first.serve("test.api.relay", relay)
            served = await here.serve(measure)
            assert await here.call("test.api.relay", Texts(["a"])) == {"lengths": [1]}
        await served.stop()
        await here.serve(other, of_other)  # A contract that came later is compared, too.
        with pytest.raises(trd.ContractMismatch):
            await here.call("test.api.relay", Texts(["a"]))


async def test_a_contract_in_an_unknown_form_is_not_compared(here: trd.Connection) -> None:
    async with DistributedRuntime(config=SETTINGS) as runtime:
        serving = Serving(True, None, 0, None, {"form": 2, "request": 5}, None, True)
        runtime.worker.serve(MEASURE.name, measure, serving)
        assert await here.call(MEASURE, Texts(["a"])) == Lengths([1])


async def test_an_endpoint_can_be_served_again_after_a_cancelled_serve(here: trd.Connection) -> None:
    serving = asyncio.create_task(here.serve(measure))
    await asyncio.sleep(0)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    await here.serve(measure)


async def test_a_runtime_of_the_program_can_be_used() -> None:
    async with DistributedRuntime(config=SETTINGS) as runtime:
        async with trd.connect(runtime=runtime) as here:
            await here.serve(measure)
        client = await runtime.endpoint("test.api.measure").client()
        assert await client.call({"texts": ["a"]}) == {"lengths": [1]}


async def test_served_says_when_it_ended(here: trd.Connection) -> None:
    served = await here.serve(measure)
    assert str(served.name) == "test.api.measure"
    await served.pause()
    with pytest.raises((trd.NoInstances, trd.Paused)):
        await (await here.runtime.endpoint("test.api.measure").client()).call({"texts": []})
    await served.resume()
    assert await here.call(MEASURE, Texts(["a"])) == Lengths([1])
    await served.stop()
    await served.until_drained()
    assert "stopped" in repr(served)
    again = await here.serve(measure)
    ended = asyncio.create_task(again.until_drained())
    await here.close()
    await ended


async def test_equal_contracts_share_a_target(here: trd.Connection) -> None:
    await here.serve(measure)
    for _ in range(3):
        assert await here.call(trd.Unary[Texts, Lengths]("test.api.measure"), Texts(["a"])) == Lengths([1])
    assert len(here.runtime.clients) == 1


async def test_what_was_sent_runs_to_its_end(here: trd.Connection) -> None:
    ended = asyncio.Event()
    contract = trd.Stream[int, int]("test.api.sent")

    async def handler(request: int) -> AsyncIterator[int]:
        for number in range(request):
            yield number
        ended.set()

    await here.serve(contract, handler, max_inflight=1)
    await here.send(contract, 1000)
    await ended.wait()


async def test_what_a_cancelled_handler_has_handed_over_runs_on(here: trd.Connection) -> None:
    free, ended, handed_over = asyncio.Event(), asyncio.Event(), asyncio.Event()
    inner, outer = trd.Unary[int, int]("test.api.inner"), trd.Unary[int, int]("test.api.outer")

    async def work(request: int) -> int:
        await free.wait()
        ended.set()
        return request

    async def sender(request: int) -> int:
        await trd.send(inner, request)
        handed_over.set()
        await asyncio.Event().wait()
        return request

    await here.serve(inner, work)
    await here.serve(outer, sender)
    call = asyncio.create_task(here.call(outer, 1))
    await handed_over.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    free.set()
    await ended.wait()


@asynccontextmanager
async def job_of_another_worker() -> AsyncIterator[tuple[trd.Unary[int, int], asyncio.Event, list[str]]]:
    contract = trd.Unary[int, int]("test.api.job")
    free, ends = asyncio.Event(), list[str]()

    async def job(request: int, context: trd.Context) -> int:
        try:
            await free.wait()
            ends.append(f"done, {context.id()}, {dict(context.travelling)}, {context.remaining_s()}")
            return request
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    async with trd.connect(SETTINGS) as worker:
        await worker.serve(contract, job)
        yield contract, free, ends


async def test_closing_waits_for_what_was_sent() -> None:
    async with job_of_another_worker() as (contract, free, ends):
        async with trd.connect(SETTINGS) as here:
            await here.send(contract, 1)
            closing = asyncio.create_task(here.close())
            for _ in range(100):  # Otherwise it would close in a few turns.
                await asyncio.sleep(0)
            assert not closing.done()
            free.set()
        await closing
        assert ends[0].startswith("done")


async def test_what_was_sent_is_cut_after_the_time_of_the_drain(caplog: pytest.LogCaptureFixture) -> None:
    async with job_of_another_worker() as (contract, _, ends):
        async with trd.connect(trd.Config(discovery="memory", drain_timeout_s=0.01)) as here:
            await here.send(contract, 1)
        assert "1 request(s) of send() still run" in caplog.text
        while not ends:
            await asyncio.sleep(0)
        assert ends == ["cancelled"]


async def test_what_a_handler_sent_outlives_its_request(here: trd.Connection) -> None:
    sent = asyncio.Event()

    async def outer(request: int, context: trd.Context) -> int:
        context.travel(user="u")
        await trd.send(contract, request)
        sent.set()
        await asyncio.Event().wait()
        return request

    async with job_of_another_worker() as (contract, free, ends):
        await here.serve("test.api.outer", outer)
        call = asyncio.create_task(here.call("test.api.outer", 1, timeout=60, context=trd.Context("abc")))
        await sent.wait()
        call.cancel()
        await asyncio.wait([call])
        while any(each.inflight for each in here.runtime.stats().values()):
            await asyncio.sleep(0)
        free.set()
        while not ends:
            await asyncio.sleep(0)
        assert ends == ["done, abc, {'user': 'u'}, None"]


async def test_what_cannot_be_handed_over_raises(here: trd.Connection) -> None:
    free = asyncio.Event()
    contract = trd.Unary[int, int]("test.api.full")

    async def handler(request: int) -> int:
        await free.wait()
        return request

    await here.serve(contract, handler, max_inflight=1)
    await here.send(contract, 1)
    with pytest.raises(trd.Overloaded):
        await here.send(contract, 2)
    with pytest.raises(TypeError, match=r"send\(\): .* is bidirectional: use stream\(\)"):
        await here.send(TALK, talk)  # type: ignore[arg-type]
    free.set()


async def test_a_refusal_raises_before_the_first_item(here: trd.Connection) -> None:
    async with endless(here) as (contract, _, _):
        stream = here.stream(contract, 1)
        await stream.accepted()
        assert await anext(stream) == 1
        with pytest.raises(trd.InvalidRequest):
            await here.stream("test.api.endless", "one").accepted()


async def test_waiting_for_instances_names_what_is_missing(here: trd.Connection) -> None:
    await here.serve(measure)
    await here.wait_for_instances(MEASURE, 1, timeout=5)
    with pytest.raises(TimeoutError, match=r"test/components/api/measure.*1"):
        await here.wait_for_instances(MEASURE, 2, timeout=0.01)
    (instance,) = await here.instances(MEASURE)
    assert instance.id == here.runtime.instance_id


@dataclass
class English:
    texts: list[str]
    language: str = "en"


async def test_a_field_that_the_other_side_ignores_is_logged_once(
    here: trd.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    await here.serve(measure)
    newer = trd.Unary[English, Lengths]("test.api.measure")
    for _ in range(3):
        assert await here.call(newer, English(["a"])) == Lengths([1])
    words = "test.api.measure: request.language: this process sends it, and the worker ignores it"
    assert [each.getMessage() for each in caplog.records].count(words) == 1


async def test_an_answer_of_another_type_names_the_handler(here: trd.Connection) -> None:
    async def wrong(request: Texts) -> Any:
        return 1.5

    await here.serve(MEASURE, wrong)
    with pytest.raises(TypeError, match=r"handler .*wrong answered with float, and its contract has Lengths"):
        await here.call(MEASURE, Texts([]))

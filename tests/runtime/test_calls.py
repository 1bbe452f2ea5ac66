"""Calls: they start at once, can be awaited, iterated over or left alone, and are one call with several policies."""

from __future__ import annotations

import asyncio
import gc
import resource
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, patiently, turns, until
from triton_distributed.errors import InstanceNotFound, NoInstances, NotUnary, RuntimeClosed, TritonError
from triton_distributed.names import EndpointName, Instance
from triton_distributed.routing.load import LoadBook
from triton_distributed.runtime import Annotated, Client, DistributedRuntime, ResponseStream


async def count(request: int) -> AsyncIterator[int]:
    for i in range(request):
        yield i


async def echo(request: Any) -> Any:
    return request


# --- starting at once ------------------------------------------------------------------------------------------------


@pytest.mark.any_loop
async def test_a_call_that_nobody_awaits_or_keeps_runs_to_its_end(cluster: Cluster) -> None:
    ended = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[str]:
        for _ in range(200):
            yield "x" * 10_000  # far more than any window: somebody has to drop it
        ended.set()

    client = await cluster.connect(handler)
    client.generate(1)
    await patiently(ended.wait())
    await until(lambda: client.stats.inflight == 0)
    assert client.stats.outcomes()["ok"] == 1


async def test_a_call_that_is_awaited_and_not_read_runs_to_its_end(cluster: Cluster) -> None:
    ended = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100_000
        ended.set()

    client = await cluster.connect(handler)
    await client.generate(1)
    await patiently(ended.wait())


async def test_a_first_call_that_nobody_keeps_is_sent_although_no_connection_exists(unix: Cluster) -> None:
    seen = asyncio.Event()

    async def handler(request: Any) -> None:
        seen.set()

    client = await unix.connect(handler)
    client.generate("large" * 100_000)
    await patiently(seen.wait())


async def test_a_stream_obtained_first_is_read_much_later(cluster: Cluster) -> None:
    client = await cluster.connect(count)
    early = client.generate(50, annotated=False)
    later = await client.generate(5000, annotated=False)
    for _ in range(20):
        await patiently(drained(client.generate(10)))
    assert await patiently(drained(later)) == list(range(5000))
    assert await patiently(drained(early)) == list(range(50))


async def test_gather_of_calls_gives_their_streams_in_order(cluster: Cluster) -> None:
    client = await cluster.connect(count)
    streams = await asyncio.gather(*[client.generate(n, annotated=False) for n in range(20)])
    for n, stream in enumerate(streams):
        assert await patiently(drained(stream)) == list(range(n))


async def test_a_bad_payload_raises_in_the_call_itself(cluster: Cluster) -> None:
    client = await cluster.connect(echo)
    with pytest.raises(TypeError, match=r"request\[\"a\"\]\[1\]"):
        client.generate({"a": [1, object()]})
    assert client.stats.inflight == 0


async def test_a_stream_behaves_as_a_future_where_programs_expect_one(cluster: Cluster) -> None:
    client = await cluster.connect(count)
    stream = client.generate(3)
    assert await patiently(asyncio.wait_for(stream, 10)) is stream
    assert stream.done()
    assert stream.result() is stream
    assert stream.exception() is None
    told = asyncio.Event()
    stream.add_done_callback(lambda which: told.set())
    await patiently(told.wait())
    assert "ResponseStream" in repr(stream)
    await patiently(drained(stream))


async def test_asyncio_wait_takes_calls(cluster: Cluster) -> None:
    client = await cluster.connect(count)
    calls = [client.generate(2, annotated=False), client.generate(3, annotated=False)]
    done, pending = await patiently(asyncio.wait(calls))  # type: ignore[type-var]
    assert not pending
    assert sorted([len(await patiently(drained(each))) for each in done]) == [2, 3]


async def test_awaiting_before_the_request_is_sent_waits_for_that(unix: Cluster) -> None:
    client = await unix.connect(count)
    stream = client.generate(1)
    assert not stream.done()  # there is no session yet
    with pytest.raises(asyncio.InvalidStateError):
        stream.result()
    assert await patiently(_awaited(stream)) is stream
    assert stream.instance_id in client.instance_ids()
    await patiently(drained(stream))


async def _awaited(stream: ResponseStream) -> ResponseStream:
    return await stream


# --- items -----------------------------------------------------------------------------------------------------------


async def test_items_are_annotated_unless_asked_otherwise(cluster: Cluster) -> None:
    client = await cluster.connect(count)
    for items in (
        await patiently(drained(client.generate(2))),
        await patiently(drained(client.generate(2, True))),
        await patiently(drained(client.generate(2, annotated=True))),
    ):
        assert all(isinstance(each, Annotated) for each in items)
        assert [each.data() for each in items] == [0, 1]
    for option in (False, None):
        assert await patiently(drained(client.generate(2, annotated=option))) == [0, 1]


async def test_none_is_an_item_without_data(cluster: Cluster) -> None:
    async def handler(request: Any) -> AsyncIterator[Any]:
        yield 1
        yield None
        yield 0
        yield ""
        yield None

    client = await cluster.connect(handler)
    assert [each.data() for each in await patiently(drained(client.generate(1)))] == [1, None, 0, "", None]
    assert await patiently(drained(client.generate(1, annotated=False))) == [1, 0, ""]


async def test_a_handler_may_annotate(cluster: Cluster) -> None:
    async def handler(request: Any) -> AsyncIterator[Any]:
        yield "plain"
        yield Annotated("data", "event", ["one", "two"], "7")
        yield Annotated(None, "error", ["what went wrong"])
        yield "after"

    client = await cluster.connect(handler)
    plain, full, error, after = await patiently(drained(client.generate(1)))
    assert (plain.data(), plain.event(), plain.comments(), plain.id()) == ("plain", None, [], None)
    assert (full.data(), full.event(), full.comments(), full.id()) == ("data", "event", ["one", "two"], "7")
    assert (error.data(), error.is_error(), after.is_error(), after.data()) == (None, True, False, "after")
    assert await patiently(drained(client.generate(1, annotated=False))) == ["plain", "data", "after"]


async def test_anext_and_async_for_read_the_same_items(cluster: Cluster) -> None:
    client = await cluster.connect(count)
    stream = client.generate(5, annotated=False)
    assert await patiently(anext(stream)) == 0
    assert await patiently(anext(stream)) == 1
    assert await patiently(drained(stream)) == [2, 3, 4]
    with pytest.raises(StopAsyncIteration):
        await patiently(anext(stream))


# --- unary -----------------------------------------------------------------------------------------------------------


@pytest.mark.any_loop
@pytest.mark.parametrize("connected", [True, False])
async def test_one_task_reads_at_a_time_and_another_does_not_disturb_it(connected: bool, cluster: Cluster) -> None:
    go = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[int]:
        for item in range(6):
            await go.wait()
            yield item

    client = await cluster.connect(handler)
    if connected:
        go.set()
        await patiently(drained(client.generate(1)))
        go.clear()
    stream = client.generate(1, annotated=False)
    readers = [asyncio.ensure_future(drained(stream)) for _ in range(3)]
    readers.append(asyncio.ensure_future(anext(stream)))
    await patiently(asyncio.wait(readers, return_when=asyncio.FIRST_COMPLETED))
    await until(lambda: sum(each.done() for each in readers) == 3)
    go.set()
    items = []
    for each in readers:
        try:
            items.append(await patiently(each))
        except RuntimeError as error:
            assert "another task is reading this stream" in str(error)
    assert items in ([[0, 1, 2, 3, 4, 5]], [0])  # of whoever was first


async def test_call_returns_the_single_value(cluster: Cluster) -> None:
    client = await cluster.connect(echo)
    values: tuple[Any, ...] = (None, 0, "", [], {"a": None})
    for value in values:
        assert await patiently(client.call(value)) == value


@pytest.mark.parametrize("items", [0, 2, 1000])
async def test_call_wants_exactly_one_item(items: int, cluster: Cluster) -> None:
    client = await cluster.connect(count)
    with pytest.raises(NotUnary, match="no item" if items == 0 else "more than one item") as caught:
        await patiently(client.call(items))
    assert isinstance(caught.value, ValueError)
    await until(lambda: client.stats.inflight == 0)


async def test_call_with_more_than_one_item_cancels_the_handler(cluster: Cluster) -> None:
    ended = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
            await asyncio.Event().wait()
        finally:
            ended.set()

    client = await cluster.connect(handler)
    with pytest.raises(NotUnary):
        await patiently(client.call(1))
    await patiently(ended.wait())


# --- who is called ---------------------------------------------------------------------------------------------------


async def three(cluster: Cluster) -> list[int]:
    ids = []
    for _ in range(3):
        runtime = cluster.runtime()

        async def handler(request: Any, me: int = runtime.instance_id) -> int:
            return me

        await cluster.serve(runtime, handler)
        ids.append(runtime.instance_id)
    return ids


async def test_round_robin_and_generate_spread_evenly(cluster: Cluster) -> None:
    ids = await three(cluster)
    client = await cluster.client()
    for method in (client.generate, client.round_robin):
        answers = [await patiently(drained(method(1, annotated=False))) for _ in range(30)]
        assert Counter(each[0] for each in answers) == dict.fromkeys(ids, 10)


async def test_random_reaches_everybody(cluster: Cluster) -> None:
    ids = await three(cluster)
    client = await cluster.client()
    found = set()
    for _ in range(200):
        found.update(await patiently(drained(client.random(1, annotated=False))))
    assert found == set(ids)


async def test_direct_reaches_the_one_that_is_named(cluster: Cluster) -> None:
    ids = await three(cluster)
    client = await cluster.client()
    for each in ids * 2:
        assert await patiently(drained(client.direct(1, each, annotated=False))) == [each]
        assert await patiently(drained(client.direct(1, int(str(each)), annotated=None))) == [each]
    assert sorted(client.endpoint_ids()) == sorted(client.instance_ids()) == sorted(ids)


async def test_direct_with_an_unknown_id_names_it(cluster: Cluster) -> None:
    ids = await three(cluster)
    client = await cluster.client()
    with pytest.raises(InstanceNotFound, match='endpoint_id=12345 not found for endpoint "t/components/c/e"') as caught:
        await patiently(_awaited(client.direct(1, 12345)))
    assert str(ids[0]) in str(caught.value)
    with pytest.raises(InstanceNotFound):
        await patiently(drained(client.direct(1, 12345)))


async def test_without_an_instance_the_text_names_the_endpoint(cluster: Cluster) -> None:
    client = await cluster.caller.endpoint("t.c.nobody").client()
    for attempt in (lambda: _awaited(client.generate(1)), lambda: drained(client.generate(1)), lambda: client.call(1)):
        with pytest.raises(NoInstances, match='no endpoints found for endpoint "t/components/c/nobody"'):
            await patiently(attempt())
    client.generate(1)  # whoever does not look is told nothing, and leaves nothing behind
    await turns()
    assert client.stats.inflight == 0


@pytest.mark.parametrize("name", ["round_robin", "random", "least_loaded", "p2c"])
async def test_policies_by_name(name: str, cluster: Cluster) -> None:
    ids = await three(cluster)
    client = await cluster.client(policy=name)
    for _ in range(10):
        assert await patiently(client.call(1)) in ids


async def test_a_policy_of_the_user(cluster: Cluster) -> None:
    ids = await three(cluster)
    asked = []

    def policy(request: Any, instances: tuple[Instance, ...], load: LoadBook) -> Instance:
        asked.append((request, len(instances), load.inflight(instances[0].id)))
        return max(instances, key=lambda each: each.id)

    client = await cluster.client(policy=policy)
    assert {await patiently(client.call(n)) for n in range(5)} == {max(ids)}
    assert asked == [(n, 3, 0) for n in range(5)]


def _raises(request: Any, instances: Any, load: Any) -> Any:
    raise KeyError("lost")


def _returns_none(request: Any, instances: Any, load: Any) -> Any:
    return None


def _returns_an_id(request: Any, instances: Any, load: Any) -> Any:
    return instances[0].id


def _returns_a_stranger(request: Any, instances: Any, load: Any) -> Any:
    return Instance(EndpointName("t", "c", "e"), 99, ("memory://nowhere",))


@pytest.mark.parametrize("policy", [_raises, _returns_none, _returns_an_id, _returns_a_stranger])
@pytest.mark.parametrize("connected", [False, True])
async def test_a_policy_that_fails_is_named_in_the_callers_error(
    policy: Any, connected: bool, cluster: Cluster
) -> None:
    good = await cluster.connect(echo)
    if connected:
        await patiently(good.call(1))
    client = await cluster.client(policy=policy)
    for attempt in (lambda: client.call(1), lambda: _awaited(client.generate(1)), lambda: drained(client.generate(1))):
        with pytest.raises((ValueError, TypeError), match=policy.__name__):
            await patiently(attempt())
    assert client.stats.inflight == 0
    assert await patiently(good.call(1)) == 1


async def test_a_policy_that_is_none_is_refused_by_the_client(cluster: Cluster) -> None:
    await cluster.worker(echo)
    for wrong in ("roundrobin", 5, object()):
        with pytest.raises(ValueError, match="policy"):
            await cluster.client(policy=wrong)

    async def waits(request: Any, instances: Any, load: Any) -> Any:
        return instances[0]

    with pytest.raises(ValueError, match="plain function"):
        await cluster.client(policy=waits)


# --- waiting for instances, closing ----------------------------------------------------------------------------------


async def test_waiting_for_instances_is_a_real_task(cluster: Cluster) -> None:
    client = await cluster.caller.endpoint("t.c.e").client()
    waiting, other = client.wait_for_endpoints(), client.wait_for_instances()
    await turns()
    assert not waiting.done()
    worker = await cluster.worker(echo)
    await patiently(waiting)
    await patiently(other)
    assert waiting.done()
    assert client.endpoint_ids() == [worker.instance_id]


async def test_an_instance_that_leaves_is_called_no_more(cluster: Cluster) -> None:
    one = await cluster.worker(echo)
    other = await cluster.worker(echo)
    client = await cluster.client()
    await one.close()
    assert client.instance_ids() == [other.instance_id]
    for n in range(6):
        assert await patiently(client.call(n)) == n
    await other.close()
    with pytest.raises(NoInstances):
        await patiently(client.call(1))


async def test_a_client_of_a_closed_runtime_says_so(cluster: Cluster) -> None:
    client = await cluster.connect(echo)
    await cluster.caller.close()
    with pytest.raises(RuntimeClosed, match="shut down"):
        client.generate(1)
    with pytest.raises(RuntimeClosed):
        await cluster.caller.endpoint("t.c.e").client()
    with pytest.raises(RuntimeClosed):
        cluster.caller.endpoint("t.c.e").serve_endpoint(echo)


async def test_closing_ends_calls_under_way_with_an_error(cluster: Cluster) -> None:
    async def handler(request: Any) -> AsyncIterator[int]:
        yield 1
        await asyncio.Event().wait()

    client = await cluster.connect(handler)
    stream = client.generate(1)
    reading = aiter(stream)
    await patiently(anext(reading))
    await cluster.caller.close()
    with pytest.raises((TritonError, ConnectionError), match="shut down"):
        await patiently(anext(reading))


async def test_closing_ends_a_call_that_is_still_being_sent_with_an_error(cluster: Cluster) -> None:
    server = await asyncio.start_server(_says_nothing, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    caller = cluster.caller
    await caller.discovery.register(Instance(EndpointName("t", "c", "e"), 7, (f"tcp://127.0.0.1:{port}",)))
    client = await cluster.client()
    stream, call = client.generate(1), asyncio.create_task(client.call(1))
    await turns()
    await caller.close()
    with pytest.raises(TritonError):
        await patiently(drained(stream))
    with pytest.raises(TritonError) as caught:
        await patiently(call)
    assert not isinstance(caught.value, NotUnary)
    server.close()
    await server.wait_closed()


async def _says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    while await reader.read(1000):
        pass
    writer.close()


async def test_waiting_for_instances_ends_with_an_error_when_the_runtime_is_closed(cluster: Cluster) -> None:
    client = await cluster.caller.endpoint("t.c.nobody").client()

    async def waits() -> str:
        try:
            await client.wait_for_instances()
        except BaseException as error:
            return type(error).__name__
        return "no error"

    waiting = asyncio.create_task(waits())
    await turns()
    await cluster.caller.close()
    assert await patiently(waiting) == "RuntimeClosed"


@pytest.mark.any_loop
async def test_two_runtimes_in_one_process_serve_and_call_each_other(cluster: Cluster) -> None:
    one, other = cluster.runtime(), cluster.runtime()

    async def ping(request: int) -> int:
        if request == 0:
            return 0
        client = await one.endpoint("t.c.pong").client()
        return 1 + int(await client.call(request - 1))

    async def pong(request: int) -> int:
        if request == 0:
            return 0
        client = await other.endpoint("t.c.ping").client()
        return 1 + int(await client.call(request - 1))

    await cluster.serve(one, ping, "t.c.ping")
    await cluster.serve(other, pong, "t.c.pong")
    assert await patiently((await cluster.client("t.c.ping")).call(10)) == 10
    assert isinstance(one, DistributedRuntime)
    assert one.instance_id != other.instance_id


# --- nothing is left -------------------------------------------------------------------------------------------------


@pytest.mark.any_loop
async def test_many_calls_leave_nothing_behind(cluster: Cluster) -> None:
    worker = await cluster.worker(count)
    client = await cluster.client()

    async def some(calls: int) -> None:
        for n in range(calls):
            if n % 4 == 0:
                async for item in client.generate(3):
                    if item.data() == 1:
                        break
            elif n % 4 == 1:
                await client.call(1)
            else:
                await drained(client.generate(n % 5, annotated=False))

    await some(100)
    await until(lambda: client.stats.inflight == 0)
    tasks = asyncio.all_tasks()
    gc.collect()
    objects = len(gc.get_objects())
    gc.disable()
    try:
        await patiently(asyncio.gather(*[some(200) for _ in range(10)]))
        await until(lambda: client.stats.inflight == 0 and worker.stats()["t/components/c/e"].inflight == 0)
        await turns()
        assert gc.collect() < 100  # of 2,000 calls: what pytest and asyncio themselves leave, nothing a call
    finally:
        gc.enable()
    assert asyncio.all_tasks() == tasks
    assert len(client.load) == 0
    assert len(gc.get_objects()) - objects < 200
    session = client.pool.get(client.candidates.instances[0].addresses)
    assert session is not None
    assert not session.streams
    assert sum(client.stats.ended) == 2100


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell its memory there")
async def test_memory_does_not_grow_with_ten_thousand_calls(cluster: Cluster) -> None:
    client = await cluster.connect(count)

    async def some(calls: int) -> None:
        await patiently(asyncio.gather(*[_calls(client, calls // 50) for _ in range(50)]))
        gc.collect()

    await some(5000)  # allocators and caches have what they need
    before = _resident_bytes()
    await some(10_000)
    assert _resident_bytes() - before < 4 * 2**20  # 400 bytes a call would be seen


async def _calls(client: Client, calls: int) -> None:
    for n in range(calls):
        await drained(client.generate(n % 5))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_calls_that_fail_leave_no_cycle(cluster: Cluster) -> None:
    async def handler(request: Any) -> AsyncIterator[int]:
        yield 1
        raise ValueError("no")

    client = await cluster.connect(handler)

    async def some(calls: int) -> None:
        for _ in range(calls):
            with pytest.raises(ValueError, match="no"):
                async for _ in client.generate(1):
                    pass

    await some(20)
    gc.collect()
    gc.disable()
    try:
        await patiently(some(200))
        await turns()
        assert gc.collect() < 200  # less than one object a call
    finally:
        gc.enable()


async def test_who_waits_in_vain_is_told_where(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton_distributed.calling.candidates.SILENCE_S", 0.01)
    client = await cluster.caller.endpoint("t.c.nobody").client()
    waiting = client.wait_for_instances()
    await until(lambda: "no instance yet" in caplog.text)
    assert '"t.c.nobody": no instance yet' in caplog.text
    assert cluster.caller.discovery.where in caplog.text
    waiting.cancel()

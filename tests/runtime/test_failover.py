"""Workers that die, refuse or are not there: what is retried, what is told."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, into, patiently, turns, until
from tests.runtime.fakes import (
    NAME,
    DropsTheFirst,
    FakeWorker,
    accepts_then_drops,
    answers_then_drops,
    drops_the_connection,
)
from tests.runtime.programs import program
from tests.timing import MS
from triton_distributed.config import Config
from triton_distributed.errors import ConnectionFailed, NoInstances, NotUnary, StreamIncomplete
from triton_distributed.names import Instance
from triton_distributed.runtime import Client, DistributedRuntime
from triton_distributed.testing import FaultProxy

DEAD = "tcp://127.0.0.1:1"


async def echo(request: Any) -> Any:
    return request


async def two_then_wait(request: Any) -> AsyncIterator[int]:
    yield 1
    yield 2
    await asyncio.Event().wait()


# --- connections that break ------------------------------------------------------------------------------------------


@pytest.mark.any_loop
async def test_a_request_that_no_handler_began_goes_to_another_instance(cluster: Cluster) -> None:
    fake = await FakeWorker(drops_the_connection).start(5)
    await cluster.worker(echo)
    client = await cluster.client(policy=lambda request, instances, load: min(instances, key=lambda each: each.id))
    await until(lambda: len(client.instance_ids()) == 2)
    assert await patiently(client.call("first")) == "first"
    assert fake.requests == 1
    for n in range(5):  # it is out of rotation now, or is tried and left again
        assert await patiently(client.call(n)) == n
        assert await patiently(drained(client.generate(n, annotated=False))) == [n]
    await fake.close()


@pytest.mark.parametrize("how", ["call", "generate", "direct"])
async def test_a_lost_connection_does_not_rule_out_its_worker_where_no_other_is_left(
    cluster: Cluster, how: str
) -> None:
    fake = await FakeWorker(DropsTheFirst()).start(5)
    client = await cluster.client()
    if how == "call":
        assert await patiently(client.call("once more")) == 1
    else:
        stream = client.generate(1, False) if how == "generate" else client.direct(1, 5, False)
        assert await patiently(drained(stream)) == [1]
    assert fake.requests == 2
    await fake.close()


async def test_who_loses_its_connection_twice_is_left_alone(cluster: Cluster) -> None:
    fake = await FakeWorker(DropsTheFirst(2)).start(5)
    client = await cluster.client()
    with pytest.raises(ConnectionFailed, match="memory://fake-5"):
        await patiently(client.call(1))
    assert fake.requests == 2
    assert await patiently(client.call(1)) == 1
    await fake.close()


async def test_without_retries_a_lost_connection_is_told() -> None:
    cluster = Cluster(retries=0)
    fake = await FakeWorker(DropsTheFirst()).start(5)
    client = await cluster.client()
    with pytest.raises(ConnectionFailed):
        await patiently(client.call(1))
    assert fake.requests == 1
    await fake.close()
    await cluster.close()


async def test_a_request_that_a_handler_began_is_not_sent_again(cluster: Cluster) -> None:
    fakes = [await FakeWorker(accepts_then_drops).start(number) for number in (5, 6)]
    client = await cluster.client()
    with pytest.raises(StreamIncomplete, match="had begun") as caught:
        await patiently(client.call(1))
    assert sum(each.requests for each in fakes) == 1
    assert caught.value.instance_id in (5, 6)
    assert caught.value.items == 0
    for each in fakes:
        await each.close()


async def test_an_idempotent_request_is_sent_again_before_its_first_item(cluster: Cluster) -> None:
    fake = await FakeWorker(accepts_then_drops).start(5)
    await cluster.worker(echo)
    client = await cluster.client(policy=lambda request, instances, load: min(instances, key=lambda each: each.id))
    assert await patiently(client.call("again", idempotent=True)) == "again"
    assert fake.requests == 1
    await fake.close()


async def test_an_idempotent_request_is_not_sent_again_after_its_first_item(cluster: Cluster) -> None:
    fake = await FakeWorker(answers_then_drops).start(5)
    await cluster.worker(echo)
    client = await cluster.client(policy=lambda request, instances, load: min(instances, key=lambda each: each.id))
    items: list[Any] = []
    with pytest.raises(StreamIncomplete) as caught:
        await into(items, client.generate("again", annotated=False, idempotent=True))
    assert (items, caught.value.items) == ([1], 1)
    await fake.close()


async def first_named(cluster: Cluster) -> Client:
    """A client that calls the instance of the lowest id first: a fake one."""
    client = await cluster.client(policy=lambda request, instances, load: min(instances, key=lambda each: each.id))
    await until(lambda: len(client.instance_ids()) == 2)
    return client


@pytest.mark.any_loop
@pytest.mark.parametrize("hedge_after_s", [None, 60.0])
async def test_half_an_answer_is_nothing_to_who_wants_the_whole(cluster: Cluster, hedge_after_s: float | None) -> None:
    """`call` gives nothing before the end: what a lost instance had said neither keeps the request nor counts."""
    fake = await FakeWorker(answers_then_drops).start(5)
    await cluster.worker(echo)
    client = await first_named(cluster)
    assert await patiently(client.call("again", idempotent=True, hedge_after_s=hedge_after_s)) == "again"
    assert fake.requests == 1
    with pytest.raises(StreamIncomplete) as caught:
        while True:  # as soon as it is back in rotation
            await patiently(client.call("once"))
    assert caught.value.items == 0
    await fake.close()


async def test_what_a_lost_instance_had_answered_does_not_count(cluster: Cluster) -> None:
    async def nothing(request: Any) -> AsyncIterator[Any]:
        return
        yield

    fake = await FakeWorker(answers_then_drops).start(5)
    await cluster.worker(nothing)
    client = await first_named(cluster)
    with pytest.raises(NotUnary, match="no item"):
        await patiently(client.call(1, idempotent=True))
    assert fake.requests == 1
    await fake.close()


async def test_an_idempotent_call_that_every_instance_lost_says_that_handlers_had_begun(cluster: Cluster) -> None:
    fakes = [await FakeWorker(accepts_then_drops).start(number) for number in range(1, 7)]
    client = await cluster.client()
    with pytest.raises(StreamIncomplete, match="had begun"):
        await patiently(client.call(1, idempotent=True))
    assert sum(each.requests for each in fakes) == 1 + cluster.caller.config.retries
    for each in fakes:
        await each.close()


async def test_half_an_answer_is_not_told_as_an_item_that_the_caller_has(cluster: Cluster) -> None:
    fake = await FakeWorker(answers_then_drops).start(5)
    client = await cluster.client()
    with pytest.raises(StreamIncomplete, match="had begun") as caught:
        await patiently(client.call(1))
    assert caught.value.items == 0
    await fake.close()


async def test_retries_are_bounded(cluster: Cluster) -> None:
    fakes = [await FakeWorker(drops_the_connection).start(number) for number in range(1, 10)]
    client = await cluster.client()
    with pytest.raises(ConnectionFailed, match="memory://fake-"):
        await patiently(client.call(1))
    assert sum(each.requests for each in fakes) == 1 + cluster.caller.config.retries
    for each in fakes:
        await each.close()


async def test_direct_goes_nowhere_else(cluster: Cluster) -> None:
    fake = await FakeWorker(drops_the_connection).start(5)
    await cluster.worker(echo)
    client = await cluster.client()
    with pytest.raises(ConnectionFailed, match="memory://fake-5"):
        await patiently(drained(client.direct(1, 5)))
    await fake.close()


async def test_an_endpoint_that_left_the_worker_is_tried_elsewhere(cluster: Cluster) -> None:
    """The record is stale: the worker is there and does not serve that endpoint any more."""
    stale = await cluster.worker(echo, "t.c.other")
    address = (await cluster.client("t.c.other")).candidates.instances[0].addresses
    await stale.discovery.register(Instance(NAME, stale.instance_id, address))
    alone = await cluster.caller.endpoint("t.c.e").client()
    with pytest.raises(ConnectionFailed, match="does not serve that endpoint"):
        await patiently(alone.call(1))
    worker = await cluster.worker(echo)
    client = await cluster.client(
        policy=lambda request, instances, load: min(instances, key=lambda each: each.id == worker.instance_id)
    )
    assert await patiently(client.call(1)) == 1


async def test_items_that_arrived_are_kept_and_counted(cluster: Cluster) -> None:
    fake = await FakeWorker(answers_then_drops).start(5)
    client = await cluster.client()
    stream = client.generate(1, annotated=False)
    await until(lambda: not len(client.load) and client.stats.ended[6])
    items: list[Any] = []
    with pytest.raises(StreamIncomplete) as caught:  # nobody had read yet when the connection broke
        await into(items, stream)
    assert items == [1]
    assert caught.value.items == 1
    assert "after 1 item(s)" in str(caught.value)
    await fake.close()


# --- TCP, which loses what is under way when it is reset -------------------------------------------------------------


@contextlib.asynccontextmanager
async def two_workers(cluster: Cluster, handler: Any) -> AsyncIterator[tuple[FaultProxy, Client]]:
    """A client that calls a worker behind a proxy first; another one is there too."""
    addresses = []
    for _ in range(2):
        worker = cluster.runtime(
            request_plane="direct", discovery="static", listen="tcp://127.0.0.1:0", static=f"t.c.e={DEAD}"
        )
        serving = worker.endpoint("t.c.e").serve_endpoint(handler)
        while not (endpoints := worker.statistics().endpoints):
            assert not serving.done()
            await asyncio.sleep(0)
        addresses.append(endpoints[0].addresses[0])
    async with FaultProxy(addresses[0]) as proxy:

        def choose(request: Any, instances: Any, load: Any) -> Any:
            return next((each for each in instances if each.addresses == (proxy.address,)), instances[0])

        caller = cluster.runtime(discovery="static", static=f"t.c.e={proxy.address};t.c.e={addresses[1]}")
        yield proxy, await caller.endpoint("t.c.e").client(policy=choose)
        await caller.close()


@pytest.mark.any_loop
@pytest.mark.parametrize("idempotent", [False, True])
async def test_a_request_whose_acceptance_the_network_lost_is_not_sent_again(
    idempotent: bool, cluster: Cluster
) -> None:
    begun: list[Any] = []

    async def handler(request: Any) -> Any:
        begun.append(request)
        if request == "order" and len(begun) == 1:
            await asyncio.Event().wait()
        return request

    async with two_workers(cluster, handler) as (proxy, client):
        await patiently(client.call("connected"))
        begun.clear()
        proxy.down.delay_s = 1000.0
        calling = asyncio.ensure_future(client.call("order", idempotent=idempotent))
        await until(lambda: begun)
        proxy.cut(reset=True)
        proxy.down.delay_s = 0.0
        if idempotent:
            assert await patiently(calling) == "order"
            assert begun == ["order", "order"]
        else:
            with pytest.raises(StreamIncomplete, match="the handler may have begun") as caught:
                await patiently(calling)
            assert not caught.value.began
            assert begun == ["order"]
        assert await patiently(client.call("next")) == "next"


@pytest.mark.any_loop
async def test_a_request_that_had_not_left_whole_goes_elsewhere_after_a_reset(cluster: Cluster) -> None:
    async def handler(request: Any) -> Any:
        return len(request)

    async with two_workers(cluster, handler) as (proxy, client):
        assert await patiently(client.call(b"connected")) == 9
        proxy.black_hole()
        calling = asyncio.ensure_future(client.call(bytes(50_000_000)))
        session = client.pool.get((proxy.address,))
        assert session is not None
        await until(lambda: session.unsent)  # its first fragments are written
        proxy.cut(reset=True)
        assert await patiently(calling) == 50_000_000


# --- addresses where nobody is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("addresses", [(DEAD,), ("memory://nobody",), ("unix:///nowhere/s.sock", DEAD)])
async def test_a_dead_address_alone_is_named(addresses: tuple[str, ...], cluster: Cluster) -> None:
    discovery = cluster.caller.discovery
    await discovery.register(Instance(NAME, 5, addresses))
    client = await cluster.client()
    for attempt in (lambda: drained(client.generate(1)), lambda: client.call(1)):
        with pytest.raises(ConnectionFailed, match='cannot reach endpoint "t/components/c/e"') as caught:
            await patiently(attempt())
        assert isinstance(caught.value, ConnectionError)
        for each in addresses:
            assert each in str(caught.value)


async def test_a_dead_address_beside_a_live_one_is_passed_by(cluster: Cluster) -> None:
    await cluster.caller.discovery.register(Instance(NAME, 5, (DEAD,)))
    worker = await cluster.worker(echo)
    client = await cluster.client()
    await until(lambda: len(client.instance_ids()) == 2)
    for n in range(20):
        assert await patiently(client.call(n)) == n
    streams = await patiently(asyncio.gather(*[client.generate(n, annotated=False) for n in range(50)]))
    assert [await patiently(drained(each)) for each in streams] == [[n] for n in range(50)]
    assert {each.instance_id for each in streams} == {worker.instance_id}


async def test_static_addresses(cluster: Cluster) -> None:
    worker = cluster.runtime(
        request_plane="direct", discovery="static", listen="tcp://127.0.0.1:0", static="t.c.e=tcp://127.0.0.1:1"
    )
    serving = worker.endpoint("t.c.e").serve_endpoint(echo)
    await until(lambda: worker.statistics().endpoints or serving.done())
    if serving.done():
        serving.result()
    (address,) = worker.statistics().endpoints[0].addresses
    caller = DistributedRuntime(
        config=Config(discovery="static", static=f"t.c.e={DEAD};t.c.e={address}", handle_signals=False)
    )
    client = await caller.endpoint("t.c.e").client()
    for n in range(10):
        assert await patiently(client.call(n)) == n
    lonely = DistributedRuntime(config=Config(discovery="static", static=f"t.c.e={DEAD}", handle_signals=False))
    nobody = await lonely.endpoint("t.c.e").client()
    with pytest.raises(ConnectionFailed, match=DEAD):
        await patiently(nobody.call(1))
    await caller.close()
    await lonely.close()


# --- processes that die ----------------------------------------------------------------------------------------------


WORKER = """
import asyncio, os
from triton_distributed.runtime import DistributedRuntime

async def main():
    runtime = DistributedRuntime(asyncio.get_running_loop())
    async def handler(request):
        yield os.getpid()
        if request == "wait":
            yield 2
            await asyncio.Event().wait()
    await runtime.endpoint("t.c.e").serve_endpoint(handler)

asyncio.run(main())
"""


@pytest.mark.any_loop
@pytest.mark.leaves("socket files", reason="a killed process cannot remove its own; the next worker does")
async def test_a_killed_worker_ends_its_streams_at_once_and_its_items_are_kept(unix: Cluster, tmp_path: Path) -> None:
    async with program(tmp_path, WORKER) as worker:
        client = await unix.client()
        other = client.generate("wait", annotated=False)
        stream = client.generate("wait", annotated=False)
        items = [await patiently(anext(stream)), await patiently(anext(stream))]
        worker.signal(signal.SIGKILL)
        with pytest.raises(StreamIncomplete) as caught:
            await patiently(anext(stream))
        assert items == [worker.pid, 2]
        assert caught.value.items == 2
        assert "unix://" in caught.value.address
        with pytest.raises(StreamIncomplete):
            await patiently(drained(other))
        assert not len(client.load)
        await worker.ended()


@pytest.mark.leaves("socket files", reason="a killed process cannot remove its own; the next worker does")
async def test_calls_go_on_when_one_of_two_workers_is_killed(unix: Cluster, tmp_path: Path) -> None:
    async with program(tmp_path, WORKER) as one, program(tmp_path, WORKER) as other:
        client = await unix.client()
        await until(lambda: len(client.instance_ids()) == 2)
        answers = {await patiently(client.call(1)) for _ in range(4)}
        assert answers == {one.pid, other.pid}
        one.signal(signal.SIGKILL)
        await one.ended()
        assert {await patiently(client.call(1, idempotent=True)) for _ in range(20)} == {other.pid}
        await until(lambda: len(client.instance_ids()) == 1)


@pytest.mark.leaves("socket files", reason="a killed process cannot remove its own; the next worker does")
async def test_a_worker_that_comes_back_is_called_again(unix: Cluster, tmp_path: Path) -> None:
    async with program(tmp_path, WORKER) as one:
        client = await unix.client()
        assert await patiently(client.call(1)) == one.pid
        one.signal(signal.SIGKILL)
        await one.ended()
    await until(lambda: not client.instance_ids())
    async with program(tmp_path, WORKER) as other:
        await patiently(client.wait_for_instances())
        assert await patiently(client.call(1)) == other.pid


@pytest.mark.any_loop
async def test_a_stopped_worker_leaves_the_rotation_and_comes_back_with_its_streams(
    trd_dir: Path, tmp_path: Path
) -> None:
    unix = Cluster(discovery="file", directory=trd_dir, health_timeout_s=400 * MS, connect_timeout_s=400 * MS)
    async with program(tmp_path, WORKER) as one, program(tmp_path, WORKER) as other:
        client = await unix.client()
        await until(lambda: len(client.instance_ids()) == 2)
        assert {await patiently(client.call(1)) for _ in range(4)} == {one.pid, other.pid}
        one.signal(signal.SIGSTOP)
        try:
            calls = [asyncio.ensure_future(client.call(1)) for _ in range(10)]
            await until(lambda: client.candidates.rotation.down)
            assert {await patiently(client.call(1)) for _ in range(20)} == {other.pid}
            held = [each for each in calls if not each.done()]
            assert len(held) == 5
            await until(lambda: next(iter(client.candidates.rotation.down.values())).failures > 2)  # probes find it out
        finally:
            one.signal(signal.SIGCONT)
        assert {await patiently(each) for each in held} == {one.pid}
        await until(lambda: not client.candidates.rotation.down)
        assert {await patiently(client.call(1)) for _ in range(4)} == {one.pid, other.pid}
        await unix.close()


async def test_a_lost_worker_is_probed_and_comes_back_into_rotation(cluster: Cluster) -> None:
    worker = await cluster.worker(echo)
    client = await cluster.client()
    await patiently(client.call(1))
    session = client.pool.get(client.candidates.instances[0].addresses)
    assert session is not None
    assert session._transport is not None
    session._transport.abort()
    await until(lambda: worker.instance_id in client.candidates.rotation.down)
    await until(lambda: not client.candidates.rotation.down)
    assert await patiently(client.call(1)) == 1
    await turns()


# --- workers that discovery no longer lists -----------------------------------------------------------------------------


async def unlisted(cluster: Cluster, *workers: Any) -> None:
    """Discovery forgets the workers, as etcd does those that cannot reach it; they know nothing of it."""
    for worker in workers:
        for endpoint in worker.worker.server.endpoints:
            await worker.discovery.withdraw(endpoint.instance)
    client = await cluster.caller.endpoint("t.c.e").client()
    await until(lambda: not client.instance_ids())


async def test_workers_that_discovery_lost_are_called_while_they_answer(cluster: Cluster) -> None:
    workers = [await cluster.worker(echo) for _ in range(2)]
    client = await cluster.client()
    await until(lambda: len(client.instance_ids()) == 2)
    assert [await patiently(client.call(n)) for n in range(4)] == [*range(4)]  # connected to both
    await unlisted(cluster, *workers)
    assert [await patiently(client.call(n)) for n in range(20)] == [*range(20)]
    await workers[0].close()
    assert [await patiently(client.call(n)) for n in range(20)] == [*range(20)]
    await workers[1].close()
    with pytest.raises(NoInstances):
        await patiently(client.call(1))


@pytest.mark.any_loop
@pytest.mark.parametrize("turns_before", range(12))
async def test_serving_that_is_cancelled_at_any_moment_leaves_the_endpoint_free(
    cluster: Cluster, turns_before: int
) -> None:
    runtime = cluster.runtime()
    await cluster.serve(runtime, echo, "t.c.other")
    client = await cluster.caller.endpoint("t.c.e").client()
    serving = runtime.endpoint("t.c.e").serve_endpoint(echo)
    await turns(turns_before)
    serving.cancel()
    await patiently(asyncio.wait({serving}))
    assert serving.cancelled()
    assert list(runtime.stats()) == ["t/components/c/other"]
    await until(lambda: not client.instance_ids())
    await cluster.serve(runtime, echo)
    assert await patiently(client.call(1)) == 1


async def test_an_endpoint_that_is_served_no_more_is_not_called(cluster: Cluster) -> None:
    runtime = cluster.runtime()
    serving = await cluster.serve(runtime, echo)
    await cluster.serve(runtime, echo, "t.c.other")  # the connection stays
    client = await cluster.client()
    assert await patiently(client.call(1)) == 1
    serving.cancel()
    await until(lambda: not client.instance_ids())
    for n in range(3):
        with pytest.raises(NoInstances, match='no endpoints found for endpoint "t/components/c/e"'):
            await patiently(client.call(n))

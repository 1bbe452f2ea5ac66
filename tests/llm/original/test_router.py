"""`KvRouter`, `KvMetricsPublisher` and `KvIndexer`, wherever instances are registered and however events travel."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, patiently, until
from tests.runtime.conftest import unix
from tests.servers import shared_nats
from triton_distributed.errors import BrokerError, RuntimeClosed
from triton_distributed.llm import (
    ApproxKvIndexer,
    KvEventPublisher,
    KvIndexer,
    KvMetricsPublisher,
    KvRouter,
    NoWorkers,
    RouterClosed,
)
from triton_distributed.llm.original import nats_stats
from triton_distributed.llm.original import router as router_module
from triton_distributed.runtime import Component, DistributedRuntime

__all__ = ["unix"]

PROMPT = list(range(128))


class Raises:
    """A function that fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise self._error


class Four:
    """A number as those of numpy."""

    def __index__(self) -> int:
        return 4


@pytest.fixture(scope="module")
def nats_url() -> Iterator[str]:
    with shared_nats() as url:
        yield url


@pytest.fixture(params=["memory", "file", "nats"])
async def cluster(
    request: pytest.FixtureRequest, trd_dir: Path, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Cluster]:
    """Runtimes whose events travel in each way."""
    monkeypatch.setattr(nats_stats, "EVERY_S", 600.0)  # An answer in the middle of a test would reset what was booked.
    options: dict[str, Any] = {"discovery": "file", "directory": trd_dir}
    if request.param == "memory":
        options = {}
    elif request.param == "nats":
        options |= {"events": "nats", "nats_server": nats_url}
    made = Cluster(**options)
    yield made
    await made.close()


def component(runtime: DistributedRuntime) -> Component:
    return runtime.namespace("triton-init").component("vllm")


async def worker(cluster: Cluster, *load: int) -> tuple[DistributedRuntime, KvMetricsPublisher]:
    runtime, publisher = cluster.runtime(), KvMetricsPublisher()
    if load:
        publisher.publish(*load)
    await patiently(publisher.create_service(component(runtime)))
    return runtime, publisher


async def scores(indexer: KvIndexer, prompt: list[int] = PROMPT) -> dict[Any, int]:
    return (await indexer.find_matches_for_request(prompt, 0)).scores


async def has(indexer: KvIndexer, expected: dict[Any, int]) -> None:
    async with asyncio.timeout(30):
        while await scores(indexer) != expected:
            await asyncio.sleep(0.001)


async def test_requests_go_to_the_cache_while_there_is_capacity(cluster: Cluster) -> None:
    one, one_tells = await worker(cluster, 0, 4, 0, 40)
    other, other_tells = await worker(cluster, 0, 4, 0, 40)
    silent, _ = await worker(cluster)
    caller = cluster.caller
    router, indexer = KvRouter(caller, component(caller)), KvIndexer(component(caller))
    assert await scores(indexer) == {}
    first = await patiently(router.schedule(PROMPT, 0))
    assert first in (one.instance_id, other.instance_id)

    events = KvEventPublisher(component(other), other.instance_id)
    events.publish_stored(0, PROMPT, [64, 64], [70, 71])
    await has(indexer, {other.instance_id: 2})
    one_tells.publish(0, 4, 0, 40)
    other_tells.publish(2, 4, 2, 40)
    await until(lambda: router._routing._loads.by_worker[other.instance_id].request_active_slots == 2)
    chosen = [await patiently(router.schedule(PROMPT, 0)) for _ in range(3)]
    assert chosen[:2] == [other.instance_id] * 2, "the holder first, until it is at capacity"
    assert chosen[2] == one.instance_id

    events.publish_removed(1, [71, 70])
    await has(indexer, {})
    assert silent.instance_id not in chosen
    assert type(chosen[0]) is int


async def test_requests_wait_in_their_order_while_all_are_at_capacity(unix: Cluster) -> None:
    runtime, tells = await worker(unix, 1, 1, 0, 4)
    router = KvRouter(unix.caller, component(unix.caller))
    order: list[int] = []

    async def request(number: int) -> None:
        await router.schedule(PROMPT, 0)
        order.append(number)

    waiting = [asyncio.create_task(request(each)) for each in range(3)]
    cancelled = asyncio.create_task(router.schedule(PROMPT, 0))
    await asyncio.sleep(0)
    cancelled.cancel()
    for count in range(1, 4):
        tells.publish(0, 1, 0, 4)
        await until(functools.partial(lambda count: len(order) == count, count))
    assert order == [0, 1, 2]
    await asyncio.gather(*waiting)
    last = asyncio.create_task(router.schedule(PROMPT, 0))
    await runtime.close()
    late, _ = await worker(unix, 0, 1, 0, 4)
    assert await patiently(last) == late.instance_id


async def test_lost_news_do_not_leave_a_request_waiting(unix: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "ASK_S", 0.01)
    runtime, tells = await worker(unix, 1, 1, 0, 4)
    router = KvRouter(unix.caller, component(unix.caller))
    waiting = asyncio.create_task(router.schedule(PROMPT, 0))
    await until(lambda: router._routing._loads.by_worker)
    tells._outlets.clear()  # What it publishes reaches nothing; it still answers.
    tells.publish(0, 1, 0, 4)
    assert await patiently(waiting) == runtime.instance_id


async def test_no_worker_and_a_closed_runtime(unix: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "FIRST_WORKER_S", 0.01)
    runtime = unix.runtime()
    router, indexer = KvRouter(runtime, component(runtime)), KvIndexer(component(runtime), 64)
    with pytest.raises(NoWorkers, match="^no endpoints aviailable to route work: .*triton-init/vllm"):
        await router.schedule(PROMPT, 0)
    with pytest.raises(OverflowError):
        await router.schedule([-1], 0)
    other, tells = await worker(unix, 0, 1, 0, 1)
    monkeypatch.setattr(router_module, "FIRST_WORKER_S", 30.0)
    assert await patiently(router.schedule(PROMPT, 0)) == other.instance_id  # It does not stay broken.
    waiting = asyncio.create_task(router.schedule(PROMPT, 0))
    assert await scores(indexer) == {}
    await runtime.close()
    for call in (waiting, router.schedule(PROMPT, 0), indexer.find_matches_for_request(PROMPT, 0)):
        with pytest.raises(RouterClosed, match="^endpoint subscriber shutdown$"):
            await patiently(call)
    tells.publish(0, 2, 0, 2)


async def test_a_router_that_cannot_listen_says_so_and_begins_anew(
    unix: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime, _ = await worker(unix, 0, 4, 0, 4)
    plane = unix.caller.events.plane()
    with monkeypatch.context() as broken:
        broken.setattr(plane, "subscribe", Raises(BrokerError("NATS", "nowhere", "no answer")))
        router = KvRouter(unix.caller, component(unix.caller))
        with pytest.raises(BrokerError, match="nowhere"):
            await patiently(router.schedule(PROMPT, 0))
    assert any("begins anew" in each for each in caplog.messages)
    assert await patiently(router.schedule(PROMPT, 0)) == runtime.instance_id

    publisher = KvEventPublisher(component(unix.caller), 1)
    indexer = KvIndexer(component(unix.caller))
    assert await scores(indexer) == {}
    with monkeypatch.context() as broken:
        broken.setattr(plane, "publish", Raises(BrokerError("NATS", "nowhere", "full")))
        publisher.publish_stored(1, PROMPT, [64, 64], [1, 2])
        await publisher.flushed()
    assert any("is lost: " in each and "nowhere" in each for each in caplog.messages)
    publisher.publish_stored(2, PROMPT, [64, 64], [1, 2])
    await has(indexer, {1: 2})


async def test_a_worker_that_is_gone_is_forgotten_and_one_that_drains_gets_nothing(unix: Cluster) -> None:
    one, _ = await worker(unix, 0, 9, 0, 9)
    other, tells = await worker(unix, 0, 9, 0, 9)
    router, indexer = KvRouter(unix.caller, component(unix.caller)), KvIndexer(component(unix.caller))
    await scores(indexer)
    events = KvEventPublisher(component(other), other.instance_id)
    events.publish_stored(0, PROMPT, [64, 64], [1, 2])
    await has(indexer, {other.instance_id: 2})
    await patiently(router.schedule(PROMPT, 0))
    await component(other).endpoint("load_metrics").pause()
    await until(lambda: other.instance_id not in router._routing._loads.by_worker)
    tells.publish(0, 9, 0, 9)
    for _ in range(3):
        assert await patiently(router.schedule(PROMPT, 0)) == one.instance_id
    assert len(router._routing._blocks) == 0
    await has(indexer, {})


async def test_a_dropped_router_ends_its_tasks(unix: Cluster) -> None:
    runtime = unix.caller
    router = KvRouter(runtime, component(runtime))
    indexer = KvIndexer(component(runtime))
    await scores(indexer)
    assert runtime.events.inboxes
    del router, indexer
    gc.collect()
    await until(lambda: not runtime.events.inboxes)


async def test_the_endpoint_load_metrics_answers_for_old_routers(unix: Cluster) -> None:
    runtime = unix.runtime()
    publisher = KvMetricsPublisher()
    ended = publisher.create_endpoint(component(runtime))
    client = await component(unix.caller).endpoint("load_metrics").client()
    await patiently(client.wait_for_endpoints())
    empty = dict.fromkeys(["request_active_slots", "request_total_slots", "kv_active_blocks", "kv_total_blocks"], 0)
    assert [each.data() for each in await drained(client.generate(None))] == [empty]
    await asyncio.to_thread(publisher.publish, 1, 2, 3, Four())  # type: ignore[arg-type]
    assert await client.call(None) == dict(zip(empty, (1, 2, 3, 4), strict=True))
    for bad, error in (((-1, 1, 1, 1), OverflowError), ((1, 1, 1, 2**64), OverflowError), ((1.5, 1, 1, 1), TypeError)):
        with pytest.raises(error):
            publisher.publish(*bad)
    assert not ended.done()
    await runtime.close()
    await patiently(ended)
    with pytest.raises(RuntimeClosed):  # So a program that publishes for ever ends.
        publisher.publish(1, 2, 3, 4)


async def test_scores_of_later_programs_are_by_worker_and_rank(unix: Cluster) -> None:
    """As in the tests of Dynamo's binding."""
    here = component(unix.caller)
    indexer, publisher = KvIndexer(here, 32), KvEventPublisher(here, 233, 32)
    assert indexer.block_size() == 32
    tokens = [3] * 32
    assert await scores(indexer, tokens) == {}
    publisher.publish_stored(0, tokens, [32], [0], 0, None)
    publisher.publish_stored(1, tokens, [32], [1], 0, 12345)  # of an unknown parent
    publisher.publish_stored(2, tokens + tokens[:5], [32, 5], [2, 3], 0, 0)
    publisher.publish_stored(3, tokens[:5], [5], [4])
    async with asyncio.timeout(30):
        while await scores(indexer, [3] * 64) != {(233, 0): 2}:
            await asyncio.sleep(0.001)
    publisher.publish_removed(4, [2])
    publisher.publish_removed(5, [0])
    async with asyncio.timeout(30):
        while await scores(indexer, tokens):
            await asyncio.sleep(0.001)
    with pytest.raises(ValueError, match="do not fit"):
        publisher.publish_stored(0, tokens, [31], [0])

    assumed = ApproxKvIndexer(here, 32)
    assert not (await assumed.find_matches_for_request([0] * 64)).scores
    await assumed.process_routing_decision_for_request([0] * 64, 0)
    assert (await assumed.find_matches_for_request([0] * 64)).scores == {(0, 0): 2}
    for made in (lambda: KvIndexer(here, -1), lambda: ApproxKvIndexer(here, 0), lambda: ApproxKvIndexer(here, 1, 0.0)):
        with pytest.raises(ValueError, match="must be"):
            made()


# --- the original's processes ----------------------------------------------------------------------------------------


async def test_old_routers_and_old_workers_over_nats(
    nats_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A router of the original asks for statistics, and one of its workers answers; events are plain JSON."""
    monkeypatch.setattr(nats_stats, "EVERY_S", 0.05)
    made = Cluster(events="nats", nats_server=nats_url)
    runtime, tells = await worker(made, 1, 4, 2, 8)
    caller = made.caller
    client = await caller.nats.client()
    service = component(caller).service_name()
    subscribed = await client.subscribe(component(caller).event_subject("kv_events"))

    answer = await client.request(f"$SRV.STATS.{service}", b"", timeout=30)
    stats = json.loads(answer.data)
    assert stats["name"] == service
    assert {"id", "version", "started"} < stats.keys()
    (endpoint,) = stats["endpoints"]
    assert endpoint["data"] == {
        "request_active_slots": 1,
        "request_total_slots": 4,
        "kv_active_blocks": 2,
        "kv_total_blocks": 8,
    }
    assert int(endpoint["subject"].rsplit("-")[-1], 16) == runtime.instance_id

    tells.publish(4, 4, 8, 8)
    router = KvRouter(caller, component(caller))
    assert await scores(KvIndexer(component(caller))) == {}  # By now the router's own subscription is live, too.
    old = 0x694D9

    async def old_worker(message: Any) -> None:
        generate = {"name": "generate", "subject": f"{service}.generate-{old:x}", "num_requests": 1}
        metrics = {**generate, "subject": f"{service}.load_metrics-{old:x}", "data": {**endpoint["data"]}}
        body = {"name": service, "id": "x", "version": "0.0.1", "started": "", "endpoints": [generate, metrics]}
        await client.publish(message.reply, b'{"name": 5}')
        await client.publish(message.reply, json.dumps(body).encode())

    serving = await client.subscribe(f"$SRV.STATS.{service}", cb=old_worker)
    stored = {"parent_hash": None, "blocks": [{"block_hash": 7, "tokens_hash": 3480597578098033343}]}
    for body in (
        b"nonsense",
        json.dumps({"worker_id": old, "event": {"event_id": 0, "data": {"stored": stored}}}).encode(),
    ):
        await client.publish(component(caller).event_subject("kv_events"), body)
    assert await patiently(router.schedule(PROMPT, 0)) == old
    await until(lambda: len(router._routing._blocks) == 1)

    KvEventPublisher(component(runtime), runtime.instance_id).publish_stored(5, PROMPT[:64], [64], [9], 0, 8)
    for _ in range(2):
        await subscribed.next_msg(30)
    assert json.loads((await subscribed.next_msg(30)).data) == {
        "worker_id": runtime.instance_id,
        "event": {
            "event_id": 5,
            "data": {"stored": {"blocks": [{"block_hash": 9, "tokens_hash": 3480597578098033343}], "parent_hash": 8}},
        },
    }
    assert any("are skipped" in each for each in caplog.messages)
    await serving.unsubscribe()
    await until(lambda: old not in router._routing._loads.by_worker and not len(router._routing._blocks))
    assert runtime.instance_id in router._routing._loads.by_worker
    await made.close()

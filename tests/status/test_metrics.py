"""The metrics page counts what happened, and nothing that the program does to it stops serving."""

from __future__ import annotations

import asyncio
import datetime
import gc
import gzip
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Metric, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics

import triton_distributed as trd
from tests.certificates import Member
from tests.guards.tree import ROOT
from tests.runtime.cluster import Cluster, drained, patiently, until
from tests.status.page import Read
from tests.status.web import fetch
from tests.timing import MS, PATIENCE_S
from triton_distributed.observe import quantile
from triton_distributed.observe.labels import MOST_SETS
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.status import readings, service
from triton_distributed.status.families import BY_NAME, FAMILIES, LEFT_OUT
from triton_distributed.status.history import History
from triton_distributed.testing import NatsServer

REQUESTS, CALLS = "triton_requests_total", "triton_calls_total"


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    yield made
    await made.close()


async def read(runtime: DistributedRuntime) -> Read:
    return Read(await asyncio.to_thread(runtime.metrics.text))


class Engine:
    """Does what a request says."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    async def serve(self, request: Any) -> AsyncIterator[int]:
        if request == "fail":
            raise ValueError("as the request says")
        if request == "wait":
            yield -1
            await self.go_on.wait()
        for number in range(request if isinstance(request, int) else 0):
            yield number


async def test_a_known_load_gives_exact_counts(cluster: Cluster) -> None:
    engine = Engine()
    worker = await cluster.worker(engine.serve, max_inflight=2, max_queue=1)
    client = await cluster.client()
    for count in (3, 0, 4):
        assert await drained(client.generate(count, annotated=False)) == list(range(count))
    for _ in range(2):
        with pytest.raises(ValueError, match="as the request says"):
            await drained(client.generate("fail"))

    waiting = [client.generate("wait") for _ in range(2)]
    for each in waiting:
        await patiently(anext(each))
    queued = asyncio.ensure_future(drained(client.generate(1)))
    await until(lambda: worker.statistics().endpoints[0].waiting)
    with pytest.raises(trd.Overloaded):
        await drained(client.generate(1))
    now, calls = await read(worker), await read(cluster.caller)
    assert now("triton_requests_in_flight", endpoint="t.c.e") == 2
    assert now("triton_requests_queued", endpoint="t.c.e") == 1
    assert now("triton_requests_limit", endpoint="t.c.e") == 2
    assert now("triton_endpoint_serving", endpoint="t.c.e") == 1
    assert now("triton_sessions", role="accepted") == calls("triton_sessions", role="dialled") == 1
    assert now("triton_streams") == calls("triton_streams") == 3
    assert calls("triton_calls_in_flight", endpoint="t.c.e") == 3

    await patiently(waiting.pop().aclose())  # the caller leaves
    with pytest.raises(trd.DeadlineExceeded):
        await drained(client.generate("wait", timeout=20 * MS))
    engine.go_on.set()
    assert await drained(waiting.pop()) == []
    await patiently(queued)
    await until(lambda: not worker.statistics().endpoints[0].running)
    now, calls = await read(worker), await read(cluster.caller)
    expected = {"ok": 5, "error": 2, "cancelled": 1, "refused": 1, "deadline": 1}
    assert now.outcomes(REQUESTS) == calls.outcomes(CALLS) == expected
    assert now("triton_items_sent_total", endpoint="t.c.e") == 3 + 0 + 4 + 1 + 1
    assert now("triton_request_duration_seconds_count", endpoint="t.c.e") == sum(expected.values()) - 1
    assert now("triton_request_queue_seconds_count", endpoint="t.c.e") == sum(expected.values()) - 1
    assert calls("triton_call_duration_seconds_count", endpoint="t.c.e") == sum(expected.values())
    for direction in ("received", "sent"):
        assert now("triton_session_bytes_total", direction=direction) > 100


async def test_the_ends_of_certificates(tmp_path: Path) -> None:
    end = datetime.datetime(2040, 5, 6, tzinfo=datetime.UTC)
    member = Member(tmp_path / "tls", trustme.CA(), not_after=end)
    cluster = Cluster(**member.config())
    now = await read(cluster.runtime())
    assert now("triton_certificate_end_timestamp_seconds", setting="TRD_TLS_CERT") == end.timestamp()
    assert now("triton_certificate_end_timestamp_seconds", setting="TRD_TLS_CA") > end.timestamp() - 1e9
    Path(member.cert).write_text("it is being replaced")
    page = await asyncio.to_thread(cluster.runtimes[0].metrics.text)
    assert 'setting="TRD_TLS_CA"' in page
    assert 'setting="TRD_TLS_CERT"' not in page
    await cluster.close()


async def test_quantiles_lie_where_the_caller_measured_them(cluster: Cluster) -> None:
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds)

    await cluster.worker(sleep)
    client = await cluster.client()
    measured = []

    async def call(seconds: float) -> None:
        began = time.monotonic()
        await client.call(seconds)
        measured.append(time.monotonic() - began)

    await call(0.0)  # it dials
    await asyncio.gather(*[call(seconds) for seconds in [8 * MS] * 60 + [70 * MS] * 3])
    calls = await read(cluster.caller)
    durations = sorted(measured)
    for q in (0.5, 0.99):
        low, high = calls.quantile("triton_call_duration_seconds", q, endpoint="t.c.e")
        exact = durations[max(0, -(-int(q * 100) * len(durations) // 100) - 1)]
        # The caller's measurement includes the way to the call, so it may be in the next bucket.
        assert low <= exact <= max(2.5 * high, high + MS)
    assert calls.quantile("triton_call_duration_seconds", 0.99, endpoint="t.c.e")[0] >= 50 * MS


async def test_counters_stay_when_their_owners_go(cluster: Cluster) -> None:
    engine = Engine()
    worker = cluster.runtime()
    caller = cluster.caller
    for number in range(1, 12):
        serving = await cluster.serve(worker, engine.serve)
        client = await cluster.client()
        await drained(client.generate(2))
        del client
        serving.cancel()
        await asyncio.wait([serving])
        gc.collect()
        served, calls = await read(worker), await read(caller)
        assert served.outcomes(REQUESTS) == calls.outcomes(CALLS) == {"ok": number}
        assert served("triton_items_sent_total", endpoint="t.c.e") == 2 * number
        assert not served.all("triton_requests_in_flight")  # it is not served now
    history = History()
    history.add(0.0, [], caller.clients.counted())
    assert history.since(0.0)["calls"]["t/components/c/e"]["calls"] == [11]
    (calls_now,) = caller.statistics().calls
    assert (calls_now.clients, calls_now.outcomes["ok"], calls_now.outcomes["lost"]) == (0, 11, 0)


async def test_requests_that_a_withdrawal_cuts_are_counted_apart(cluster: Cluster) -> None:
    worker = cluster.runtime()
    serving = await cluster.serve(worker, Engine().serve, max_inflight=1, max_queue=1)
    client = await cluster.client()
    running = client.generate("wait")
    await patiently(anext(running))
    queued = asyncio.ensure_future(drained(client.generate(1)))
    await until(lambda: worker.statistics().endpoints[0].waiting)
    serving.cancel()
    for ended in (queued, drained(running)):
        with pytest.raises(trd.TritonError):
            await patiently(ended)
    await asyncio.wait([serving])
    assert (await read(worker)).outcomes(REQUESTS) == {"cut": 1, "refused": 1}


async def test_further_attempts_are_counted(cluster: Cluster) -> None:
    engines = Engine(), Engine()
    workers = [await cluster.worker(each.serve, max_inflight=1) for each in engines]
    client = await cluster.client()
    await patiently(client.wait_for_instances(2))
    first, second = (each.instance_id for each in workers)

    def first_if_it_may(request: Any, instances: Any, load: Any) -> Any:
        return next((each for each in instances if each.id == first), instances[0])

    running = client.direct("wait", first)
    await patiently(anext(running))
    choosing = await cluster.caller.endpoint("t.c.e").client(first_if_it_may)
    assert await drained(choosing.generate(2, annotated=False)) == [0, 1]  # The first one refuses it.
    calls = await read(cluster.caller)
    assert calls("triton_call_retries_total", endpoint="t.c.e") == 1
    assert calls("triton_call_resumes_total", endpoint="t.c.e") == 0
    assert calls("triton_instances", endpoint="t.c.e", state="candidate") == 2
    for engine in engines:
        engine.go_on.set()
    assert await drained(running) == []
    await patiently(workers[1].close())
    await until(lambda: len(client.instance_ids()) == 1)
    calls = await read(cluster.caller)
    assert calls("triton_instances", endpoint="t.c.e", state="listed") == 1
    assert calls.outcomes(CALLS) == {"ok": 2}
    assert (await read(workers[0])).outcomes(REQUESTS) == {"ok": 1, "refused": 1}
    assert (await read(workers[1])).outcomes(REQUESTS) == {"ok": 1}
    assert second not in client.instance_ids()


async def test_a_hedge_is_counted(here: trd.Connection) -> None:
    gate = asyncio.Event()

    async def slow(request: int) -> int:
        await gate.wait()
        return request

    async def fast(request: int) -> int:
        return request

    await here.serve("t.c.hedged", slow)
    async with trd.connect(trd.Config(discovery="memory", handle_signals=False)) as other:
        await other.serve("t.c.hedged", fast)
        slow_id = here.runtime.instance_id

        def slow_first(request: Any, instances: Any, load: Any) -> Any:
            return next((each for each in instances if each.id == slow_id), instances[0])

        async with asyncio.timeout(PATIENCE_S):
            while len(await here.instances("t.c.hedged")) < 2:
                await asyncio.sleep(MS)
        options: Any = {"policy": slow_first, "hedge_after_s": MS, "idempotent": True}
        assert await here.call("t.c.hedged", 7, **options) == 7
        gate.set()
        page = Read(await asyncio.to_thread(here.metrics.text))
        assert page("triton_call_hedges_total", endpoint="t.c.hedged") == 1


async def test_the_state_of_nats_is_shown(nats: NatsServer) -> None:
    cluster = Cluster(nats_server=nats.url)
    runtime = cluster.runtime()
    try:
        await runtime.namespace("t").publish("begun", b"")
        page = await read(runtime)
        assert (page("triton_nats_connected"), page("triton_nats_reconnections_total")) == (1, 0)
        nats.kill()
        await until(lambda: not runtime.nats.connected)
        assert (await read(runtime))("triton_nats_connected") == 0
        await nats.start()
        await until(lambda: runtime.nats.reconnections)
        page = await read(runtime)
        assert (page("triton_nats_connected"), page("triton_nats_reconnections_total")) == (1, 1)
    finally:
        await cluster.close()


async def test_called_endpoints_beyond_a_bound_share_one_line(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readings, "MOST_CALLED", 3)
    for number in range(5):
        await cluster.worker(Engine().serve, f"t.c.e{number}")
        client = await cluster.client(f"t.c.e{number}")
        await drained(client.generate(1))
    calls = await read(cluster.caller)
    counts = {each["endpoint"]: calls(CALLS, **each) for each in calls.all(CALLS, outcome="ok")}
    assert counts == {"t.c.e0": 1, "t.c.e1": 1, "t.c.e2": 1, "(others)": 2}
    assert len(calls.all("triton_instances", state="listed")) == 3


async def test_labels_are_on_each_line_of_their_endpoint(cluster: Cluster) -> None:
    worker = cluster.runtime()
    await cluster.serve(worker, Engine().serve, metrics_labels=[("model", 'a "quoted" \\ name'), ("lora", "x")])
    await cluster.serve(worker, Engine().serve, "t.c.plain", max_inflight=3)
    client = await cluster.client()
    await drained(client.generate(1))
    served = await read(worker)
    labels = {"endpoint": "t.c.e", "model": 'a "quoted" \\ name', "lora": "x"}
    assert served(REQUESTS, outcome="ok", **labels) == 1
    assert served("triton_requests_in_flight", **labels) == 0
    assert served("triton_request_duration_seconds_bucket", le="+Inf", **labels) == 1
    assert served("triton_requests_limit", endpoint="t.c.plain") == 3
    for name, _ in served.lines:
        for each in served.all(name, endpoint="t.c.e"):
            assert "model" in each


async def test_labels_that_would_explode_are_refused(cluster: Cluster, here: trd.Connection) -> None:
    worker = cluster.runtime()
    endpoint = worker.endpoint("t.c.e")
    with pytest.raises(ValueError, match="9 labels"):
        endpoint.serve_endpoint(Engine().serve, metrics_labels={f"l{number}": "x" for number in range(9)})
    with pytest.raises(TypeError, match="must be text"):
        await here.serve("t.c.native", Engine().serve, metrics_labels={"request": 7})  # type: ignore[dict-item]
    for number in range(MOST_SETS):
        serving = await cluster.serve(worker, Engine().serve, metrics_labels={"run": str(number)})
        serving.cancel()
        await asyncio.wait([serving])
    with pytest.raises(ValueError, match="16 different labels before"):
        endpoint.serve_endpoint(Engine().serve, metrics_labels={"run": "one more"})
    await cluster.serve(worker, Engine().serve, metrics_labels={"run": "3"})  # A known one goes on.
    served = await here.serve("t.c.native", Engine().serve, metrics_labels={"model": "m"})
    page = Read(await asyncio.to_thread(here.metrics.text))
    assert page("triton_endpoint_serving", endpoint="t.c.native", model="m") == 1
    await served.stop()


async def test_all_metrics_are_on_the_page_in_both_formats(cluster: Cluster) -> None:
    worker = await cluster.worker(Engine().serve)
    page = await asyncio.to_thread(worker.metrics.page)
    assert page.content_type.startswith("text/plain; version=0.0.4")
    text = page.body.decode()
    for family in FAMILIES:
        assert text.count(f"# TYPE {family.name} {family.kind}\n") == text.count(f"# HELP {family.name} ") == 1
    for name in ("process_resident_memory_bytes", "python_gc_collections_total"):
        assert text.count(f"# TYPE {name} ") == 1
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    page = await asyncio.to_thread(worker.metrics.page, accept, "gzip")
    assert page.content_encoding == "gzip"
    assert page.content_type.startswith("application/openmetrics-text; version=1.0.0")
    found = {each.name: each.type for each in openmetrics(gzip.decompress(page.body).decode())}
    assert {f"{each.name.removesuffix('_total')} {each.kind}" for each in FAMILIES} <= {
        f"{name} {kind}" for name, kind in found.items()
    }


async def test_the_programs_own_metrics_are_on_the_page(cluster: Cluster) -> None:
    worker = await cluster.worker(Engine().serve)
    registry = CollectorRegistry()
    Counter("tokens", "Tokens.", ["kind"], registry=registry).labels("prompt").inc(7)
    worker.metrics.add(registry)
    worker.metrics.add(registry)  # once is enough
    everywhere = Gauge("test_status_batch", "In the default registry.")
    try:
        everywhere.set(3)
        page = await read(worker)
        assert page("tokens_total", kind="prompt") == 7
        assert page("test_status_batch") == 3
        assert page("triton_metrics_left_out") == 0
        with pytest.raises(TypeError, match="CollectorRegistry"):
            worker.metrics.add("registry")  # type: ignore[arg-type]
    finally:
        REGISTRY.unregister(everywhere)


class Raises:
    """A collector that breaks after its first metric."""

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("before", "Before.", 1)
        raise RuntimeError("the engine is gone")

    def __repr__(self) -> str:
        return "the engine's collector"


class Broken:
    """A collector of a metric that cannot be written."""

    def collect(self) -> list[Metric]:
        metric = GaugeMetricFamily("broken", "A label is no text.", labels=["gpu"])
        metric.add_metric([0], 1)  # type: ignore[list-item]
        return [metric]


async def test_metrics_that_clash_or_break_are_left_out_and_serving_goes_on(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await cluster.worker(Engine().serve)
    registry = CollectorRegistry()
    Counter(REQUESTS, "Not ours.", registry=registry).inc(1000)
    Gauge("triton_request_duration_seconds_count", "A name that a line of ours has.", registry=registry)
    Gauge("mine", "Mine.", registry=registry).set(1)
    ProcessCollector(registry=registry)
    again = CollectorRegistry()
    Gauge("mine", "Mine too.", registry=again).set(2)
    for each in (Raises(), Broken(), registry, again):
        worker.metrics.add(each)
    client = await cluster.client()
    await drained(client.generate(1))
    for _ in range(3):
        page = await read(worker)
    assert page.outcomes(REQUESTS) == {"ok": 1}
    assert page("mine") == page("before") == 1
    assert page("triton_metrics_left_out") == 4
    logged = [each.message for each in caplog.records if each.name == "triton_distributed.status"]
    assert len(logged) == 5
    for name in ("triton_requests", "triton_request_duration_seconds_count", "mine"):
        assert any(each.startswith(f"{name} is left out of the metrics page: ") for each in logged)
    assert any("lacks the rest of the engine's collector: RuntimeError: the engine is gone" in each for each in logged)
    assert any(each.startswith("broken is left out") for each in logged)


class Hangs:
    """A collector that waits, e.g. for a device."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Semaphore(0), threading.Event()

    def collect(self) -> list[Metric]:
        self.began.release()
        self.go_on.wait(PATIENCE_S)
        return []


async def test_a_collector_that_hangs_holds_up_only_a_few_scrapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "PAGE_S", 0.01)
    cluster, hanging = Cluster(status_port=0), Hangs()
    worker = await cluster.worker(Engine().serve)
    worker.metrics.add(hanging)
    url = worker.status_port.url
    held = [asyncio.create_task(fetch(f"{url}/metrics")) for _ in range(service.MOST_PAGES)]
    for _ in held:
        await asyncio.to_thread(hanging.began.acquire, timeout=PATIENCE_S)
    refused = await fetch(f"{url}/metrics")
    assert (refused.status, "does a collector hang?" in refused.json()["error"]) == (503, True)
    hanging.go_on.set()
    assert [each.status for each in await asyncio.gather(*held)] == [200] * len(held)
    assert (await fetch(f"{url}/metrics")).status == 200
    await cluster.close()


async def test_the_page_is_made_while_the_loop_is_stuck(cluster: Cluster) -> None:
    worker = await cluster.worker(Engine().serve)
    pages = [worker.metrics.text()]

    def scrape() -> None:
        while not Read(pages[-1])("triton_loop_stuck_seconds"):
            pages.append(worker.metrics.text())

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)  # The loop does not turn meanwhile.
    page = Read(pages[-1])
    assert page("triton_endpoint_serving", endpoint="t.c.e") == 1
    assert page("triton_loop_stuck_seconds") > 0
    assert page("triton_loop_stalled_seconds_total") >= page("triton_loop_stuck_seconds")


async def test_pages_are_made_while_everything_changes(cluster: Cluster) -> None:
    worker = cluster.runtime()
    stop, begun, errors, pages = threading.Event(), threading.Event(), [], []

    def scrape() -> None:
        while not stop.is_set():
            try:
                pages.append(worker.metrics.text())
            except Exception as error:
                errors.append(error)
            begun.set()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        await asyncio.to_thread(begun.wait)
        for number in range(30):
            name = f"t.c.e{number % 4}"
            serving = await cluster.serve(worker, Engine().serve, name, max_inflight=5, max_queue=20)
            client = await worker.endpoint(name).client()
            await asyncio.gather(*[drained(client.generate(2)) for _ in range(20)])
            serving.cancel()
            await asyncio.wait([serving])
    finally:
        stop.set()
        await asyncio.to_thread(thread.join)
    assert errors == []
    assert len(pages) > 1
    before: dict[Any, float] = {}
    counted = ("_total", "_count", "_bucket")
    for page in [*map(Read, pages[:: 1 + len(pages) // 10]), await read(worker)]:
        counters = {key: value for key, value in page.lines.items() if key[0].startswith("triton_")}
        for key, value in counters.items():
            assert value >= before.get(key, 0) or not key[0].endswith(counted), key
        before = counters
    assert sum(page(REQUESTS, **each) for each in page.all(REQUESTS)) == 600


async def test_the_loop_gets_its_turns_while_a_large_page_is_made(cluster: Cluster) -> None:
    worker = cluster.runtime()
    registry = CollectorRegistry()
    gauge = Gauge("large", "Many lines.", ["number"], registry=registry)
    for number in range(5_000):
        gauge.labels(str(number)).set(number)
    worker.metrics.add(registry)
    turns, page = 0, asyncio.get_running_loop().run_in_executor(None, worker.metrics.text)
    while not page.done():
        turns += 1
        await asyncio.sleep(0)
    assert (await page).count("large{") == 5_000
    assert turns > 10


async def test_discovery_and_its_age_are_shown(trd_dir: Any) -> None:
    cluster = Cluster(discovery="file")
    try:
        worker = await cluster.worker(Engine().serve)
        page = await read(worker)
        assert page("triton_discovery_up", backend="file") == 1
        assert 0 <= page("triton_discovery_age_seconds", backend="file") < PATIENCE_S
        assert page("triton_draining") == 0
        info = page.all("triton_runtime_info")
        assert info[0]["version"] == trd.__version__
        assert info[0]["instance_id"] == str(worker.instance_id)
        assert not page.all("triton_nats_connected")
    finally:
        await cluster.close()
    assert Read(worker.metrics.text())("triton_draining") == 1


def test_names_follow_the_conventions() -> None:
    for family in FAMILIES:
        assert family.name.startswith("triton_")
        assert family.name.endswith("_total") == (family.kind == "counter")
        assert family.text.endswith(".")
    assert len(BY_NAME) == len(FAMILIES)
    assert FAMILIES[-1] is LEFT_OUT
    assert quantile([0], 0.5) is None


@pytest.fixture
async def here() -> AsyncIterator[trd.Connection]:
    async with trd.connect(trd.Config(discovery="memory", handle_signals=False)) as made:
        yield made


def test_the_reference_has_each_metric_and_no_other() -> None:
    rows = {}
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        if line.startswith("| `triton_") and not line.startswith("| `triton_llm_"):
            name, kind, labels = (each.strip() for each in line.split("|")[1:4])
            rows[name.strip("`")] = (kind, tuple(filter(None, labels.split(", "))))
    assert rows == {each.name: (each.kind, each.labels) for each in FAMILIES}


async def test_the_status_port_shows_the_page(watched: Cluster) -> None:
    worker = await watched.worker(Engine().serve)
    answer = await fetch(f"{worker.status_port.url}/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert Read(answer.body.decode())("triton_endpoint_serving", endpoint="t.c.e") == 1
    answer = await fetch(f"{worker.status_port.url}/metrics", "GET", b"", **{"Accept-Encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    assert b"triton_requests_total" in gzip.decompress(answer.body)

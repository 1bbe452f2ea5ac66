"""The status port of a running program: health, statistics, routes and checks, over HTTP."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, patiently, until
from tests.status.web import Answer, connect, fetch, fetch_here, read_answer
from triton_distributed.config import Config
from triton_distributed.errors import ConfigError
from triton_distributed.names import Instance
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.serving.addresses import published_url
from triton_distributed.status.port import RESERVED, HttpError


async def echo(request: Any) -> Any:
    return request


async def test_a_process_is_ready_while_discovery_lists_what_it_serves(watched: Cluster) -> None:
    worker = watched.runtime()
    url = worker.status_port.url
    before = await fetch(f"{url}/ready")
    assert (before.status, before.json()["reasons"]) == (503, ["no endpoint is served"])
    assert (await fetch(f"{url}/live")).status == 200

    await watched.serve(worker, echo)
    ready = await fetch(f"{url}/ready")
    assert (ready.status, ready.json()) == (
        200,
        {"ready": True, "reasons": [], "endpoints": {"t/components/c/e": "serving"}, "loop": {"turns": True}},
    )
    assert ready.headers["content-type"] == "application/json"

    await worker.endpoint("t.c.e").pause()
    paused = await fetch(f"{url}/health")
    assert (paused.status, paused.json()["reasons"]) == (503, ["t/components/c/e is paused"])
    await worker.endpoint("t.c.e").resume()
    assert (await fetch(f"{url}/health")).json()["healthy"] is True


async def test_a_drain_ends_readiness_and_not_life(watched: Cluster) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()

    async def held(request: Any) -> Any:
        began.set()
        await go_on.wait()
        yield request

    worker = await watched.worker(held)
    url = worker.status_port.url
    client = await watched.client()
    call = asyncio.ensure_future(client.call(1))
    await patiently(began.wait())
    worker.shutdown()
    ready = await fetch(f"{url}/ready")
    assert (ready.status, ready.json()["reasons"][0]) == (503, "the process drains")
    assert (await fetch(f"{url}/live")).status == 200
    go_on.set()
    assert await patiently(call) == 1
    await worker.close()
    with pytest.raises(ConnectionRefusedError):
        await connect(url)
    assert worker.status_port.url == ""


async def test_the_state_is_shown_while_the_loop_is_stuck(watched: Cluster) -> None:
    stuck, go_on = threading.Event(), threading.Event()
    found: dict[str, Answer] = {}

    async def blocks(request: Any) -> Any:
        stuck.set()
        go_on.wait(60)  # the line
        return request

    worker = await watched.worker(blocks)
    url = worker.status_port.url
    assert (await fetch(f"{url}/statistics")).json()["age_s"] < 60

    def look() -> None:
        stuck.wait(60)
        try:
            for page in ("live", "ready", "health", "statistics", "statistics/history", "stacks"):
                found[page] = fetch_here(f"{url}/{page}")
        finally:
            go_on.set()

    client = await watched.client()
    thread = threading.Thread(target=look)
    thread.start()
    assert await client.call(1) == 1
    thread.join()
    assert found["live"].status == 200
    ready = found["ready"].json()
    assert found["ready"].status == found["health"].status == 503
    assert ready["loop"]["turns"] is False
    assert ready["loop"]["stuck_s"] > 0
    assert f"{__file__}:" in ready["loop"]["place"]
    assert "in blocks" in ready["reasons"][0]
    statistics = found["statistics"].json()
    assert statistics["age_s"] > 0
    assert statistics["statistics"]["endpoints"][0]["name"] == "t/components/c/e"
    assert b"go_on.wait(60)  # the line" in found["stacks"].body
    assert (await fetch(f"{url}/ready")).status == 200


async def test_a_loop_that_is_stuck_for_too_long_is_not_live() -> None:
    go_on = threading.Event()
    found: list[Answer] = []
    async with DistributedRuntime(config=Config(status_port=0, live_timeout_s=0.6, discovery="memory")) as worker:
        url = worker.status_port.url

        def look() -> None:
            try:
                while not found or found[-1].status == 200:
                    found.append(fetch_here(f"{url}/live"))
            finally:
                go_on.set()

        endpoint = worker.endpoint("t.c.e")
        task = endpoint.serve_endpoint(echo)
        await until(lambda: worker.statistics().endpoints)
        thread = threading.Thread(target=look)
        thread.start()
        go_on.wait(60)  # The loop is stuck here.
        thread.join()
        assert found[-1].status == 503
        assert found[-1].json()["stuck_s"] >= 0.6
        assert (await fetch(f"{url}/live")).status == 200
        task.cancel()


async def test_statistics_and_history_count_what_the_program_does(watched: Cluster) -> None:
    worker = await watched.worker(echo)
    client = await watched.client()
    url = worker.status_port.url
    assert await client.call(1) == 1
    statistics = (await fetch(f"{url}/statistics")).json()
    assert statistics["loop"] == {"turns": True}
    assert statistics["statistics"]["instance_id"] == str(worker.instance_id)
    assert statistics["statistics"]["endpoints"][0]["outcomes"]["ok"] == 1

    served: dict[str, list[Any]] = {}
    while 1 not in served.get("requests", ()):
        found = (await fetch(f"{url}/statistics/history")).json()
        served = found["endpoints"].get("t/components/c/e", {})
    first = served["requests"].index(1)
    assert 0 < served["p50_s"][first] <= served["p99_s"][first]
    assert {len(column) for column in (found["times"], found["loop_lag_s"], *served.values())} == {len(found["times"])}
    later = (await fetch(f"{url}/statistics/history?since={found['times'][-1]}")).json()
    assert found["times"][-1] not in later["times"]
    assert (await fetch(f"{url}/statistics/history?since=x")).status == 400

    mine = (await fetch(f"{watched.caller.status_port.url}/statistics")).json()["statistics"]
    assert mine["calls"][0]["instances"] == [str(worker.instance_id)]


async def test_what_is_published_names_the_port(watched: Cluster) -> None:
    worker = await watched.worker(echo)
    client = await watched.client()
    (instance,) = client.candidates.table.instances
    assert isinstance(instance, Instance)
    assert instance.status_url == worker.status_port.url
    assert len({each.status_port.url for each in watched.runtimes}) == len(watched.runtimes)


async def test_a_wildcard_is_published_as_an_address_of_this_host() -> None:
    loop, config = asyncio.get_running_loop(), Config()
    for wildcard in ("0.0.0.0", "[::]"):
        published = await published_url(loop, config, f"http://{wildcard}:9090")
        assert published.endswith(":9090")
        assert wildcard not in published
    assert await published_url(loop, config, "http://127.0.0.1:9090") == "http://127.0.0.1:9090"
    assert await published_url(loop, config, "") == ""


async def test_paths_and_methods_that_do_not_exist(watched: Cluster) -> None:
    worker = watched.runtime()
    url = worker.status_port.url
    pages = (await fetch(url)).json()["pages"]
    assert "/ready" in pages
    assert {each.split("/")[1] for each in pages} <= set(RESERVED)
    for each in pages:
        assert (await fetch(url + each)).status in (200, 503)
    missing = await fetch(f"{url}/nothing")
    assert (missing.status, list(missing.json())) == (404, ["error"])
    posted = await fetch(f"{url}/live", "POST")
    assert (posted.status, posted.headers["allow"]) == (405, "GET, HEAD")
    head = await fetch(f"{url}/live", "HEAD")
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["content-length"]) > 0
    assert (await fetch(f"{url}/live/")).status == 200


async def test_several_requests_on_one_connection(watched: Cluster) -> None:
    url = watched.runtime().status_port.url
    reader, writer = await connect(url)
    for _ in range(2):
        writer.write(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
        for _ in range(2):
            assert (await read_answer(reader)).status == 200
    writer.write(b"GET /live HTTP/1.0\r\n\r\n")
    assert (await read_answer(reader)).headers["connection"] == "close"
    assert await reader.read() == b""
    writer.close()


async def test_routes_of_the_program(watched: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    worker = watched.runtime()
    port, url = worker.status_port, worker.status_port.url
    threads = []

    async def sleep(body: Any) -> Any:
        threads.append(threading.get_ident())
        return {"slept": body}

    def wake() -> str:
        threads.append(threading.get_ident())
        return "awake"

    def fails(body: dict[str, str]) -> object:
        if body["how"] == "busy":
            raise HttpError(409, "the engine is busy")
        if body["how"] == "late":
            raise TimeoutError("it took too long")
        return object()

    port.route("POST /sleep", sleep)
    port.route("POST /engine/wake-up", wake)
    port.route("GET /fails", fails)
    assert (await fetch(f"{url}/sleep", "POST", b'{"level": 1}')).json() == {"slept": {"level": 1}}
    assert (await fetch(f"{url}/sleep", "POST")).json() == {"slept": {}}
    assert (await fetch(f"{url}/engine/wake-up", "POST")).json() == "awake"
    assert threads[0] == threads[1] == threading.get_ident() != threads[2]
    busy = await fetch(f"{url}/fails?how=busy")
    assert (busy.status, busy.json()) == (409, {"error": "the engine is busy"})
    with caplog.at_level(logging.ERROR):
        late = await fetch(f"{url}/fails?how=late")
    assert (late.status, late.json()) == (500, {"error": "TimeoutError: it took too long"})
    assert "GET /fails: the handler raised" in caplog.text
    assert (await fetch(f"{url}/fails?how=object")).json()["error"].startswith("the handler's result is not JSON")
    assert (await fetch(f"{url}/sleep", "POST", b"{")).status == 400
    wrong = await fetch(f"{url}/sleep")
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
    assert (await fetch(url)).json()["routes"] == ["POST /sleep", "POST /engine/wake-up", "GET /fails"]


@pytest.mark.parametrize(
    "route", ["/sleep", "post /sleep", "POST sleep", "POST /a b", "POST /metrics", "POST /live/x", "GET /"]
)
async def test_a_route_that_cannot_be_taken_is_refused(cluster_port: Any, route: str) -> None:
    with pytest.raises(ValueError, match="route"):
        cluster_port.route(route, lambda: None)


async def test_handlers_and_checks_that_do_not_fit_are_refused(cluster_port: Any) -> None:
    cluster_port.route("POST /once", lambda: None)
    with pytest.raises(ValueError, match="taken"):
        cluster_port.route("POST /once", lambda: None)
    for handler in (None, lambda a, b: None):
        with pytest.raises(TypeError, match="at most one argument"):
            cluster_port.route("POST /other", handler)
    with pytest.raises(TypeError, match="without arguments"):
        cluster_port.health_check(lambda a: None)
    with pytest.raises(ValueError, match="timeout_s"):
        cluster_port.health_check(lambda: None, timeout_s=0)
    cluster_port.health_check(lambda: None, name="one")
    with pytest.raises(ValueError, match="exists already"):
        cluster_port.health_check(lambda: None, name="one")
    with pytest.raises(ValueError, match="400 to 599"):
        HttpError(200, "fine")


@pytest.fixture
async def cluster_port() -> Any:
    async with DistributedRuntime(config=Config(discovery="memory")) as runtime:
        assert runtime.status_port.url == ""  # It is off by default.
        yield runtime.status_port


async def test_health_checks_of_the_program(watched: Cluster) -> None:
    worker = await watched.worker(echo)
    port, hangs = worker.status_port, threading.Event()

    async def fine() -> bool:
        return True

    async def never() -> None:
        await asyncio.Event().wait()

    def broken() -> None:
        raise OSError("the device is gone")

    port.health_check(fine)
    port.health_check(broken, name="device")
    port.health_check(lambda: sys.exit("the engine is gone"), name="exit")
    port.health_check(lambda: False, name="false")
    port.health_check(lambda: "too hot", name="text")
    port.health_check(never, name="never", timeout_s=0.05)
    port.health_check(lambda: hangs.wait(60) and None, name="hangs", timeout_s=0.05)
    for _ in range(3):
        health = await fetch(f"{port.url}/health")
    # The check that hangs has one thread, and not one for each request.
    await until(lambda: [each.name for each in threading.enumerate()].count("triton-status-check") == 1)
    hangs.set()
    assert health.status == 503
    checks = health.json()["checks"]
    assert checks.pop("test_health_checks_of_the_program.<locals>.fine") == {"ok": True}
    assert checks.pop("never")["reason"].startswith("it did not end within")
    assert checks.pop("hangs")["reason"].startswith("it has not returned")
    assert {name: each["reason"] for name, each in checks.items()} == {
        "device": "OSError: the device is gone",
        "exit": "SystemExit: the engine is gone",
        "false": "it returned False",
        "text": "too hot",
    }
    assert "health check text: too hot" in health.json()["reasons"]
    port.checks.clear()
    assert (await fetch(f"{port.url}/health")).status == 200


async def test_a_taken_port_is_one_warning_and_the_program_serves(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = Config(status_port=taken.getsockname()[1], discovery="memory")
        async with DistributedRuntime(config=config) as runtime:
            (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
            assert f"127.0.0.1, port {config.status_port}" in record.getMessage()
            assert runtime.status_port.problem
            assert runtime.status_port.problem in repr(runtime.status_port)
            assert runtime.statistics().status_port == runtime.status_port.problem
            task = runtime.endpoint("t.c.e").serve_endpoint(echo)
            client = await runtime.endpoint("t.c.e").client()
            await client.wait_for_instances()
            assert await client.call(2) == 2
            task.cancel()


def test_a_port_that_kubernetes_has_set_is_explained() -> None:
    with pytest.raises(ConfigError, match="service named trd-status"):
        Config.from_env({"TRD_STATUS_PORT": "tcp://10.0.0.1:80"})
    with pytest.raises(ConfigError, match="at most 65535"):
        Config(status_port=70_000)


async def test_closing_cancels_a_route_and_a_program_may_close_in_one(watched: Cluster) -> None:
    worker = watched.runtime()
    began, ended = asyncio.Event(), []

    async def stop() -> Any:
        try:
            began.set()
            await worker.close()
            return "unreached"
        finally:
            ended.append(True)

    worker.status_port.route("POST /stop", stop)
    asking = asyncio.ensure_future(fetch(f"{worker.status_port.url}/stop", "POST"))
    await patiently(began.wait())
    await patiently(worker.close())
    with pytest.raises((OSError, EOFError)):
        assert (await asking).status == 503
        raise EOFError  # The response arrived before the connection was cut, which is as good.
    assert ended
    assert not [each for each in threading.enumerate() if each.name == "triton-status"]

"""The status port of a program with replicas: one address for all of them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast
from urllib.error import HTTPError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import pytest

import triton_distributed as trd
from tests.supervisor.supervised import WORKER, supervised, written
from tests.supervisor.test_replicas import ask, killed
from tests.timing import PATIENCE_S
from triton_distributed.status.aggregate import DRAINING
from triton_distributed.status.http import TEXT, Request, Response, error_response, json_response
from triton_distributed.status.routes import AT_ONCE, LIMIT_S
from triton_distributed.status.server import HttpServer
from triton_distributed.supervisor import replica
from triton_distributed.supervisor.page import ASK_S, StatusPage
from triton_distributed.supervisor.place import Place
from triton_distributed.supervisor.process import Process
from triton_distributed.supervisor.replicas import Replicas
from triton_distributed.supervisor.supervisor import Supervisor
from triton_distributed.testing.servers import free_port

METRICS = b'# TYPE triton_requests counter\ntriton_requests_total{endpoint="a/b/c"} 3\n'


class FakeProcess:
    """A process that can be called, with a status port."""

    pid, started_at, is_ready, is_draining, is_over = 7, 1.0, True, False, False
    stuck_at: str | None = None

    def __init__(self, status_url: str) -> None:
        self.status_url = status_url


def get(url: str, body: bytes | None = None) -> tuple[int, Any]:
    """The status and the body of a response, as JSON if it is JSON."""
    try:
        with urlopen(HttpRequest(url, body), timeout=PATIENCE_S) as answer:
            status, data, kind = answer.status, answer.read(), answer.headers["Content-Type"]
    except HTTPError as error:
        status, data, kind = error.code, error.read(), error.headers["Content-Type"]
        error.close()
    return status, json.loads(data) if kind == "application/json" else data.decode()


class Pages:
    """A status page over replicas whose status ports the test plays.

    Attributes:
        replies: what each replica answers to a path; a missing path is a 404.
    """

    def __init__(self, page: StatusPage, places: list[Place], replies: list[dict[str, Response]]) -> None:
        self.page, self.places, self.replies = page, places, replies
        self.starting = self.stopping = False

    async def get(self, path: str, body: bytes | None = None) -> tuple[int, Any]:
        return await asyncio.to_thread(get, self.page.url + path, body)


@asynccontextmanager
async def pages(count: int) -> AsyncIterator[Pages]:
    replies: list[dict[str, Response]] = [{} for _ in range(count)]

    def answer(index: int) -> Callable[[Request], Response]:
        def of_one(request: Request) -> Response:
            if request.method == "POST":
                return json_response([request.path, dict(request.query), request.body.decode()])
            return replies[index].get(request.path, json_response({"error": "nothing here"}, 404))

        return of_one

    servers = [HttpServer("127.0.0.1", 0, answer(index), lambda: True) for index in range(count)]
    places = [Place(index) for index in range(count)]
    for place, server in zip(places, servers, strict=True):
        place.take(cast(Process, FakeProcess(server.url)))
    state: list[Pages] = []
    page = StatusPage("127.0.0.1", 0, places, lambda: state[0].starting, lambda: state[0].stopping)
    state.append(Pages(page, places, replies))
    try:
        yield state[0]
    finally:
        await page.close()
        for server in servers:
            server.stop(lambda: None)
            await asyncio.to_thread(server.join, PATIENCE_S)


async def test_it_is_ready_when_all_have_been_and_one_is() -> None:
    good, bad = json_response({"ready": True}), json_response({"ready": False, "reasons": ["a.b.c is paused"]}, 503)
    async with pages(2) as here:
        here.replies[:] = [{"/ready": good}, {"/ready": good}]
        here.starting = True
        assert (await here.get("/ready"))[0] == 503
        here.starting = False
        assert await here.get("/ready") == (
            200,
            {"ready": True, "ready_replicas": 2, "all_replicas": 2, "reasons": []},
        )
        here.replies[1] = {"/ready": bad}
        status, found = await here.get("/ready")
        assert (status, found["ready_replicas"], found["reasons"]) == (200, 1, ["replica 1: a.b.c is paused"])
        here.places[0].process = None
        here.places[0].has_ended("process 7 ended by SIGKILL")
        status, found = await here.get("/ready")
        assert (status, found["ready_replicas"]) == (503, 0)
        assert found["reasons"][0] == "replica 0: waiting; process 7 ended by SIGKILL"
        here.stopping = True
        assert (await here.get("/ready"))[1]["reasons"][0] == "the program drains"
        assert await here.get("/live") == (200, {"live": True})


async def test_health_is_that_of_all() -> None:
    async with pages(2) as here:
        here.replies[:] = [{"/health": json_response({"healthy": True})}] * 2
        status, found = await here.get("/health")
        assert (status, found["healthy"]) == (200, True)
        assert [each["health"] for each in found["replicas"]] == [{"healthy": True}] * 2
        here.replies[1] = {"/health": json_response({"healthy": False, "reasons": ["the GPU is lost"]}, 503)}
        here.places[0].has_ended("process 3 ended with status 1")
        status, found = await here.get("/health")
        assert (status, found["healthy"], found["ready"]) == (503, False, True)
        assert found["reasons"] == ["replica 1: the GPU is lost"]
        first, second = found["replicas"]
        assert (first["restarts"], first["last_end"], first["state"]) == (1, "process 3 ended with status 1", "ready")
        assert second["problems"] == ["the GPU is lost"]

        # A failed check does not make a replica less ready, and `/ready` says the same.
        here.replies[0] = here.replies[1] = {
            "/health": json_response({"healthy": False, "ready": True, "reasons": ["the GPU is lost"]}, 503),
            "/ready": json_response({"ready": True}),
        }
        status, found = await here.get("/health")
        assert (status, found["healthy"], found["ready"], found["ready_replicas"]) == (503, False, True, 2)
        assert (await here.get("/ready"))[1]["ready_replicas"] == 2


async def test_a_replica_that_is_ended_because_it_is_stuck_and_one_that_has_ended_with_the_program() -> None:
    async with pages(2) as here:
        process = here.places[0].process
        assert process is not None
        process.stuck_at = "shop.py:7 in order"
        cast(Any, process).is_draining = True
        here.places[1].process = None
        here.places[1].over = True
        status, found = await here.get("/health")
        assert (status, found["ready_replicas"]) == (503, 0)
        assert found["reasons"] == [
            "replica 0: its event loop is stuck at shop.py:7 in order, so it is ended and starts again",
            "replica 1: ended",
        ]
        assert [each["state"] for each in found["replicas"]] == ["stuck", "ended"]


async def test_metrics_have_a_label_for_the_replica() -> None:
    async with pages(2) as here:
        here.replies[0] = {"/metrics": Response(200, METRICS, TEXT)}
        here.places[1].has_ended("process 3 ended with status 1")
        status, text = await here.get("/metrics")
        assert status == 200
        assert {
            'triton_requests_total{endpoint="a/b/c",replica="0"} 3.0',
            'triton_replica_up{replica="0"} 1.0',
            'triton_replica_up{replica="1"} 0.0',
            'triton_replica_restarts_total{replica="1"} 1.0',
        } <= set(text.splitlines())


async def test_a_replaced_process_counts_until_it_ends() -> None:
    async with pages(2) as here:
        old, first = here.places[0].process, {"/metrics": Response(200, METRICS, TEXT)}
        here.replies[:] = [{**first, "/statistics": json_response({"a": index})} for index in range(2)]
        here.places[0].take(cast(Process, FakeProcess(here.places[1].status_url)))
        assert old is not None
        _, text = await here.get("/metrics")
        assert {
            'triton_requests_total{endpoint="a/b/c",replica="0"} 3.0',
            f'triton_requests_total{{draining="{old.pid}",endpoint="a/b/c",replica="0"}} 3.0',
        } <= set(text.splitlines())
        assert text.count("triton_replica_up{") == 2
        _, found = await here.get("/statistics")
        assert found["replicas"] == [{"a": 1}, {"a": 1}]
        assert found["draining"] == [{"replica": 0, "pid": old.pid, "statistics": {"a": 0}}]
        cast(FakeProcess, old).is_over = True
        assert DRAINING not in (await here.get("/metrics"))[1]
        here.places[0].take(cast(Process, FakeProcess("")))
        assert old not in here.places[0].replaced


async def test_the_pages_and_routes_of_one_replica() -> None:
    async with pages(2) as here:
        here.replies[1] = {"/stacks": Response(200, b"MainThread", TEXT), "/": json_response({"pages": []})}
        assert await here.get("/replicas/1/stacks") == (200, "MainThread")
        assert await here.get("/replicas/1") == (200, {"pages": []})  # After a redirection.
        assert await here.get("/replicas/1/") == (200, {"pages": []})
        assert await here.get("/replicas/0/a%20b?x=1&y=", b"{}") == (200, ["/a b", {"x": "1", "y": ""}, "{}"])
        assert (await here.get("/replicas/0/stacks"))[0] == 404
        assert (await here.get("/replicas/2/stacks"))[0] == 404
        here.places[0].process = None
        assert (await here.get("/replicas/0/stacks"))[0] == 503
        with socket.create_server(("127.0.0.1", 0)) as unused:
            port = unused.getsockname()[1]
        here.places[0].take(cast(Process, FakeProcess(f"http://127.0.0.1:{port}")))
        status, found = await here.get("/replicas/0/stacks")
        assert status == 502
        assert found["error"].startswith("replica 0 does not answer: ")
        assert (await here.get("/sleep", b"{}")) == (
            404,
            {
                "error": "there is no page '/sleep': / lists all pages; "
                "a replica's pages and routes are at /replicas/N/sleep"
            },
        )
        assert (await here.get("/ready", b"{}"))[0] == 405
        here.replies[1]["/"] = json_response({"pages": ["/", "/live"], "routes": ["POST /sleep"]})
        found = (await here.get("/"))[1]
        assert found["pages"][-2:] == ["/replicas/0/", "/replicas/1/"]
        assert found["of_each_replica"] == {
            "pages": ["/replicas/N/", "/replicas/N/live"],
            "routes": ["POST /replicas/N/sleep"],
        }


async def test_a_browser_gets_the_replicas_with_links_to_their_dashboards() -> None:
    async with pages(2) as here:
        page = Response(200, b"<p>drawn", "text/html; charset=utf-8", {"Content-Security-Policy": "default-src 'none'"})
        here.replies[0] = {"/health": json_response({"healthy": True})}
        here.replies[1] = {"/": page, "/health": json_response({"ready": True, "reasons": ["<the GPU> is lost"]}, 503)}
        here.places[0].has_ended("process 3 ended: <b>")
        asks = HttpRequest(f"{here.page.url}/", headers={"Accept": "text/html,*/*"})

        def browse(asks: HttpRequest) -> tuple[str, str]:
            with urlopen(asks, timeout=PATIENCE_S) as answer:
                return answer.read().decode(), answer.headers["Content-Security-Policy"]

        text, policy = await asyncio.to_thread(browse, asks)
        assert "href='replicas/1/'" in text
        assert "<td>ready<td>7<td>1<td>process 3 ended: &lt;b&gt;" in text
        assert "<td>unhealthy: &lt;the GPU&gt; is lost<td>7<td>0<td>" in text
        assert policy.startswith("default-src 'none'")
        asks = HttpRequest(f"{here.page.url}/replicas/1/", headers={"Accept": "text/html,*/*"})
        assert await asyncio.to_thread(browse, asks) == ("<p>drawn", "default-src 'none'")


async def test_a_route_of_a_replica_may_take_long_and_eight_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    full, go_on = threading.Semaphore(0), threading.Event()

    def asked(url: str, path: str, request: Request, timeout_s: float) -> Response:
        limits.append(timeout_s)
        if path == "/wake":
            full.release()
            go_on.wait(PATIENCE_S)
        return json_response({"woken": True})

    monkeypatch.setattr("triton_distributed.supervisor.page._asked", asked)
    async with pages(2) as here:
        urls = [f"{here.page.url}/replicas/{index % 2}/wake" for index in range(AT_ONCE)]
        clients = ThreadPoolExecutor(AT_ONCE)
        running = [clients.submit(get, url, b"{}") for url in urls]
        for _ in running:
            assert await asyncio.to_thread(full.acquire, timeout=PATIENCE_S)
        assert min(limits) >= LIMIT_S
        assert (await here.get("/replicas/0/wake", b"{}"))[0] == 503
        assert (await here.get("/replicas/0/stacks"))[0] == 200
        assert limits[AT_ONCE:] == [ASK_S]
        go_on.set()
        assert [(await asyncio.wrap_future(each))[0] for each in running] == [200] * AT_ONCE
        clients.shutdown()
        assert (await here.get("/replicas/0/wake", b"{}"))[0] == 200


async def test_only_a_replica_that_says_so_is_stuck() -> None:
    async with pages(3) as here:
        here.replies[0] = {"/live": json_response({"live": False, "stuck_s": 130.0, "place": "w.py:7 in f"}, 503)}
        here.replies[1] = {"/live": error_response(503, "all connections of the status port are in use")}
        here.replies[2] = {"/live": json_response({"live": True})}
        assert await asyncio.to_thread(here.page.stuck) == {0: "w.py:7 in f"}


async def test_all_replicas_are_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    all_asked = threading.Barrier(20)

    def asked(url: str, path: str, request: Request, timeout_s: float) -> Response:
        all_asked.wait(PATIENCE_S)
        return json_response({"live": False, "place": "here"}, 503)

    monkeypatch.setattr("triton_distributed.supervisor.page._asked", asked)
    async with pages(1) as here:
        here.places.extend(Place(index) for index in range(1, 20))
        for each in here.places[1:]:
            each.take(cast(Process, FakeProcess(here.places[0].status_url)))
        assert len(await asyncio.to_thread(here.page.stuck)) == 20


class StuckProcess(FakeProcess):
    """A process that the test lets end."""

    stuck_at: str | None = None

    def drain(self, limit_s: float) -> None:
        self.is_draining = True

    def cut(self, limit_s: float) -> None: ...


async def test_stuck_replicas_end_one_after_the_other_also_after_an_error(caplog: pytest.LogCaptureFixture) -> None:
    looks: list[int] = []
    supervisor = Supervisor(Replicas(2), ["unused"], None, 1.0)
    processes = [StuckProcess(""), StuckProcess("")]

    class Page:
        def stuck(self) -> dict[int, str]:
            looks.append(1)
            if len(looks) == 1:
                raise RuntimeError("can't start new thread")
            return {0: "w.py:7 in f", 1: "w.py:7 in f"}

    supervisor._page = Page()
    for place, process in zip(supervisor._places, processes, strict=True):
        place.take(cast(Process, process))
        supervisor._processes[place.index] = place.process  # type: ignore[assignment]
    ends = asyncio.create_task(supervisor._end_stuck(0.001))

    async def until(found: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not found():
                await asyncio.sleep(0)

    await until(lambda: processes[0].is_draining)
    assert "can't start new thread" in caplog.text
    await supervisor._end_one_stuck()
    assert not processes[1].is_draining
    del supervisor._processes[0]
    await until(lambda: processes[1].is_draining)
    ends.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ends


@killed
@pytest.mark.slow
@pytest.mark.usefixtures("trd_dir")
async def test_the_port_of_a_program_shows_an_end_and_ends_what_is_stuck(tmp_path: Path) -> None:
    code = WORKER.replace(
        "if __name__",
        """
@trd.serve("a.b.stick")
async def stick(request: object) -> None:
    import time
    while True:
        time.sleep(0.05)

if __name__""",
    )
    port = str(free_port())
    environ = {"TRD_STATUS_PORT": port, "TRD_LIVE_TIMEOUT_S": "0.5", "TRD_DRAIN_TIMEOUT_S": "600"}
    with supervised(tmp_path, written(tmp_path, code), "2", environ=environ) as running:
        url = (await asyncio.to_thread(running.line, r"ready: 2 replica\(s\); status at (http://\S+)"))[1]
        assert url.endswith(f":{port}")

        async def health() -> dict[str, Any]:
            return (await asyncio.to_thread(get, f"{url}/health"))[1]  # type: ignore[no-any-return]

        pids = await ask(2)
        found = await health()
        assert (found["healthy"], found["ready_replicas"]) == (True, 2)
        assert [each["pid"] for each in found["replicas"]] == [pids["0"], pids["1"]]
        ports = {each["status_url"] for each in found["replicas"]}
        assert len({*ports, url}) == 3
        _, text = await asyncio.to_thread(get, f"{url}/metrics")
        for number in pids:
            assert f'triton_replica_up{{replica="{number}"}} 1.0' in text
            ended = rf'triton_requests_total\{{endpoint="a\.b\.who",outcome="ok",replica="{number}"\}} [1-9]'
            assert re.search(ended, text)

        os.kill(pids["1"], signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            while not (found := await health())["healthy"] or not found["replicas"][1]["restarts"]:
                await asyncio.sleep(0.02)
        assert found["replicas"][1]["last_end"] == f"process {pids['1']} ended by SIGKILL"

        async with trd.connect() as here:
            call = asyncio.ensure_future(here.call("a.b.stick", None))
            text = r"replica (.): the event loop of process (\d+) is stuck at .*worker\.py:\d+ in stick, so the .*"
            stuck = await asyncio.to_thread(running.line, text)
            # It does not wait for the drain's time, because a stuck loop cannot drain.
            await asyncio.to_thread(running.line, rf"\[{stuck[1]}\] SIGTERM again: ending now, 1 request\(s\) cut: \S+")
            await asyncio.to_thread(
                running.line,
                rf"replica {stuck[1]}: process {stuck[2]} ended with status 143, because its event loop was stuck at "
                r".*worker\.py:\d+ in stick; starting again.*",
            )
            with pytest.raises(trd.StreamIncomplete):
                await call
        await asyncio.to_thread(running.stop)


def test_in_a_replica_the_settings_of_a_program_name_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    own = trd.Config(status_port=9400, retries=7)
    assert replica.settings(own) is own
    monkeypatch.setattr(replica, "is_replica", lambda: True)
    assert replica.settings(own) == trd.Config(status_port=0, retries=7)
    assert replica.settings(trd.Config()).status_port == -1


def test_a_port_that_is_taken_is_a_warning(tmp_path: Path, trd_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with supervised(tmp_path, written(tmp_path), "1", environ={"TRD_STATUS_PORT": str(port)}) as running:
            running.line(rf"no status port: cannot listen on 127\.0\.0\.1, port {port}: .*")
            running.ready(1)
            running.stop()

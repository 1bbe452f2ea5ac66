"""Calls from FastAPI and Starlette apps, answered over real sockets."""

from __future__ import annotations

import asyncio
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import BackgroundTasks, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse as StarletteJson
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute

import triton_distributed as trd
from tests.integrations.gateway import ECHO, MEMORY, Ask, Token, asking, browsing, serving
from tests.runtime.cluster import patiently
from tests.timing import MS
from triton_distributed import errors
from triton_distributed import fastapi as trd_fastapi
from triton_distributed import starlette as trd_starlette
from triton_distributed.integrations.http.errors import problem_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Newer releases of Starlette prefer another HTTP library.
    from fastapi.testclient import TestClient

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
HANDLED = trd.Unary[str, list[Any]]("t.http.handled")


@pytest.fixture
async def here() -> AsyncIterator[trd.Connection]:
    """The worker's side."""
    async with trd.connect(MEMORY) as made:
        yield made


def fastapi_app(**options: Any) -> FastAPI:
    app = FastAPI(lifespan=trd_fastapi.lifespan(config=MEMORY))
    trd_fastapi.install(app, **options)

    @app.post("/echo")
    async def echo(body: Ask, here: trd_fastapi.Here) -> Token:
        return await here.call(ECHO, body)

    return app


def calls(app: FastAPI) -> None:
    """Add an endpoint that tells what the worker's handler saw of the HTTP request."""

    @app.get("/handled")
    async def handled() -> list[Any]:
        return await trd.call(HANDLED, "x")


async def tell(request: str, context: trd.Context) -> list[Any]:
    return [context.id(), dict(context.travelling)]


async def test_a_typed_call(here: trd.Connection) -> None:
    await here.serve(ECHO, lambda ask: Token(ask.text, ask.count))
    async with browsing(fastapi_app()) as browser:
        answer = await browser.post("/echo", json={"text": "hello", "count": 2})
    assert (answer.status_code, answer.json()) == (200, {"text": "hello", "number": 2})


async def test_the_request_id_and_the_trace_reach_the_handler_and_the_id_comes_back(here: trd.Connection) -> None:
    await here.serve(HANDLED, tell)
    app = fastapi_app()
    calls(app)
    async with browsing(app) as browser:
        trace = {"traceparent": TRACE, "tracestate": "a=1", "baggage": "tenant=a"}
        answer = await browser.get("/handled", headers={"x-request-id": "REQ-1", **trace})
        assert answer.json() == ["REQ-1", trace]
        assert answer.headers["x-request-id"] == "REQ-1"
        first, second = await browser.get("/handled"), await browser.get("/handled")
        assert re.fullmatch("[0-9a-f]{32}", first.headers["x-request-id"])
        assert first.json() == [first.headers["x-request-id"], {}]
        assert first.headers["x-request-id"] != second.headers["x-request-id"]


@pytest.mark.parametrize("invalid", ["", "a b", "x" * 129, "ü"])
async def test_an_invalid_id_or_trace_is_replaced(here: trd.Connection, invalid: str) -> None:
    await here.serve(HANDLED, tell)
    app = fastapi_app()
    calls(app)
    async with browsing(app) as browser:
        answer = await browser.get("/handled", headers={b"x-request-id": invalid.encode(), b"traceparent": b"00-1-2-3"})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert answer.json() == [answer.headers["x-request-id"], {}]


# Errors.


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (errors.Overloaded("a/b/c", 1, "full", 1, 3.2), 503, "overloaded", 4),
        (errors.Overloaded("a/b/c", 1, "full", 1, 0.02), 503, "overloaded", 1),
        (errors.Draining("a/b/c", 1, "bye"), 503, "draining", 1),
        (errors.Paused("a/b/c", 1, "later"), 503, "paused", 1),
        (errors.NoInstances("a/b/c", "file:///secret"), 503, "no_instances", 1),
        (errors.TooFewInstances("a/b/c", "file:///secret", 3, 1, 2.0), 503, "too_few_instances", 1),
        (errors.ConnectionFailed("a/b/c", [("tcp://secret:1", "refused")]), 503, "connection_failed", 1),
        (errors.DiscoveryError("etcd", "http://secret", "down"), 503, "discovery_error", 1),
        (errors.RuntimeClosed("a call"), 503, "runtime_closed", 1),
        (errors.DeadlineExceeded("a/b/c", 2.0, [("tcp://secret:1", "slow")]), 504, "deadline_exceeded", None),
        (errors.StreamIncomplete("a/b/c", 1, "tcp://secret:1", "lost"), 502, "stream_incomplete", None),
        (errors.StreamClosed("a/b/c", 1, "tcp://secret:1", "left"), 500, "stream_closed", None),
        (errors.NotUnary("secret", 2), 502, "not_unary", None),
        (errors.DecodeError("secret"), 502, "decode_error", None),
        (trd.ContractMismatch("secret", 1, ["secret"]), 502, "contract_mismatch", None),
        (errors.InvalidRequest("secret", "text: missing"), 422, "invalid_request", None),
        (errors.MessageTooLarge("the request", 2000, 1000), 413, "message_too_large", None),
        (errors.RemoteError("secret"), 500, "remote_error", None),
        (errors.ForkError("secret"), 500, "internal_error", None),
        (KeyError("secret"), 500, "internal_error", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_error_has_a_status_and_shows_nothing_internal(
    error: Exception, status: int, code: str, retry: int | None
) -> None:
    problem = problem_of(error)
    assert (problem.status, problem.code, problem.retry_after_s) == (status, code, retry)
    assert "secret" not in problem.detail
    assert problem.detail
    response = problem.response()
    assert response.headers.get("retry-after") == (None if retry is None else str(retry))
    assert response.media_type == "application/problem+json"


class OutOfStock(Exception):
    """A type of the user's that both sides know."""

    def __init__(self, item: str) -> None:
        super().__init__(item)
        self.item = item


async def ordering(here: trd.Connection, raised: Exception) -> None:
    async def fail(ask: Ask) -> Token:
        raise raised

    await here.serve(ECHO, fail)


@pytest.mark.parametrize(("shown", "detail"), [(False, "The service failed."), (True, "KeyError: 'secret'")])
async def test_the_text_of_a_remote_error_is_shown_on_request_only(
    here: trd.Connection, caplog: pytest.LogCaptureFixture, shown: bool, detail: str
) -> None:
    await ordering(here, KeyError("secret"))
    async with browsing(fastapi_app(show_errors=shown)) as browser:
        answer = await browser.post("/echo", json={"text": "a"}, headers={"x-request-id": "R1"})
    assert answer.status_code == 500
    assert answer.json() == {"status": 500, "code": "remote_error", "detail": detail, "request_id": "R1"}
    logged = [each for each in caplog.records if each.name == "triton_distributed.http"]
    assert [(each.levelname, "R1" in each.getMessage(), each.exc_info) for each in logged] == [("ERROR", True, None)]


async def test_the_app_may_answer_the_workers_own_errors(here: trd.Connection) -> None:
    await ordering(here, OutOfStock("tea"))
    app = fastapi_app()

    @app.exception_handler(OutOfStock)
    def out_of_stock(request: Request, error: OutOfStock) -> JSONResponse:
        return JSONResponse({"missing": error.item}, 409)

    @app.exception_handler(ValueError)  # A base class of RemoteError. It must not take all of them.
    def other(request: Request, error: ValueError) -> JSONResponse:
        raise AssertionError(error)

    async with browsing(app) as browser:
        answer = await browser.post("/echo", json={"text": "a"})
        assert (answer.status_code, answer.json()) == (409, {"missing": "tea"})


async def test_an_http_exception_of_a_worker_keeps_its_status(here: trd.Connection) -> None:
    await ordering(here, HTTPException(404, "no such model"))
    async with browsing(fastapi_app()) as browser:
        answer = await browser.post("/echo", json={"text": "a"})
    assert (answer.status_code, answer.json()) == (404, {"detail": "no such model"})


async def test_a_refusal_and_a_late_answer(here: trd.Connection) -> None:
    began, release = asyncio.Event(), asyncio.Event()

    async def wait(ask: Ask) -> Token:
        began.set()
        await release.wait()
        return Token("done")

    await here.serve(ECHO, wait, max_inflight=1)
    app = fastapi_app()

    @app.post("/late")
    async def late(body: Ask, here: trd_fastapi.Here) -> Token:
        return await here.call(ECHO, body, timeout=5 * MS)

    async with browsing(app) as browser:
        first = asyncio.create_task(browser.post("/echo", json={"text": "a"}))
        await patiently(began.wait())
        refused = await browser.post("/echo", json={"text": "b"})
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        release.set()
        assert (await first).status_code == 200
        release.clear()
        assert (await browser.post("/late", json={"text": "a"})).json()["code"] == "deadline_exceeded"


async def test_an_unexpected_error_has_a_body_with_the_id_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = fastapi_app()

    @app.get("/broken")
    async def broken() -> None:
        raise KeyError("secret")

    async with browsing(app) as browser:
        answer = await browser.get("/broken", headers={"x-request-id": "R1"})
    assert answer.headers["x-request-id"] == "R1"
    assert answer.json() == {
        "status": 500,
        "code": "internal_error",
        "detail": "The service failed.",
        "request_id": "R1",
    }
    assert [each.name for each in caplog.records if each.exc_info] == ["uvicorn.error"]


# The client leaves.


def without_complaint(caplog: pytest.LogCaptureFixture) -> None:
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == []


async def outer(request: Request, call_next: Any) -> Any:
    return await call_next(request)


@pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning")  # Of the oldest Starlette's middleware.
@pytest.mark.parametrize("wrapped", [False, True], ids=["", "within BaseHTTPMiddleware"])
async def test_the_handler_of_a_unary_call_is_cancelled(
    here: trd.Connection, caplog: pytest.LogCaptureFixture, wrapped: bool
) -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(ask: Ask) -> Token:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return Token("")

    await here.serve(ECHO, wait)
    app = fastapi_app()
    if wrapped:
        app.add_middleware(BaseHTTPMiddleware, dispatch=outer)
        app.user_middleware.reverse()  # One that is inside of the kit's own; the test below has one outside.
    async with serving(app) as server, asking(server, "/echo") as client:
        await patiently(began.wait())
        client.leave()
        await patiently(cancelled.wait())
    without_complaint(caplog)


async def test_calls_in_parallel_and_later_ones_are_cancelled(
    here: trd.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    begun = asyncio.Queue[None]()
    ended: list[str] = []

    async def wait(ask: Ask) -> Token:
        begun.put_nowait(None)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(ask.text)
        return Token("")

    await here.serve(ECHO, wait)
    app = fastapi_app()
    over = asyncio.Event()

    @app.post("/both")
    async def both(body: Ask, here: trd_fastapi.Here) -> None:
        try:
            await asyncio.gather(here.call(ECHO, Ask("a")), here.call(ECHO, Ask("b")))
        finally:
            with pytest.raises(asyncio.CancelledError):
                await here.call(ECHO, Ask("later"))
            over.set()

    app.add_middleware(BaseHTTPMiddleware, dispatch=outer)
    async with serving(app) as server, asking(server, "/both") as client:
        await patiently(begun.get())
        await patiently(begun.get())
        client.leave()
        await patiently(over.wait())
    assert sorted(ended) == ["a", "b"]
    without_complaint(caplog)


async def test_a_plain_endpoint_uses_the_synchronous_client(trd_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()
    ids: list[str] = []

    async def wait(ask: Ask, context: trd.Context) -> Token:
        ids.append(context.id())
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return Token("")

    settings = trd.Config(discovery="file", directory=trd_dir)
    app = FastAPI(lifespan=trd_fastapi.lifespan(config=settings))
    trd_fastapi.install(app)
    with trd.connect_sync(settings) as plain:

        @app.post("/plain")
        def call(body: Ask) -> Token:
            return plain.call(ECHO, body)

        async with trd.connect(settings) as worker:
            await worker.serve(ECHO, wait)
            sent = "x-request-id: R1\r\n"
            async with serving(app) as server, asking(server, "/plain", headers=sent) as client:
                await patiently(began.wait())
                client.leave()
                await patiently(cancelled.wait())
    assert ids == ["R1"]
    without_complaint(caplog)


async def test_a_client_that_has_its_answer_may_leave(here: trd.Connection) -> None:
    began, release, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def wait(ask: Ask) -> Token:
        began.set()
        await release.wait()
        return Token("late")

    await here.serve(ECHO, wait)
    app = fastapi_app()

    async def afterwards(here: trd.Connection) -> None:
        assert await here.call(ECHO, Ask("x")) == Token("late")
        done.set()

    @app.post("/background")
    async def background(body: Ask, here: trd_fastapi.Here, tasks: BackgroundTasks) -> str:
        tasks.add_task(afterwards, here)
        return "accepted"

    async with serving(app) as server:
        async with asking(server, "/background") as client:
            await client.until(b'"accepted"')
            await patiently(began.wait())
        release.set()
        await patiently(done.wait())


async def test_a_body_that_is_read_during_a_call_arrives_whole(here: trd.Connection) -> None:
    await here.serve(ECHO, lambda ask: Token(ask.text))
    app = fastapi_app()

    @app.post("/upload")
    async def upload(request: Request, here: trd_fastapi.Here) -> list[Any]:
        answer = await here.call(ECHO, Ask("during"))
        parts = [part async for part in request.stream()]
        again = await here.call(ECHO, Ask("after"))
        return [answer.text, sum(map(len, parts)), again.text, b"".join(parts).count(b"x")]

    async with browsing(app) as browser:
        answer = await browser.post("/upload", content=b"x" * 3_000_000)
    assert answer.json() == ["during", 3_000_000, "after", 3_000_000]


# The app's life.


async def test_the_apps_own_lifespan_runs_inside(here: trd.Connection) -> None:
    await here.serve(ECHO, lambda ask: Token(ask.text))
    seen: list[Any] = []

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        seen.append((await app.state.trd.call(ECHO, Ask("start"))).text)
        yield {"greeting": "hello"}
        seen.append((await trd.call(ECHO, Ask("end"))).text)

    app = FastAPI(lifespan=trd_fastapi.lifespan(own, config=MEMORY))
    trd_fastapi.install(app)

    @app.get("/greeting")
    async def greeting(request: Request) -> str:
        return str(request.state.greeting)

    async with browsing(app) as browser:
        assert (await browser.get("/greeting")).json() == "hello"
    assert seen == ["start", "end"]
    assert not hasattr(app.state, "trd")


async def test_an_app_without_install_does_not_start() -> None:
    app = FastAPI(lifespan=trd_fastapi.lifespan(config=MEMORY))
    with pytest.raises(RuntimeError, match=r"call install\(app\)"):
        async with app.router.lifespan_context(app):
            pass


def test_a_test_client_and_an_app_that_is_not_connected() -> None:
    app = FastAPI(lifespan=trd_fastapi.lifespan(config=MEMORY))
    trd_fastapi.install(app)

    @app.get("/instances")
    async def instances(here: trd_fastapi.Here) -> str:
        return repr(here)

    with TestClient(app) as client:
        assert "Connection" in client.get("/instances").json()
    with pytest.raises(RuntimeError, match="with TestClient"):
        TestClient(app).get("/instances")


async def test_a_test_may_give_the_app_a_connection(here: trd.Connection) -> None:
    await here.serve(ECHO, lambda ask: Token(ask.text))
    app = fastapi_app()
    app.state.trd = here
    app.dependency_overrides[trd_fastapi.connection] = lambda: here

    async with browsing(app) as browser:
        assert (await browser.post("/echo", json={"text": "a"})).json()["text"] == "a"


async def test_a_mounted_app_uses_the_connection_of_its_parent(here: trd.Connection) -> None:
    await ordering(here, KeyError("secret"))
    below = FastAPI()
    trd_fastapi.install(below)

    @below.get("/fails")
    async def fails(here: trd_fastapi.Here) -> Token:
        return await here.call(ECHO, Ask("a"))

    app = fastapi_app()
    app.mount("/below", below)
    async with browsing(app) as browser:
        answer = await browser.get("/below/fails", headers={"x-request-id": "R1"})
    assert (answer.status_code, answer.json()["code"], answer.json()["request_id"]) == (500, "remote_error", "R1")
    assert answer.headers.get_list("x-request-id") == ["R1"]


async def test_plain_starlette(here: trd.Connection) -> None:
    await here.serve(ECHO, lambda ask: Token(ask.text))

    async def echo(request: Any) -> StarletteJson:
        answer = await trd.call(ECHO, Ask(**await request.json()))
        return StarletteJson({"text": answer.text})

    async def invalid(request: Any) -> PlainTextResponse:
        await trd.call("t.http.echo", {"text": 5})
        return PlainTextResponse("not reached")

    async def talk(socket: Any) -> None:
        await socket.accept()
        await socket.send_text((await trd.call(ECHO, Ask(await socket.receive_text()))).text)
        await socket.close()

    routes = [
        Route("/echo", echo, methods=["POST"]),
        Route("/invalid", invalid),
        WebSocketRoute("/talk", talk),
    ]
    app = Starlette(routes=routes, lifespan=trd_starlette.lifespan(config=MEMORY))
    trd_starlette.install(app)
    async with browsing(app) as browser:
        assert (await browser.post("/echo", json={"text": "a"})).json() == {"text": "a"}
        answer = await browser.get("/invalid")
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        assert "text" in answer.json()["detail"]

    messages: asyncio.Queue[Any] = asyncio.Queue()
    sent: list[Any] = []
    for each in ({"type": "websocket.connect"}, {"type": "websocket.receive", "text": "hi"}):
        messages.put_nowait(each)
    scope = {"type": "websocket", "path": "/talk", "headers": [(b"x-request-id", b"R1")], "subprotocols": []}

    async def send(message: Any) -> None:
        sent.append(message)

    app.state.trd = here
    await patiently(app(scope, messages.get, send))
    assert (b"x-request-id", b"R1") in sent[0]["headers"]
    assert sent[1]["text"] == "hi"


@pytest.mark.parametrize(("module", "missing"), [("starlette", "starlette"), ("fastapi", "fastapi")])
def test_a_missing_package_is_named_with_its_extra(module: str, missing: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; import triton_distributed.{module}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"pip install 'triton-distributed[{missing}]'" in done.stderr.splitlines()[-1]

"""The front end around the OpenAI API: keys, limits, probes, metrics, the log, and routes to any endpoint."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

import triton_distributed as trd
from triton_distributed.cli.http import front_options, models_options_of
from triton_distributed.context import current
from triton_distributed.llm.contract.output import Usage
from triton_distributed.llm.http.exchange import Exchange, Held
from triton_distributed.llm.http.front import FrontEnd, front_end
from triton_distributed.llm.http.keys import Keys, keys_in
from triton_distributed.llm.http.routes import read_route
from triton_distributed.llm.models.stalls import STALL_TIMEOUT_S

EMBED = trd.Unary[dict[str, str], list[float]]("f.m.embed")
COUNT = trd.Stream[int, int]("f.m.count")
ROUTES = [read_route(each) for each in ("POST /embed=f.m.embed", "/count=f.m.count", "/any=f.m.any", "/no=f.m.none")]


class Model:
    """Stands in for the OpenAI API: it answers, waits or fails, and fills the facts."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.begun = asyncio.Event()
        self.ids: list[str] = []

    async def answer(self, exchange: Exchange) -> None:
        context = current.get()
        assert context is not None
        self.ids.append(context.id())
        self.begun.set()
        if exchange.path == "/v1/models":
            await self.go_on.wait()
        facts = exchange.facts
        facts.model = "m"
        facts.arrived(1)
        facts.arrived(1)
        facts.usage = Usage(5, 2, 3)
        await exchange.answer(200, b"{}")


@pytest.fixture
async def here() -> AsyncIterator[trd.Connection]:
    async with trd.connect(trd.Config(discovery="memory", handle_signals=False)) as made:
        yield made


def client(app: FrontEnd, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front", **options)


async def test_keys_guard_all_but_the_probes(here: trd.Connection) -> None:
    hashed = "sha256:" + hashlib.sha256(b"second").hexdigest()
    async with client(await front_end(here, openai=Model(), keys=["first", hashed], routes=ROUTES)) as http:
        for key in ("first", "second"):
            answer = await http.post("/v1/completions", headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == 200
        for wrong in ({}, {"authorization": "Bearer third"}, {"authorization": "Basic first"}):
            answer = await http.post("/v1/completions", headers=wrong)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        answer = await http.post("/embed", json={})
        assert (answer.status_code, answer.json()["code"]) == (401, "invalid_api_key")
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
        for path in ("/", "/live", "/ping", "/version", "/metrics", "/openapi.json"):
            assert (await http.get(path)).status_code == 200, path


def test_a_key_file_has_comments_and_hashes() -> None:
    assert keys_in("# mine\n\n one \ntwo\n") == ["one", "two"]
    assert Keys([]).allow(b"")
    for wrong in ("", "a b", "sha256:12", "sha256:xyz"):
        with pytest.raises(ValueError, match="key"):
            Keys([wrong])


async def test_limits_refuse_before_the_app(here: trd.Connection) -> None:
    model = Model()
    app = await front_end(here, openai=model, routes=ROUTES, max_body_bytes=100, max_requests=1)
    async with client(app) as http:
        large = await http.post("/v1/completions", content=b"x" * 101)
        assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")

        async def parts() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b'"' + b"x" * 50

        assert (await http.post("/embed", content=parts())).status_code == 413
        headers = await http.get("/v1/completions", headers={"x": "y" * 70_000})
        assert (headers.status_code, headers.json()["error"]["code"]) == (431, "headers_too_large")
        assert not model.begun.is_set()
        first = asyncio.create_task(http.get("/v1/models"))
        await model.begun.wait()
        assert app.running == 1
        second = await http.post("/v1/completions")
        assert (second.status_code, second.headers["retry-after"]) == (503, "1")
        assert (await http.get("/live")).status_code == 200
        model.go_on.set()
        assert (await first).status_code == 200
        assert (await http.post("/v1/completions")).status_code == 200


async def test_the_id_goes_in_and_out_and_to_the_calls(here: trd.Connection, caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    with caplog.at_level(logging.INFO, "triton_distributed.llm.http.access"):
        async with client(await front_end(here, openai=model, origins=["https://chat"])) as http:
            answer = await http.post("/v1/completions", headers={"x-request-id": "mine", "origin": "https://chat"})
            assert answer.headers["x-request-id"] == "mine"
            assert answer.headers["access-control-allow-origin"] == "https://chat"
            other = await http.post("/v1/completions", headers={"x-request-id": "not valid"})
            assert model.ids == ["mine", other.headers["x-request-id"]]
            await http.get("/health")
    first, second = caplog.messages
    assert first.startswith("mine POST '/v1/completions' 200 model=m tokens=5+2 ")
    assert second.startswith(model.ids[1])
    caplog.clear()
    with caplog.at_level(logging.INFO, "triton_distributed.llm.http.access"):
        async with client(await front_end(here, openai=model, access_log=False)) as http:
            await http.post("/v1/completions")
    assert not caplog.messages


async def test_metrics_have_the_requests_and_those_of_the_connection(here: trd.Connection) -> None:
    async with client(await front_end(here, openai=Model())) as http:
        await http.post("/v1/completions")
        await http.get("/wp-admin/1")
        page = (await http.get("/metrics")).text.splitlines()
    assert 'triton_llm_http_requests_total{model="m",route="/v1/completions",status="200"} 1.0' in page
    assert 'triton_llm_http_requests_total{model="",route="other",status="404"} 1.0' in page
    assert 'triton_llm_http_time_to_first_token_seconds_count{model="m"} 1.0' in page
    assert 'triton_llm_http_time_between_tokens_seconds_count{model="m"} 1.0' in page
    for kind, count in (("prompt", 5), ("cached", 3), ("completion", 2)):
        assert f'triton_llm_http_tokens_total{{kind="{kind}",model="m"}} {count}.0' in page
    assert any(each.startswith("triton_sessions") for each in page)


async def test_each_request_is_counted_with_its_status(here: trd.Connection) -> None:
    ask = {"origin": "https://chat", "access-control-request-method": "POST"}
    async with client(await front_end(here, openai=Model(), keys=["key"], origins=["https://chat"])) as http:
        for path, headers in (
            ("/v1/completions", {}),
            ("/v1/completions", {"authorization": "Bearer key"}),
            ("/live", {}),
        ):
            assert "x-request-id" in (await http.post(path, headers=headers)).headers
        answer = await http.options("/v1/completions", headers=ask)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://chat")
        page = (await http.get("/metrics")).text.splitlines()
    for route, model, status, count in (
        ("/v1/completions", "", 401, 1),
        ("/v1/completions", "m", 200, 1),
        ("/v1/completions", "", 200, 1),
        ("/live", "", 405, 1),
    ):
        name = f'triton_llm_http_requests_total{{model="{model}",route="{route}",status="{status}"}}'
        assert f"{name} {count}.0" in page
    assert "triton_llm_http_in_flight 1.0" in page  # The request for the page itself.


async def test_routes_call_endpoints(here: trd.Connection) -> None:
    async def embed(request: dict[str, str]) -> list[float]:
        return [float(len(request["text"]))]

    async def count(request: int) -> AsyncIterator[int]:
        for each in range(request):
            yield each

    async def any_of(request: Any) -> AsyncIterator[Any]:
        yield request

    app = await front_end(here, routes=ROUTES)
    async with client(app) as http:
        answer = await http.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
        await here.serve(EMBED, embed)
        await here.serve(COUNT, count)
        await here.serve("f.m.any", any_of)
        for each in (EMBED, COUNT, "f.m.any"):
            await here.wait_for_instances(each, timeout=10)
        answer = await http.post("/embed", json={"text": "four"})
        assert (answer.status_code, answer.json()) == (200, [4.0])
        answer = await http.post("/count", json=2)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.text == "data: 0\n\ndata: 1\n\n"
        assert (await http.post("/any", json=[1])).json() == [1]
        assert (await http.post("/any", json=[1], headers={"accept": "text/event-stream"})).text == "data: [1]\n\n"
        bad = await http.post("/embed", content=b"{")
        assert (bad.status_code, bad.json()["code"]) == (400, "invalid_json")
        assert (await http.post("/embed", json={"text": 1})).status_code == 422
        began = asyncio.get_running_loop().time()
        none = await http.post("/no", json=1)
        assert (none.status_code, none.headers["retry-after"]) == (503, "1")
        assert asyncio.get_running_loop().time() - began < 5, "it does not wait for a worker"
        assert (await http.get("/embed")).status_code == 405
        answer = await http.get("/health")
        assert (answer.status_code, answer.json()["routes"]["/embed"]) == (200, 1)
        paths = (await http.get("/openapi.json")).json()["paths"]
        sent = paths["/embed"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert (sent["type"], sent["additionalProperties"]) == ("object", {"type": "string"})
        assert "text/event-stream" in paths["/count"]["post"]["responses"]["200"]["content"]
        assert (await http.get("/v1/models")).json()["error"]["code"] == "unknown_url"
        app.draining = True
        assert (await http.get("/health")).json()["status"] == "draining"


async def test_bodies_of_routes_count_in_the_memory_of_all_requests(here: trd.Connection) -> None:
    held, go_on, begun = Held(500), asyncio.Event(), asyncio.Event()

    async def embed(request: dict[str, str]) -> list[float]:
        begun.set()
        await go_on.wait()
        return []

    await here.serve(EMBED, embed)
    await here.wait_for_instances(EMBED, timeout=10)
    async with client(await front_end(here, routes=ROUTES, held=held)) as http:
        first = asyncio.create_task(http.post("/embed", json={"text": "x" * 60}))
        await begun.wait()
        second = await http.post("/embed", json={"text": "y" * 60})
        assert (second.status_code, second.json()["code"], second.headers["retry-after"]) == (503, "overloaded", "1")
        assert second.json()["request_id"] == second.headers["x-request-id"]
        large = await http.post("/embed", json={"text": "y" * 120})
        assert (large.status_code, large.json()["code"], large.headers.get("retry-after")) == (
            *(413, "request_too_large"),
            None,
        )
        go_on.set()
        assert (await first).status_code == 200
        assert (await http.post("/embed", json={"text": "y" * 60})).status_code == 200


async def test_a_stream_of_a_route_that_the_drain_cuts_ends_with_an_error(here: trd.Connection) -> None:
    left = asyncio.Event()

    async def count(request: int) -> AsyncIterator[int]:
        try:
            yield request
            await asyncio.Event().wait()
        finally:
            left.set()

    await here.serve(COUNT, count)
    await here.wait_for_instances(COUNT, timeout=10)
    app = await front_end(here, routes=ROUTES)
    sent: list[Any] = []
    first = asyncio.Event()

    async def send(message: Any) -> None:
        sent.append(message)
        if message.get("body"):
            first.set()

    bodies = [{"type": "http.request", "body": b"7"}]

    async def receive() -> Any:
        if bodies:
            return bodies.pop()
        return await asyncio.Event().wait()

    scope = {"type": "http", "method": "POST", "path": "/count", "headers": [], "query_string": b""}
    request = asyncio.create_task(app(scope, receive, send))
    await first.wait()
    app.draining = True
    request.cancel()  # As uvicorn does after the time of the drain.
    await request
    assert [each.get("status") for each in sent] == [200, None, None]
    assert sent[1]["body"] == b"data: 7\n\n"
    event, data = sent[2]["body"].decode().split("\n", 1)
    assert (event, sent[2]["more_body"]) == ("event: error", False)
    found = json.loads(data.removeprefix("data: "))
    assert (found["status"], found["code"]) == (503, "unavailable")
    await left.wait()
    assert app.running == 0


def test_options_of_the_command_are_those_of_the_models() -> None:
    parser = argparse.ArgumentParser()
    front_options(parser)
    assert models_options_of(parser.parse_args([])) == {"routing": "kv", "stall_timeout_s": STALL_TIMEOUT_S}
    given = parser.parse_args(["--stall-timeout", "2.5", "--namespace", "n", "--routing", "p2c"])
    assert models_options_of(given) == {"routing": "p2c", "stall_timeout_s": 2.5, "namespace": "n"}


def test_what_is_no_route() -> None:
    assert read_route("PUT /a/b=x.y.z").method == "PUT"
    for wrong in ("/a", "a=x.y.z", "GET /a=x.y.z", "POST /a b=x.y.z", "POST=x.y.z"):
        with pytest.raises(ValueError, match="is not a route"):
            read_route(wrong)


async def test_a_path_is_taken_once(here: trd.Connection) -> None:
    for each in (["/a=x.y.z", "/a=x.y.w"], ["/health=x.y.z"], ["/v1/models=x.y.z"]):
        with pytest.raises(ValueError, match="is taken"):
            await front_end(here, routes=[read_route(one) for one in each])

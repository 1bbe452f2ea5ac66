"""How the way of a request is chosen and explained over HTTP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx
import msgspec
import pytest

from tests.llm.standin import StandIn, StandInModels, echo
from tests.llm.test_openai_api import request_of
from tests.llm.test_worker import connect
from tests.runtime.cluster import until
from triton_distributed.cli import route
from triton_distributed.llm import InvalidParameter, Models, serve_model
from triton_distributed.llm.engines.mock.engine import MockEngine
from triton_distributed.llm.http import openai_app
from triton_distributed.llm.http.explain import Wishes, read_wishes, told
from triton_distributed.llm.http.front import front_end
from triton_distributed.llm.http.head import read_head
from triton_distributed.llm.routing.view import Candidate, Decision, Question
from triton_distributed.names import EndpointName, Instance

MESSAGES = [{"role": "user", "content": "hello"}]


def decided(count: int = 2) -> Decision:
    name = EndpointName("models", "m", "generate")
    found = [Candidate((2**62 + each, 0), Instance(name, 1 + each, ("x",)), cost=float(-each)) for each in range(count)]
    return Decision(chosen=found[1], candidates=found, policy="kv", held_s=0.5)


def test_the_headers_say_the_session_and_what_to_explain():
    assert read_wishes(read_head([(b"accept", b"*/*")])) == Wishes()
    assert read_wishes(read_head([(b"x-session-id", b"s"), (b"x-trd-explain", b"1")])) == Wishes("s", "header")
    assert read_wishes(read_head([(b"x-trd-explain", b"only")])) == Wishes("", "only")
    for off in (b"", b"0", b"false"):
        assert read_wishes(read_head([(b"x-trd-explain", off)])) == Wishes()
    assert read_wishes(read_head([(b"x-trd-explain", b"ONLY")])) == Wishes("", "only")
    with pytest.raises(InvalidParameter, match="x-trd-explain: expected 1 or only, got 'yes'"):
        read_wishes(read_head([(b"x-trd-explain", b"yes")]))


def test_the_header_has_the_chosen_candidate_and_the_best_of_many_others():
    found = json.loads(told(decided(50), 7, 4))
    assert (found["policy"], found["tokens"], found["held_s"], found["omitted"]) == ("kv", 7, 0.5, 46)
    ids = [int(each["instance"]) - 2**62 for each in found["candidates"]]
    assert ids == [1, 49, 48, 47]
    assert found["chosen"] == str(2**62 + 1)
    assert "omitted" not in json.loads(told(decided(), 7))


@pytest.mark.parametrize(
    ("headers", "fields", "session"),
    [
        ({}, {}, ""),
        ({}, {"user": "u"}, "u"),
        ({}, {"user": "u", "prompt_cache_key": "k"}, "k"),
        ({"x-session-id": "h"}, {"user": "u", "prompt_cache_key": "k"}, "h"),
    ],
)
async def test_a_request_names_its_session(headers: dict[str, str], fields: dict[str, str], session: str):
    model = StandIn(echo)
    async with client_of(openai_app(StandInModels(model))) as http:
        body = {"model": "org/tiny", "messages": MESSAGES, "n": 2, **fields}
        assert (await http.post("/v1/chat/completions", json=body, headers=headers)).status_code == 200
    assert model.sessions == [session] * 2


def client_of(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front")


async def test_a_response_tells_its_route_if_it_is_asked_to():
    model = StandIn(echo)
    model.decision = decided()
    async with client_of(openai_app(StandInModels(model))) as http:
        for stream in (False, True):
            for count in (1, 2):
                body = {"model": "org/tiny", "messages": MESSAGES, "stream": stream, "n": count}
                answer = await http.post("/v1/chat/completions", json=body, headers={"x-trd-explain": "1"})
                assert json.loads(answer.headers["x-trd-route"])["chosen"] == str(2**62 + 1)
                answer = await http.post("/v1/chat/completions", json=body)
                assert "x-trd-route" not in answer.headers
        asked = len(model.asked)
        answer = await http.post(
            "/v1/completions", json={"model": "org/tiny", "prompt": "a"}, headers={"x-trd-explain": "only"}
        )
        assert answer.json() == json.loads(told(decided(), 1))
        model.decision = None
        answer = await http.post(
            "/v1/completions", json={"model": "org/tiny", "prompt": "a"}, headers={"x-trd-explain": "only"}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_router")
        assert len(model.asked) == asked


async def test_embeddings_are_not_computed_for_a_caller_that_wants_an_explanation_only():
    body = {"model": "org/tiny", "input": "a"}
    async with client_of(openai_app(StandInModels(StandIn(echo, embeddings=True)))) as http:
        answer = await http.post("/v1/embeddings", json=body, headers={"x-trd-explain": "only"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-trd-explain")
        assert (await http.post("/v1/embeddings", json=body, headers={"x-trd-explain": "1"})).status_code == 200


def nothing(question: Question, candidates: Sequence[Candidate]) -> Any:
    return None


async def test_a_failing_policy_of_ones_own_is_named_in_the_log(caplog: pytest.LogCaptureFixture):
    async with connect() as worker, connect() as here, Models(here, routing=nothing) as models:
        await serve_model(worker, MockEngine())
        model = await models.wait_for("mock", 10)
        await until(lambda: model.routed is not None and model.routed.states())
        async with client_of(openai_app(models)) as http:
            body = {"model": "mock", "prompt": "a", "max_tokens": 1}
            for headers in ({}, {"x-trd-explain": "only"}):
                answer = await http.post("/v1/completions", json=body, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (500, "policy_failed")
                assert "routing policy nothing returned None instead of a candidate" in caplog.messages
                caplog.clear()


async def test_a_salt_of_the_cache_reaches_only_an_engine_that_heeds_it():
    body = {"model": "org/tiny", "messages": MESSAGES, "cache_salt": "s"}
    for fields, status, salts in (((), 400, []), (("cache_salt",), 200, ["s"])):
        model = StandIn(echo, extra_fields=fields)
        sent = await request_of(openai_app(StandInModels(model)), body)
        assert sent[0]["status"] == status
        assert [each.cache_salt for each in model.asked] == salts


async def test_a_front_end_explains_and_its_health_tells_the_routing(capsys: pytest.CaptureFixture[str]):
    async with connect() as one, connect() as two, connect() as here, Models(here) as models:
        ids = {str((await serve_model(each, MockEngine())).instance.id) for each in (one, two)}
        model = await models.wait_for("mock", 10)
        prompt = "a prompt of some blocks " * 20
        app = await front_end(here, openai=openai_app(models), models=models, access_log=False)
        async with client_of(app) as http:
            body = {"model": "mock", "prompt": prompt, "max_tokens": 1}
            first = await http.post("/v1/completions", json=body)  # It may begin before the router knows a worker.
            assert first.status_code == 200
            answer = await http.post("/v1/completions", json=body, headers={"x-trd-explain": "1"})
            found = json.loads(answer.headers["x-trd-route"])
            assert {each["instance"] for each in found["candidates"]} == ids
            assert found["chosen"] in ids
            assert found["tokens"] == len(prompt)
            only = (await http.post("/v1/completions", json=body, headers={"x-trd-explain": "only"})).json()
            assert {each["instance"] for each in only["candidates"]} == ids
            assert all(each["waiting"] == each["running"] == 0 for each in only["candidates"])
            health = (await http.get("/health")).json()
            assert health["routing"]["mock"]["policy"] == "kv"
            assert {*health["routing"]["mock"]["workers"]} == {f"{each}/0" for each in ids}
            assert health["routing"]["mock"]["warnings"] == []
            page = (await http.get("/metrics")).text
            assert 'triton_llm_route_decisions_total{mode="' in page
            assert 'triton_llm_route_cached_tokens_count{kind="believed",model="mock"}' in page
        lines = route.shown(only)
        assert lines[0] == f"policy kv, {len(prompt)} tokens"
        assert [line[0] for line in lines[2:]].count("*") == 1
        assert model.routed is not None
        states = model.routed.states()
        model.routed.states = lambda: [msgspec.structs.replace(each, silent=True) for each in states]  # type: ignore[method-assign]
        async with client_of(app) as http:
            (warning, _) = (await http.get("/health")).json()["routing"]["mock"]["warnings"]
        assert "should report its KV cache, and has not" in warning

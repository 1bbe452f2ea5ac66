"""Slips in a program are told at once, in words that name the public API."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, patiently, until
from tests.runtime.programs import program
from triton_distributed.errors import AlreadyServed, ConfigError
from triton_distributed.runtime import Context, triton_worker


async def echo(request: Any) -> Any:
    return request


async def of(request: Any, context: Context) -> Any:
    return type(context.metadata).__name__


# --- options of a call ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["round_robin", "random", "least_loaded", "p2c", lambda _, found, load: found[0]])
async def test_every_verb_takes_a_policy_as_client_does(policy: Any, cluster: Cluster) -> None:
    client = await cluster.connect(echo)
    assert await patiently(client.call(1, policy=policy)) == 1
    assert await patiently(drained(client.generate(2, annotated=False, policy=policy))) == [2]
    hedged = client.call(3, policy=policy, idempotent=True, hedge_after_s=60)
    assert await patiently(hedged) == 3


async def test_a_named_policy_of_a_call_takes_its_turns_from_call_to_call(cluster: Cluster) -> None:
    async def who(request: Any) -> int:
        number: int = request
        return number

    for _ in range(3):
        await cluster.worker(who)
    client = await cluster.client(policy="random")
    await until(lambda: len(client.instance_ids()) == 3)
    asked = []
    for n in range(6):
        stream = client.generate(n, policy="round_robin")
        await patiently(drained(stream))
        assert stream.instance_id is not None
        asked.append(stream.instance_id)
    assert sorted(asked) == sorted(client.instance_ids() * 2)


@pytest.mark.parametrize(
    ("verb", "slip", "help"),
    [
        ("generate", "timout", "; did you mean 'timeout'?"),
        ("generate", "polcy", "; did you mean 'policy'?"),
        ("round_robin", "timout", "; did you mean 'timeout'?"),
        ("random", "idempotant", "; did you mean 'idempotent'?"),
        ("direct", "timout", "; did you mean 'timeout'?"),
        ("call", "timout", "; did you mean 'timeout'?"),
        ("call", "hedge_after", "; did you mean 'hedge_after_s'?"),
        ("call", "annotated", "; call() always returns the plain value"),
        ("round_robin", "policy", ""),
        ("call", "encoded", ""),
        ("generate", "unary", ""),
    ],
)
async def test_an_option_that_does_not_exist_names_the_public_method(
    verb: str, slip: str, help: str, cluster: Cluster
) -> None:
    client = await cluster.connect(echo)
    arguments = (1, client.instance_ids()[0]) if verb == "direct" else (1,)
    with pytest.raises(TypeError) as caught:
        await getattr(client, verb)(*arguments, **{slip: 3})
    assert str(caught.value) == f"Client.{verb}() got an unexpected keyword argument '{slip}'{help}"


async def test_an_option_of_an_endpoint_that_does_not_exist_is_named(cluster: Cluster) -> None:
    endpoint = cluster.runtime().endpoint("t.c.e")
    with pytest.raises(TypeError) as caught:
        endpoint.serve_endpoint(echo, max_infligth=8)  # type: ignore[call-arg]
    words = "Endpoint.serve_endpoint() got an unexpected keyword argument 'max_infligth'; did you mean 'max_inflight'?"
    assert str(caught.value) == words
    endpoint.serve_endpoint(echo, True, None, max_inflight=8)  # The endpoint is free.


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"policy": "roundrobin"}, ConfigError, "one of round_robin, random"),
        ({"context": "req-1"}, TypeError, r"context='req-1': must be a Context"),
        ({"metadata": [1]}, TypeError, r"metadata=\[1\]: must be a mapping"),
        ({"timeout": "5"}, ValueError, "timeout='5': must be a number of seconds"),
        ({"priority": "high"}, TypeError, "priority='high': must be a whole number"),
    ],
)
async def test_an_option_of_another_kind_is_told_at_the_call(
    options: dict[str, Any], error: type[Exception], words: str, cluster: Cluster
) -> None:
    client = await cluster.connect(echo)
    with pytest.raises(error, match=words):
        client.generate(1, **options)
    assert client.stats.inflight == 0


def test_a_context_says_what_it_is_made_of() -> None:
    with pytest.raises(TypeError, match="id=5: the id of a context must be a str"):
        Context(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"metadata=\['a'\]: must be a mapping"):
        Context("id", ["a"])  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"metadata": {"a": 1}}, {"context": Context("id", {"a": 1})}], ids=str)
async def test_metadata_is_read_only_whoever_called(options: dict[str, Any], cluster: Cluster) -> None:
    """Whether a handler may write to it must not depend on its caller."""
    client = await cluster.connect(of)
    assert await patiently(client.call(1, **options)) == "mappingproxy"
    given = {"a": 1}
    context = Context(metadata=given)
    given["b"] = 2
    assert dict(context.metadata) == {"a": 1}


def keyword_only(request: Any, *, context: Context) -> Any:
    return context.id()


async def keyword_only_coroutine(request: Any, *, ctx: Context) -> Any:
    return ctx.id()


async def keyword_only_generator(request: Any, *, context: Context | None = None) -> AsyncIterator[Any]:
    assert context is not None
    yield context.id()


class Method:
    async def generate(self, request: Any, *, context: Context) -> AsyncIterator[Any]:
        yield context.id()


@pytest.mark.parametrize(
    "handler",
    [keyword_only, keyword_only_coroutine, keyword_only_generator, Method().generate],
    ids=lambda each: each.__qualname__,
)
async def test_a_keyword_only_context_is_given(handler: Any, cluster: Cluster) -> None:
    client = await cluster.connect(handler)
    assert await patiently(client.call(1, context=Context("mine"))) == "mine"


async def test_a_parameter_that_no_request_gives_is_refused_when_it_is_served(cluster: Cluster) -> None:
    async def handler(request: Any, *, tenant: str) -> Any:
        return tenant

    with pytest.raises(TypeError, match="keyword-only parameter `tenant` without a default"):
        cluster.runtime().endpoint("t.c.e").serve_endpoint(handler)  # type: ignore[arg-type]


# --- serving --------------------------------------------------------------------------------------------------------


async def test_serving_an_endpoint_twice_raises_from_the_call(cluster: Cluster) -> None:
    runtime = cluster.runtime()
    first = runtime.endpoint("t.c.e").serve_endpoint(echo)
    with pytest.raises(AlreadyServed, match="t/components/c/e"):
        runtime.endpoint("t.c.e").serve_endpoint(of)  # at once, before the first is registered
    client = await cluster.client()
    with pytest.raises(AlreadyServed):
        runtime.endpoint("t.c.e").serve_endpoint(of)
    assert await patiently(client.call("old")) == "old"
    first.cancel()
    await asyncio.wait([first])
    runtime.endpoint("t.c.e").serve_endpoint(of)  # free again
    await until(client.instance_ids)
    assert await patiently(client.call("new")) == "mappingproxy"


async def test_an_invalid_handler_leaves_the_endpoint_free(cluster: Cluster) -> None:
    runtime = cluster.runtime()
    with pytest.raises(TypeError):
        runtime.endpoint("t.c.e").serve_endpoint(5)  # type: ignore[arg-type]
    runtime.endpoint("t.c.e").serve_endpoint(echo)
    client = await cluster.client()
    assert await patiently(client.call(1)) == 1


async def _worker(runtime: Any, how: Any) -> str:
    serving = runtime.endpoint("t.c.e").serve_endpoint(echo)
    await how(serving)
    return "returned"


async def _not_at_all(serving: asyncio.Task[None]) -> None:
    await asyncio.sleep(0)


async def _by_wait(serving: asyncio.Task[None]) -> None:
    await asyncio.wait([serving], timeout=0.01)


async def _by_gather(serving: asyncio.Task[None]) -> None:
    gathered = asyncio.gather(serving)
    await asyncio.sleep(0)
    gathered.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await gathered


@pytest.mark.parametrize(("how", "warned"), [(_not_at_all, True), (_by_wait, False), (_by_gather, False)])
async def test_a_worker_that_forgot_to_await_is_told_so(
    how: Any, warned: bool, trd_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRD_HANDLE_SIGNALS", "0")
    with caplog.at_level(logging.WARNING):
        assert await patiently(triton_worker(_worker)(how)) == "returned"
    assert ("t.c.e: serve_endpoint() was not awaited" in caplog.text) == warned


# --- the decorator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decorate", [triton_worker, triton_worker()])
async def test_triton_worker_with_and_without_parentheses(decorate: Any, trd_dir: Path) -> None:
    @decorate
    async def worker(runtime: Any, a: int, b: int = 2) -> Any:
        return runtime.instance_id > 0, a, b

    assert await patiently(worker(1, b=3)) == (True, 1, 3)
    assert worker.__name__ == "worker"


def test_triton_worker_of_something_else() -> None:
    with pytest.raises(TypeError, match="triton_worker decorates"):
        triton_worker(5)  # type: ignore[call-overload]


async def test_a_client_that_never_awaited_its_worker_ends_with_words(tmp_path: Path) -> None:
    code = """
import asyncio
from triton_distributed.runtime import triton_worker

async def handler(request):
    yield 1

@triton_worker
async def main(runtime):
    runtime.endpoint("t.c.e").serve_endpoint(handler)

asyncio.run(main())
"""
    async with program(tmp_path, code, environment={"TRD_DIR": str(tmp_path / "trd")}) as running:
        _, err = await running.output()
        assert await running.ended() == 0
    assert "serve_endpoint() was not awaited" in err

"""A runtime belongs to one event loop in one thread; whatever else uses it is told so, and by whom it can be used."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, patiently, turns, until
from triton_distributed.config import Config
from triton_distributed.errors import WrongLoop
from triton_distributed.runtime import Context, DistributedRuntime

CONFIG = Config(discovery="memory", handle_signals=False)


async def endless(request: Any) -> AsyncIterator[int]:
    n = 0
    while True:
        yield n
        n += 1
        await asyncio.sleep(0)


class Things:
    """What a program may hold of a runtime."""

    def __init__(self, runtime: DistributedRuntime, client: Any, stream: Any, context: Context) -> None:
        self.runtime, self.client, self.stream, self.context = runtime, client, stream, context
        self.endpoint = runtime.endpoint("t.c.other")
        self.component = runtime.namespace("t").component("c")


USES: dict[str, Callable[[Things], Any]] = {
    "generate": lambda it: it.client.generate(1),
    "round_robin": lambda it: it.client.round_robin(1),
    "random": lambda it: it.client.random(1),
    "direct": lambda it: it.client.direct(1, it.client.instance_ids()[0]),
    "call": lambda it: it.client.call(1),
    "wait_for_instances": lambda it: it.client.wait_for_instances(),
    "client": lambda it: it.endpoint.client(),
    "serve_endpoint": lambda it: it.endpoint.serve_endpoint(endless),
    "pause": lambda it: it.endpoint.pause(),
    "resume": lambda it: it.endpoint.resume(),
    "create_service": lambda it: it.component.create_service(),
    "publish": lambda it: it.component.publish("news", 1),
    "subscribe": lambda it: it.component.subscribe("news"),
    "queue": lambda it: it.component.queue("jobs"),
    "close": lambda it: it.runtime.close(),
    "anext": lambda it: anext(it.stream),
    "async for": lambda it: _first(it.stream),
    "aclose": lambda it: it.stream.aclose(),
    "cancel": lambda it: it.stream.cancel(),
    "stop_generating": lambda it: it.context.stop_generating(),
    "kill": lambda it: it.context.kill(),
}


async def _first(stream: Any) -> Any:
    async for item in stream:
        return item
    return None


def _step(found: Any) -> None:
    """The first step of a coroutine, without a loop."""
    if hasattr(found, "__await__"):
        steps = found.__await__()
        try:
            steps.send(None)
        except StopIteration:
            pass
        finally:
            steps.close()


async def _use(use: Callable[[Things], Any], things: Things) -> Any:
    for _ in range(1000):  # items of a message that was taken before may be read anywhere
        found = use(things)
        if hasattr(found, "__await__"):
            found = await found
    return found


async def _open(cluster: Cluster) -> Things:
    await cluster.worker(endless)
    client = await cluster.client()
    context = Context()
    stream = client.generate(1, annotated=False, context=context)
    await patiently(anext(stream))
    return Things(cluster.caller, client, stream, context)


@pytest.mark.parametrize("with_a_loop", [False, True])
@pytest.mark.parametrize("name", USES)
async def test_another_thread_is_told_so(name: str, with_a_loop: bool, cluster: Cluster) -> None:
    things = await _open(cluster)
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            if with_a_loop:
                asyncio.run(_use(USES[name], things))
            else:
                for _ in range(1000):
                    _step(USES[name](things))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere, name="elsewhere")
    thread.start()
    await until(lambda: not thread.is_alive())
    [error] = errors
    assert isinstance(error, WrongLoop), error
    assert 'belongs to the event loop of thread "MainThread"' in str(error)
    assert "run_coroutine_threadsafe" in str(error)
    await turns()
    assert not things.runtime.closing
    things.stream.cancel()


def test_another_loop_in_the_same_thread_is_told_so() -> None:
    kept: list[Things] = []

    async def first() -> None:
        runtime = DistributedRuntime(config=replace(CONFIG, drain_timeout_s=0.0))
        serving = runtime.endpoint("t.c.e").serve_endpoint(endless)
        client = await runtime.endpoint("t.c.e").client()
        await client.wait_for_instances()
        context = Context()
        stream = client.generate(1, annotated=False, context=context)
        await anext(stream)
        kept.append(Things(runtime, client, stream, context))
        runtime.shutdown()
        await serving

    asyncio.run(first())
    [things] = kept
    for name in ("generate", "call", "wait_for_instances", "client", "serve_endpoint", "publish", "close"):

        async def second(name: str = name) -> None:
            with pytest.raises(WrongLoop, match="event loop that this thread ran before"):
                await _use(USES[name], things)

        asyncio.run(second())


async def test_a_shutdown_may_be_asked_for_in_any_thread(cluster: Cluster) -> None:
    runtime = cluster.runtime()
    serving = await cluster.serve(runtime, endless)
    thread = threading.Thread(target=runtime.shutdown)
    thread.start()
    await patiently(serving)
    await until(lambda: not thread.is_alive())
    await patiently(runtime.close())


async def test_a_token_may_be_cancelled_in_any_thread(cluster: Cluster) -> None:
    token = cluster.caller.child_token()
    waiting = token.cancelled()
    thread = threading.Thread(target=token.cancel)
    thread.start()
    await patiently(waiting)
    await until(lambda: not thread.is_alive())
    assert token.is_cancelled()


async def test_a_plain_handler_may_hand_its_call_over(cluster: Cluster) -> None:
    """What the error's text recommends works."""

    async def echo(request: Any) -> Any:
        return request

    await cluster.worker(echo, "t.c.echo")
    client = await cluster.client("t.c.echo")

    def handler(request: Any) -> Any:
        with pytest.raises(WrongLoop):
            client.generate(request)
        return asyncio.run_coroutine_threadsafe(client.call(request), cluster.caller.event_loop()).result(60)

    outer = await cluster.connect(handler)
    assert await patiently(outer.call("through")) == "through"

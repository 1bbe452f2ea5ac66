"""The fixtures `trd` and `trd_sync`, as tests of a program use them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

import triton_distributed
from tests.testing.contracts import LENGTHS, LETTERS, TWICE, UPPER, Text, lengths, letters, plain_letters, twice, upper
from tests.timing import PATIENCE_S
from triton_distributed import Context, StreamIncomplete, connect, connect_sync, here, serve
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.testing import LeftOver, LocalConnection, LocalNetwork, LocalSyncConnection


async def test_an_endpoint_can_be_called_when_serve_returns(trd: LocalConnection) -> None:
    await trd.serve(upper)
    await trd.serve(LETTERS, letters)
    assert await trd.call(UPPER, Text("a")) == Text("A")
    assert [each.text async for each in trd.stream(LETTERS, Text("abc"))] == ["a", "b", "c"]


async def test_every_connection_of_the_test_reaches_the_same_network(trd: LocalConnection, tmp_path) -> None:
    await trd.serve(upper)
    elsewhere = triton_distributed.Config(discovery="file", directory=tmp_path)
    async with connect(elsewhere) as other:
        assert await other.call(UPPER, Text("a")) == Text("A")
    async with DistributedRuntime() as runtime:
        client = await runtime.endpoint(str(UPPER.name)).client()
        assert (await client.call({"text": "b"}))["text"] == "B"
    assert not list(tmp_path.iterdir())


async def test_a_handler_is_a_plain_function_whose_calls_use_the_fixture(trd: LocalConnection) -> None:
    await trd.serve(upper)
    assert upper(Text("a")) == Text("A")
    assert await twice(Text("a")) == Text("AA")
    assert here() is trd


async def test_a_context_can_be_made_for_a_unit_test() -> None:
    @serve("t.fixture.context")
    async def named(request: str, context: Context) -> str:
        return f"{request} {context.id()}"

    assert await named("a", Context(id="r-1")) == "a r-1"


async def test_a_worker_that_is_killed_breaks_its_streams_and_another_takes_over(trd: LocalConnection) -> None:
    cancelled = asyncio.Event()

    async def endless(request: Text) -> AsyncIterator[Text]:
        try:
            while True:
                yield request
                await asyncio.sleep(0)
        finally:
            cancelled.set()

    one, other = await trd.worker(), await trd.worker()
    await one.serve(LETTERS, endless)
    items = trd.stream(LETTERS, Text("a"))
    assert await anext(items) == Text("a")
    await other.serve(LETTERS, letters)
    await trd.wait_for_instances(LETTERS, 2, timeout=PATIENCE_S)
    await one.kill()
    with pytest.raises(StreamIncomplete):
        async for _ in items:
            pass
    await asyncio.wait_for(cancelled.wait(), PATIENCE_S)
    assert [each.text async for each in trd.stream(LETTERS, Text("ab"))] == ["a", "b"]
    assert len(await trd.instances(LETTERS)) == 1


async def test_a_worker_has_settings_of_its_own(trd: LocalConnection) -> None:
    worker = await trd.worker(drain_timeout_s=0.5)
    assert (worker.runtime.config.drain_timeout_s, worker.runtime.config.discovery) == (0.5, "memory")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.leaves("descriptors", reason="the loop of the module ends later")
async def test_the_fixture_is_on_the_loop_of_its_test(trd: LocalConnection) -> None:
    assert trd.runtime.event_loop() is asyncio.get_running_loop()


async def test_a_network_for_fixtures_of_another_scope() -> None:
    async with LocalNetwork() as one:
        await one.serve(upper)
        async with connect() as other:
            assert await other.call(UPPER, Text("a")) == Text("A")


async def test_a_network_names_what_is_left() -> None:
    async def forgotten() -> None:
        await asyncio.Event().wait()

    with pytest.raises(LeftOver, match="task the forgotten one waits at .*in .*forgotten"):
        async with LocalNetwork():
            task = asyncio.create_task(forgotten(), name="the forgotten one")
    task.cancel()


# virtual time


@pytest.mark.virtual_time
async def test_minutes_take_a_moment_and_plain_handlers_run(trd: LocalConnection) -> None:
    async def slow(request: Text) -> Text:
        await asyncio.sleep(600)
        return request

    await trd.serve(UPPER, slow)
    await trd.serve(LETTERS, plain_letters)
    began = asyncio.get_running_loop().time()
    assert await trd.call(UPPER, Text("a"), timeout=700) == Text("a")
    assert asyncio.get_running_loop().time() - began >= 600
    assert [each.text async for each in trd.stream(LETTERS, Text("ab"))] == ["a", "b"]


# plain tests


def test_a_plain_test_serves_and_calls(trd_sync: LocalSyncConnection) -> None:
    served = trd_sync.serve(upper)
    trd_sync.serve(LETTERS, plain_letters)
    trd_sync.serve(lengths)
    assert trd_sync.call(UPPER, Text("a")) == Text("A")
    assert [each.text for each in trd_sync.stream(LETTERS, Text("ab"))] == ["a", "b"]
    assert list(trd_sync.stream(LENGTHS, [Text("a"), Text("bcd")])) == [1, 3]
    assert served.name == UPPER.name
    served.stop()
    assert "stopped" in repr(served)


at_import = connect_sync()


@pytest.mark.parametrize("run", [1, 2])
def test_a_connection_that_was_made_at_import_reaches_each_test(trd_sync: LocalSyncConnection, run: int) -> None:
    trd_sync.serve(UPPER, lambda request: Text(f"{request.text} of {run}"))
    assert at_import.call(UPPER, Text("a"), timeout=PATIENCE_S) == Text(f"a of {run}")


def test_other_loops_and_processes_reach_a_plain_test(trd_sync: LocalSyncConnection) -> None:
    async def calls() -> Text:
        async with connect() as other:
            return await other.call(UPPER, Text("a"))

    trd_sync.serve(upper)
    assert asyncio.run(calls()) == Text("A")
    program = f"import triton_distributed as trd\nprint(trd.connect_sync().call('{UPPER.name}', {{'text': 'b'}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "{'text': 'B'}", done.stderr


def test_a_worker_of_a_plain_test_can_be_killed(trd_sync: LocalSyncConnection) -> None:
    worker = trd_sync.worker()
    worker.serve(letters)
    items = trd_sync.stream(LETTERS, Text("a" * 10_000))
    assert next(items) == Text("a")
    worker.kill()
    with pytest.raises(StreamIncomplete):
        list(items)


def test_nested_calls_of_a_plain_test(trd_sync: LocalSyncConnection) -> None:
    trd_sync.serve(upper)
    trd_sync.serve(twice)
    assert trd_sync.call(TWICE, Text("a")) == Text("AA")

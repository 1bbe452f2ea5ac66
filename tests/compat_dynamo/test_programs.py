"""Programs of Dynamo, as processes of their own."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from tests.compat_dynamo import programs
from tests.runtime.programs import DEPRECATED, Program, program
from tests.timing import PATIENCE_S
from triton_distributed.compat.dynamo import DistributedRuntime

pytest.importorskip("uvloop")
pytest.importorskip("pydantic")


async def run(folder: Path, code: str, *arguments: str, environment: dict[str, str] | None = None) -> list[str]:
    """A program's output, when it has ended well."""
    async with program(folder, code, *arguments, environment=environment, options=DEPRECATED) as running:
        out, err = await running.output()
        assert await running.ended() == 0, err
        assert not err
        return out.splitlines()


async def ended_well(*workers: Program) -> None:
    for each in workers:
        each.signal(signal.SIGTERM)
    for each in workers:
        assert await each.ended() == 0


async def test_hello_world_with_dynamos_own_variables(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir(mode=0o755)
    environment = {"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(tmp_path / "kv"), "DYN_REQUEST_PLANE": "tcp"}
    async with program(tmp_path, programs.HELLO_SERVER, environment=environment, options=DEPRECATED) as server:
        lines = await run(tmp_path, programs.HELLO_CLIENT, environment=environment)
        assert lines == ["Hello world!", "Hello sun!", "Hello moon!"]
        await ended_well(server)
        _, err = await server.output()
        assert "[backend] received world,sun,moon" in err


@pytest.mark.parametrize("how", ["break", "to the end"])
async def test_a_stop_ends_the_stream_and_the_handler_hears_of_it(how: str, trd_dir: Path, tmp_path: Path) -> None:
    async with (
        program(tmp_path, programs.CANCEL_SERVER, options=DEPRECATED) as server,
        program(tmp_path, programs.CANCEL_CLIENT, "demo.server.generate", how, options=DEPRECATED) as client,
    ):
        assert await client.line() == "client: [0, 1, 2] True"
        assert await server.line() == "server: stopped False"
        assert client.process.returncode is None
        await ended_well(server)


async def test_a_stop_passes_through_a_middle_worker(trd_dir: Path, tmp_path: Path) -> None:
    async with (
        program(tmp_path, programs.CANCEL_SERVER, options=DEPRECATED) as server,
        program(tmp_path, programs.CANCEL_MIDDLE, options=DEPRECATED) as middle,
        program(tmp_path, programs.CANCEL_CLIENT, "demo.middle.generate", "break", options=DEPRECATED) as client,
    ):
        assert await client.line() == "client: [0, 1, 2] True"
        assert await middle.line() == "middle: backend stream ended True"
        assert await server.line() == "server: stopped False"
        assert client.process.returncode is None
        await ended_well(middle, server)


async def test_unary(trd_dir: Path, tmp_path: Path) -> None:
    async with program(tmp_path, programs.UNARY, "serve", options=DEPRECATED) as server:
        lines = await run(tmp_path, programs.UNARY, "call")
        assert lines == ["{'sum': 3, 'tenant': 'alpha'}", "ValueError: b is missing"]
        await ended_well(server)


async def test_bidirectional(trd_dir: Path, tmp_path: Path) -> None:
    async with program(tmp_path, programs.BIDIRECTIONAL, "serve", options=DEPRECATED) as server:
        assert await run(tmp_path, programs.BIDIRECTIONAL, "call") == ["HI", "THERE", "bye"]
        await ended_well(server)


async def test_push_from_a_thread(trd_dir: Path, tmp_path: Path) -> None:
    async with program(tmp_path, programs.PUSH, "serve", options=DEPRECATED) as server:
        assert await run(tmp_path, programs.PUSH, "call") == ["True", "[0, 1, 2]"]
        assert await server.line() == "engine: left"
        await ended_well(server)


@pytest.mark.parametrize("how", ["signal", "nothing"])
async def test_a_drain_finishes_what_runs(how: str, trd_dir: Path, tmp_path: Path) -> None:
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    try:
        async with program(tmp_path, programs.DRAIN, how, options=DEPRECATED) as server:
            client = await runtime.endpoint("drain.backend.generate").client()
            await asyncio.wait_for(client.wait_for_instances(), PATIENCE_S)
            stream = await client.generate(0.3, annotated=False)
            items = []
            async for item in stream:
                items.append(item)
                if item == "begun":
                    server.signal(signal.SIGTERM)
            assert items == ["begun", "done"]
            assert await server.line() == "drained"
            assert await server.ended() == 0
    finally:
        await runtime.native.close()


@pytest.mark.leaves("socket files", reason="SIGKILL ends the worker without cleaning up")
async def test_a_killed_worker_is_a_value_error(trd_dir: Path, tmp_path: Path) -> None:
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    try:
        async with program(tmp_path, programs.CANCEL_SERVER, options=DEPRECATED) as server:
            client = await runtime.endpoint("demo.server.generate").client()
            await asyncio.wait_for(client.wait_for_instances(), PATIENCE_S)
            items = []
            with pytest.raises(ValueError, match="Stream ended before generation completed"):
                async for item in await client.generate(1):
                    items.append(item.data())
                    if len(items) == 2:
                        server.signal(signal.SIGKILL)
            assert items[:2] == [0, 1]
            await server.ended()
        with pytest.raises(ValueError, match="No workers available|Cannot connect"):
            async for _ in await client.generate(1):
                pass
    finally:
        await runtime.native.close()


async def test_sleep_and_wake(tmp_path: Path) -> None:
    assert await run(tmp_path, programs.SLEEP_WAKE) == ["No workers available", "[1]", "True tcp"]


async def test_pipeline_with_a_middle_worker(trd_dir: Path, tmp_path: Path) -> None:
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    try:
        async with (
            program(tmp_path, programs.PIPELINE, "backend", options=DEPRECATED) as backend,
            program(tmp_path, programs.PIPELINE, "middle", options=DEPRECATED) as middle,
            program(tmp_path, programs.PIPELINE, "frontend", options=DEPRECATED) as frontend,
        ):
            client = await runtime.endpoint("pipeline.frontend.generate").client()
            await asyncio.wait_for(client.wait_for_instances(), PATIENCE_S)
            stream = await client.generate('{"text": "a b"}')
            assert [each.data()["text"] async for each in stream] == ["a-m-f", "b-f-m-b-m-f"]
            with pytest.raises(ValueError, match="Invalid request"):
                async for _ in await client.generate({"texts": 1}):
                    pass
            await ended_well(frontend, middle, backend)
    finally:
        await runtime.native.close()

"""The original's programs, as processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

import pytest

from tests.compat import originals
from tests.runtime.cluster import Cluster, drained, patiently, until
from tests.runtime.programs import DEPRECATED, Program, program
from tests.timing import PATIENCE_S

pytest.importorskip("uvloop")


async def run(folder: Path, code: str, *arguments: str) -> list[str]:
    """A program's output, when it has ended well."""
    async with program(folder, code, *arguments, options=DEPRECATED) as running:
        out, err = await running.output()
        assert await running.ended() == 0, err
        # A client says so if a worker takes long to register, as it does on a busy machine.
        assert not [line for line in err.splitlines() if ": no instance yet; waiting for a worker" not in line]
        return out.splitlines()


async def ended_well(worker: Program) -> None:
    worker.signal(signal.SIGINT)
    assert await worker.ended() == 0


async def test_hello_world(trd_dir: Path, tmp_path: Path) -> None:
    async with program(tmp_path, originals.SERVER, options=DEPRECATED) as server:
        assert (await server.line()).startswith("Started server instance ")
        lines = await run(tmp_path, originals.CLIENT)
        assert lines == ["endpoints 1", "hello world", "direct hi", "abc", "abc"]
        assert await server.line() == "Received request: hello world"
        await ended_well(server)


async def test_hello_world_with_two_servers(unix: Cluster, tmp_path: Path) -> None:
    async with (
        program(tmp_path, originals.SERVER, options=DEPRECATED) as one,
        program(tmp_path, originals.SERVER, options=DEPRECATED) as other,
    ):
        client = await unix.caller.namespace("triton-init").component("backend").endpoint("generate").client()
        await until(lambda: len(client.endpoint_ids()) == 2)
        for _ in range(4):
            assert "".join([each.data() async for each in await client.generate("rapid")]) == "rapid"
        for server in (one, other):
            assert (await server.line()).startswith("Started")
            assert await server.line() == "Received request: rapid"
            assert await server.line() == "Received request: rapid"
            await ended_well(server)


async def test_error_handling(trd_dir: Path, tmp_path: Path) -> None:
    async with program(tmp_path, originals.ERRORS, "server", options=DEPRECATED) as server:
        lines = await run(tmp_path, originals.ERRORS, "client")
        assert lines == [
            *[f"Annotated(data='{char}', event=None, comment=[], id=None)" for char in "hello "],
            "caught ValueError: w is not allowed",
            "called",
        ]
        await ended_well(server)
        assert (await server.output())[0] == "served\n"


async def test_typed(trd_dir: Path, tmp_path: Path) -> None:
    async with program(tmp_path, originals.TYPED, "server", options=DEPRECATED) as server:
        assert await run(tmp_path, originals.TYPED, "client") == ["typed", "True True"]
        await ended_well(server)


async def test_pipeline_of_processes_started_in_any_order(trd_dir: Path, tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        stages = [
            await stack.enter_async_context(program(tmp_path, originals.PIPELINE, stage, options=DEPRECATED))
            for stage in ("frontend", "middle", "backend")
        ]
        lines = await run(tmp_path, originals.PIPELINE, "client")
        assert lines == ["hello from", "frontend", "middle", "backend"]
        for stage in stages:
            await ended_well(stage)


async def test_a_frontend_over_several_backends(trd_dir: Path, tmp_path: Path) -> None:
    names = ("color", "animal", "city")
    async with contextlib.AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(program(tmp_path, originals.BLS, name, options=DEPRECATED))
            for name in (*names, "frontend")
        ]
        assert await run(tmp_path, originals.BLS, "client") == [
            *[str({"done": name}) for name in names],
            str({name: [0, 1, 2] for name in names}),
        ]
        for worker in workers:
            await ended_well(worker)


async def test_a_small_soak_in_one_process(trd_dir: Path, tmp_path: Path) -> None:
    assert sorted(await run(tmp_path, originals.SOAK)) == ["errors 0 of 200", "served"]


async def test_a_kv_router_and_engines_that_load_the_c_library(unix: Cluster, tmp_path: Path) -> None:
    capi = "/opt/triton/bindings/lib/libtriton_distributed_llm_capi.so"
    environment = {"VLLM_KV_CAPI_PATH": capi, "VLLM_KV_NAMESPACE": "triton-init", "VLLM_KV_COMPONENT": "vllm"}
    async with contextlib.AsyncExitStack() as stack:
        for name in ("one", "other"):
            started = program(tmp_path, originals.KV_WORKER, name, options=DEPRECATED, environment=environment)
            await stack.enter_async_context(started)
        router = await stack.enter_async_context(program(tmp_path, originals.KV_ROUTER, options=DEPRECATED))
        namespace = unix.caller.namespace("triton-init")
        workers = await namespace.component("vllm").endpoint("generate").client()
        await patiently(workers.wait_for_endpoints(2))
        routes = await namespace.component("router").endpoint("generate").client()
        await patiently(routes.wait_for_endpoints())
        holder = workers.endpoint_ids()[0]
        assert len(await patiently(drained(workers.direct("load", holder)))) == 1

        async def chosen(tokens: list[int]) -> int:
            (item,) = await patiently(drained(routes.generate({"tokens": tokens})))
            return int(item.data())

        async with asyncio.timeout(PATIENCE_S):  # The engine's process has ended, so all its events are on their way.
            while [await chosen([3] * 128) for _ in range(2)] != [holder] * 2:
                await asyncio.sleep(0.05)
        await ended_well(router)
        assert not (await router.output())[0]

"""A runtime in a forked child refuses, clearly; the parent's goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.cluster import Cluster
from tests.runtime.programs import program

FORKS = """
import asyncio, os, sys, traceback
from triton_distributed.config import Config
from triton_distributed.errors import ForkError
from triton_distributed.runtime import DistributedRuntime

async def echo(request):
    return request

def refused(name, operation):
    try:
        operation()
    except ForkError as error:
        print(name, "refused:", error, flush=True)
    except BaseException:
        print(name, "raised", traceback.format_exc().splitlines()[-1], flush=True)
    else:
        print(name, "did not refuse", flush=True)

async def awaited(awaitable):
    return await asyncio.wait_for(awaitable, 5)

async def main():
    runtime = DistributedRuntime(asyncio.get_running_loop(), config=Config(discovery=sys.argv[1]))
    runtime.endpoint("t.c.e").serve_endpoint(echo)
    client = await runtime.endpoint("t.c.e").client()
    await client.wait_for_instances()
    assert await client.call(1) == 1
    pid = os.fork()
    if pid == 0:
        try:
            endpoint = runtime.endpoint("t.c.e")
            refused("generate", lambda: client.generate(1))
            refused("direct", lambda: client.direct(1, 5))
            refused("serve_endpoint", lambda: runtime.endpoint("t.c.f").serve_endpoint(echo))
            refused("create_service", lambda: runtime.namespace("t").component("c").create_service())
            refused("call", lambda: asyncio.run(awaited(client.call(1))))
            async def makes_a_client():
                return await endpoint.client()
            refused("client", lambda: asyncio.run(makes_a_client()))
            async def waits():
                return await client.wait_for_instances()
            refused("wait_for_instances", lambda: asyncio.run(waits()))
            async def fresh():
                async with DistributedRuntime(config=Config(discovery="memory")) as own:
                    own.endpoint("t.c.e").serve_endpoint(echo)
                    mine = await own.endpoint("t.c.e").client()
                    await mine.wait_for_instances()
                    print("fresh", await mine.call(5), flush=True)
            asyncio.run(fresh())
            runtime.shutdown()
        finally:
            os._exit(0)
    await asyncio.to_thread(os.waitpid, pid, 0)
    assert await client.call(2) == 2
    await runtime.close()
    print("parent ends", flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("discovery", ["memory", "file"])
async def test_a_forked_child_is_refused_and_the_parent_goes_on(discovery: str, unix: Cluster, tmp_path: Path) -> None:
    # Python 3.12 warns of any fork in a process that has threads; that is what this program is about.
    async with program(tmp_path, FORKS, discovery, options=("-W", "ignore::DeprecationWarning")) as forks:
        out, err = await forks.output()
        lines = out.splitlines()
        for line, name in zip(
            lines,
            ("generate", "direct", "serve_endpoint", "create_service", "call", "client", "wait_for_instances"),
            strict=False,
        ):
            assert line.startswith(f"{name} refused: this DistributedRuntime was made before a fork"), out + err
        assert lines[-2:] == ["fresh 5", "parent ends"], out + err
        assert await forks.ended() == 0

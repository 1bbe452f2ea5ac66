"""A runtime in a forked child refuses, clearly; the parent's goes on, and when it dies it is seen to be dead."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, patiently, until
from tests.runtime.programs import Program, program
from tests.transport.sessions import Peer, answering, peer
from triton_distributed.errors import StreamIncomplete

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
    return await asyncio.wait_for(awaitable, 60)

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


SURVIVED = """
import asyncio, os, signal, sys
from triton_distributed.runtime import DistributedRuntime

def fork():
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)  # whatever becomes of the test
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):  # whoever reads what the parent writes sees its end
            os.dup2(null, number)
        while True:
            signal.pause()
    print(pid, flush=True)

async def main():
    runtime = DistributedRuntime()

    async def handler(request):
        yield request
        await asyncio.Event().wait()

    async def forks(request):
        fork()

    if "dials" in sys.argv:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, fork)
        client = await runtime.endpoint("t.c.other").client()
        await client.call(1)
    runtime.endpoint("t.c.e").serve_endpoint(handler)
    runtime.endpoint("t.c.forks").serve_endpoint(forks)
    if "calls" in sys.argv:
        client = await runtime.endpoint("t.c.other").client()
        await client.wait_for_instances()
        async for item in client.generate(1, annotated=False):
            fork()
    await asyncio.Event().wait()

if "uvloop" in sys.argv:
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""

FORKS_AWAY = ("-W", "ignore::DeprecationWarning")  # Python 3.12 warns of forks beside threads: that is the program's
EVERYWHERE = [
    pytest.param(loop, listen, id=f"{loop}-{listen.partition(':')[0] or 'unix'}")
    for loop in ("asyncio", "uvloop")
    for listen in ("", "tcp://127.0.0.1:0")
]


@contextlib.asynccontextmanager
async def killed_beside_its_child(parent: Program) -> AsyncIterator[None]:
    """The parent is killed, and the child that it has just forked lives until the block is left."""
    child = int(await parent.line())
    try:
        parent.signal(signal.SIGKILL)
        assert await parent.ended() == -signal.SIGKILL
        yield
        os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.leaves("socket files", reason="a killed worker removes none, and nobody dials it after this test")
@pytest.mark.parametrize(("loop", "listen"), EVERYWHERE)
async def test_the_death_of_a_worker_is_seen_though_its_child_lives(
    loop: str, listen: str, unix: Cluster, tmp_path: Path
) -> None:
    environment = {"TRD_LISTEN": listen} if listen else None
    async with program(tmp_path, SURVIVED, loop, environment=environment, options=FORKS_AWAY) as worker:
        client, forks = await unix.client(), await unix.client("t.c.forks")
        (address,) = client.candidates.table.instances[0].addresses
        reading = aiter(client.generate(1, annotated=False))
        assert await patiently(anext(reading)) == 1
        idle = asyncio.create_task(client.call(2))  # accepted by the time that the fork is answered
        await patiently(forks.call(None))
        async with killed_beside_its_child(worker):
            with pytest.raises(StreamIncomplete):
                await patiently(anext(reading))
            with pytest.raises(StreamIncomplete):
                await patiently(idle)
            await until(lambda: not client.instance_ids())
            with pytest.raises((ConnectionRefusedError, FileNotFoundError)):  # whoever finds a dead socket removes it
                async with peer(address):
                    pass


@pytest.mark.leaves("socket files", reason="a killed worker removes none, and nobody dials it after this test")
@pytest.mark.parametrize(("loop", "listen"), EVERYWHERE)
async def test_the_death_of_a_caller_is_seen_though_its_child_lives(
    loop: str, listen: str, trd_dir: Path, tmp_path: Path
) -> None:
    cluster = Cluster(discovery="file", directory=trd_dir, listen=listen)
    ended = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[Any]:
        try:
            yield request
            await asyncio.Event().wait()
        finally:
            ended.set()

    await cluster.worker(handler, "t.c.other")
    async with (
        program(tmp_path, SURVIVED, "calls", loop, options=FORKS_AWAY) as caller,
        killed_beside_its_child(caller),
    ):
        await patiently(ended.wait())
    await cluster.close()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_the_death_of_a_caller_that_still_dials_is_seen_though_its_child_lives(
    loop: str, trd_dir: Path, tmp_path: Path
) -> None:
    came = asyncio.Event()
    heard: list[list[Any]] = []

    async def worker(one: Peer) -> None:
        await one.frame()
        came.set()
        heard.append(await one.hear())  # and says no hello

    quiet = {"TRD_DISCOVERY": "static", "TRD_CONNECT_TIMEOUT_S": "100"}
    async with contextlib.AsyncExitStack() as stack:
        quiet["TRD_STATIC"] = f"t.c.other={await stack.enter_async_context(answering(worker))}"
        caller = await stack.enter_async_context(
            program(tmp_path, SURVIVED, "dials", loop, environment=quiet, options=FORKS_AWAY)
        )
        await patiently(came.wait())
        caller.signal(signal.SIGUSR1)
        async with killed_beside_its_child(caller):
            await until(lambda: heard == [[]])

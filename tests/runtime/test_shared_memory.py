"""Arrays between two processes of one host: they arrive as what they were, and nothing of them stays."""

from __future__ import annotations

import array
import asyncio
import copy
import gc
import os
import pickle
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.cluster import Cluster, drained, patiently, until
from tests.system.test_shared_memory import memory_files
from tests.timing import PATIENCE_S
from triton_distributed.config import Config
from triton_distributed.errors import MessageTooLarge, Overloaded, StreamIncomplete
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.system.shared_memory import SUPPORTED

if not SUPPORTED:
    pytest.skip("this system has no sealed memory files", allow_module_level=True)

MIB = 1024 * 1024
LARGE = np.arange(MIB, dtype=np.float32).reshape(1024, 1024)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = memory_files()
    yield
    gc.collect()
    assert memory_files() == before


async def echo(request: Any) -> Any:
    return request


async def many(request: Any) -> AsyncIterator[Any]:
    for _ in range(3):
        yield request


def in_shared_memory(value: np.ndarray[Any, Any]) -> bool:
    base: Any = value
    while isinstance(base, np.ndarray):
        base = base.base
    return type(getattr(base, "obj", None)).__name__ == "Lease"


@pytest.mark.any_loop
@pytest.mark.parametrize(
    "value",
    [
        LARGE,
        LARGE.T,
        LARGE[::2, ::2].repeat(2, 0).astype(">f4"),
        LARGE.view([("x", "<f4"), ("y", "<i4")]),
        LARGE.astype("M8[s]"),
    ],
    ids=["C", "F", "big-endian", "fields", "times"],
)
async def test_an_array_is_used_in_place_and_cannot_be_written(value: Any, unix: Cluster) -> None:
    client = await unix.connect(echo)
    got = await patiently(client.call(value))
    assert in_shared_memory(got)
    assert (got.dtype, got.shape, got.flags.f_contiguous) == (value.dtype, value.shape, value.flags.f_contiguous)
    assert (got == value).all()
    assert got.flags.aligned
    assert not got.flags.writeable
    with pytest.raises(ValueError):  # noqa: PT011
        got.flags.writeable = True
    mine = got.copy()
    mine[0] = 0
    assert (got == value).all()


async def test_copies_are_of_their_own(unix: Cluster) -> None:
    client = await unix.connect(echo)
    got = await patiently(client.call(LARGE))
    copies = [pickle.loads(pickle.dumps(got)), copy.copy(got), copy.deepcopy(got), np.array(got)]
    assert not any(map(in_shared_memory, copies))
    del got
    for each in copies:
        each += 1
        assert (each == LARGE + 1).all()


@pytest.mark.parametrize(
    "value",
    [bytes(MIB), bytearray(b"x") * MIB, array.array("d", [1.5]) * MIB, memoryview(b"abcd" * MIB).cast("I")],
    ids=lambda value: type(value).__name__,
)
async def test_plain_memory_arrives_as_what_it_was(value: Any, unix: Cluster) -> None:
    client = await unix.connect(echo)
    got = await patiently(client.call(value))
    assert type(got) is type(value)
    assert got == value
    if isinstance(value, memoryview):
        assert (got.format, got.readonly) == ("I", True)


async def test_items_and_parts_of_a_value(unix: Cluster) -> None:
    client = await unix.connect(many)
    for got in await patiently(drained(await client.generate({"a": [LARGE, 1, LARGE[:2]]}, annotated=False))):
        assert [in_shared_memory(got["a"][0]), in_shared_memory(got["a"][2])] == [True, False]
        assert (got["a"][0] == LARGE).all()
        assert got["a"][2].flags.writeable


async def test_plain_handlers(unix: Cluster) -> None:
    def total(request: Any) -> Any:
        yield in_shared_memory(request)
        yield request * 2

    client = await unix.connect(total)
    shared, doubled = await patiently(drained(await client.generate(LARGE, annotated=False)))
    assert shared
    assert (doubled == LARGE * 2).all()


async def test_a_setting_turns_it_off(trd_dir: Path) -> None:
    cluster = Cluster(discovery="file", directory=trd_dir, shared_memory_bytes=0)
    try:
        client = await cluster.connect(echo)
        got = await patiently(client.call(LARGE))
        assert got.flags.writeable
        assert cluster.runtimes[0].statistics().shared_limit_bytes == 0
    finally:
        await cluster.close()


async def test_statistics_count_it(unix: Cluster) -> None:
    client = await unix.connect(echo)
    got = await patiently(client.call(LARGE))
    assert sum(each.statistics().shared_bytes for each in unix.runtimes) == LARGE.nbytes  # it came back in place
    assert {each.statistics().shared_limit_bytes for each in unix.runtimes} == {512 * MIB}
    del got


async def test_limits_hold(trd_dir: Path) -> None:
    cluster = Cluster(discovery="file", directory=trd_dir, max_message_bytes=6 * MIB, max_held_bytes=6 * MIB)
    try:
        client = await cluster.connect(echo)
        with pytest.raises(MessageTooLarge):
            await patiently(client.call(np.zeros(7 * MIB, np.uint8)))
        assert [each.statistics().shared_bytes for each in cluster.runtimes] == [0, 0]
        gate = asyncio.Event()

        async def wait(request: Any) -> Any:
            await gate.wait()
            return request.nbytes

        await cluster.worker(wait, name="t.c.wait")
        waiting = await cluster.client("t.c.wait")
        first = asyncio.create_task(waiting.call(LARGE))
        await until(lambda: any(each.statistics().held_bytes >= LARGE.nbytes for each in cluster.runtimes))
        with pytest.raises(Overloaded, match="TRD_MAX_HELD_BYTES"):
            await patiently(waiting.call(LARGE))
        gate.set()
        assert await patiently(first) == LARGE.nbytes
        await until(lambda: all(each.statistics().held_bytes == 0 for each in cluster.runtimes))
    finally:
        await cluster.close()


async def test_a_request_above_the_limit_keeps_no_memory(trd_dir: Path) -> None:
    """Its array alone is below the limit, so it lies in shared memory before the whole request is measured."""
    cluster = Cluster(discovery="file", directory=trd_dir, max_message_bytes=MIB)
    try:
        client = await cluster.connect(echo)
        for _ in range(3):
            with pytest.raises(MessageTooLarge):
                await patiently(client.call([np.zeros(700_000, np.uint8), "x" * 400_000]))
        assert 700_000 <= sum(each.statistics().shared_bytes for each in cluster.runtimes) < MIB  # one, used again
    finally:
        await cluster.close()


WORKER = """
import asyncio, sys, numpy as np
from triton_distributed.runtime import DistributedRuntime

kept = []

async def main():
    async with DistributedRuntime() as runtime:
        async def echo(request):
            kept.append(request)
            yield request
            yield float(request.sum())
            if sys.argv[1] == "hang":
                await asyncio.Event().wait()
        await runtime.endpoint("t.c.e").serve_endpoint(echo)

asyncio.run(main())
"""


def of(process: int) -> int:
    """Memory files of ours that another process has mapped."""
    return Path(f"/proc/{process}/maps").read_text().count("memfd:trd-")


@pytest.mark.leaves("socket files", reason="the worker is killed")
@pytest.mark.any_loop
async def test_a_killed_worker_leaves_nothing_and_its_array_stays_readable(trd_dir: Path) -> None:
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, "hang")
    before = memory_files()
    try:
        async with DistributedRuntime(config=Config.from_env(handle_signals=False, retries=0)) as runtime:
            client = await runtime.endpoint("t.c.e").client()
            await patiently(client.wait_for_instances())
            stream = aiter(await client.generate(LARGE, annotated=False))
            got = await patiently(anext(stream))
            assert await patiently(anext(stream)) == float(LARGE.sum())
            assert in_shared_memory(got)
            assert of(worker.pid) == 1  # what it got, and sent back
            worker.kill()
            await worker.wait()
            with pytest.raises(StreamIncomplete):
                await patiently(anext(stream))
            assert (got == LARGE).all()
            await until(lambda: runtime.statistics().shared_bytes == 0)  # no process reads it, but who can tell
            del got
            gc.collect()
            assert memory_files() == before
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()


CLIENT = """
import asyncio, sys, numpy as np
from triton_distributed.runtime import DistributedRuntime

async def main():
    async with DistributedRuntime() as runtime:
        client = await runtime.endpoint("t.c.e").client()
        await client.wait_for_instances()
        kept = [await client.call(np.ones(1 << 20, np.float32)) for _ in range(2)]
        print("ready", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_killed_client_leaves_nothing_at_its_worker(trd_dir: Path) -> None:
    kept: list[Any] = []

    async def keep(request: Any) -> Any:
        kept.append(request)
        return request

    before = memory_files()
    async with DistributedRuntime(config=Config.from_env(handle_signals=False)) as runtime:
        served = runtime.endpoint("t.c.e").serve_endpoint(keep)
        client = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, stdout=asyncio.subprocess.PIPE)
        assert client.stdout is not None
        assert await patiently(client.stdout.readline()) == b"ready\n"
        assert of(client.pid) == 4  # two to write, which came back to be read
        os.kill(client.pid, signal.SIGKILL)
        await client.wait()
        await until(lambda: runtime.statistics().shared_bytes == 0)
        assert all((each == 1).all() for each in kept)
        kept.clear()
        gc.collect()
        await until(lambda: memory_files() == before)
        runtime.shutdown()
        async with asyncio.timeout(PATIENCE_S):
            await served

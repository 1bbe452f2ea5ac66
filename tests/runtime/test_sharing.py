"""`trd.share`: placed once, mapped by every process of the host that gets it, and gone with its last user."""

from __future__ import annotations

import array
import asyncio
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import triton_distributed as trd
from tests.runtime.cluster import Cluster, drained, patiently, until
from tests.runtime.programs import program
from tests.runtime.test_shared_memory import echo, in_shared_memory
from tests.system.test_shared_memory import memory_files
from triton_distributed.config import Config
from triton_distributed.runtime import Client, DistributedRuntime
from triton_distributed.system.shared_memory import SUPPORTED

MIB = 1024 * 1024
DATA = np.arange(MIB, dtype=np.int32).reshape(1024, 1024)
linux = pytest.mark.skipif(not SUPPORTED, reason="this system has no sealed memory files")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    if not SUPPORTED:
        yield
        return
    before = memory_files()
    yield
    gc.collect()
    assert memory_files() == before


@pytest.mark.parametrize(
    "value",
    [
        DATA,
        DATA.T,
        DATA[::3, 1::2],
        np.array(1.5),
        np.zeros((0, 3)),
        DATA.view([("a", "<i2"), ("b", "<u2")]),
        np.array(["text", "ü"]),
        DATA.astype("M8[ms]"),
    ],
    ids=range(8),
)
def test_an_array_is_the_same_and_read_only(value: Any) -> None:
    shared = trd.share(value)
    assert (shared.dtype, shared.shape) == (value.dtype, value.shape)
    assert (shared == value).all()
    assert not shared.flags.writeable
    if value.size:
        with pytest.raises(ValueError):  # noqa: PT011
            shared.flags.writeable = True


@pytest.mark.parametrize(
    "value", [b"bytes", bytearray(b"array"), array.array("d", [1.5, 2]), memoryview(b"12345678").cast("H", (2, 2)), b""]
)
def test_a_buffer_is_a_read_only_memoryview(value: Any) -> None:
    shared = trd.share(value)
    view = memoryview(value)
    assert shared == view
    assert shared.readonly
    assert (shared.format, shared.shape) == (view.format, view.shape)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1, 2], "list.* cannot be shared"),
        (np.array([object()]), "Python objects"),
    ],
)
def test_what_cannot_be_shared(value: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        trd.share(value)


def test_a_tensor_says_what_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tensor: ...

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(Tensor=Tensor))
    with pytest.raises(TypeError, match=r"tensor\.numpy\(\)"):
        trd.share(Tensor())


async def one(client: Client, request: Any, instance: int) -> Any:
    """The one item of an instance's answer."""
    (item,) = await drained(await client.direct(request, instance, annotated=False))
    return item


@linux
async def test_it_is_not_copied_for_any_receiver(unix: Cluster) -> None:
    await unix.worker(echo)
    await unix.worker(echo)
    client = await unix.client()
    await patiently(client.wait_for_instances(2))
    shared = trd.share(DATA)
    for instance in client.instance_ids():
        got = await patiently(one(client, shared, instance))
        assert in_shared_memory(got)
        assert (got == DATA).all()
        part = await patiently(one(client, shared[100:900], instance))
        assert (part == DATA[100:900]).all()
        del got, part
    assert 0 in {each.statistics().shared_bytes for each in unix.runtimes}  # the caller has copied nothing


@linux
async def test_a_receiver_keeps_it_after_the_sender_has_dropped_it(unix: Cluster) -> None:
    kept: list[Any] = []

    async def keep(request: Any) -> Any:
        kept.append(request)

    client = await unix.connect(keep)
    before = memory_files()
    await patiently(client.call(trd.share(DATA)))
    gc.collect()
    assert (kept[0] == DATA).all()
    kept.clear()
    gc.collect()
    await until(lambda: memory_files() == before)


async def test_over_tcp_it_travels_as_bytes(trd_dir: Path) -> None:
    cluster = Cluster(discovery="file", directory=trd_dir, listen="tcp://127.0.0.1:0")
    try:
        client = await cluster.connect(echo)
        got = await patiently(client.call(trd.share(DATA)))
        assert (got == DATA).all()
        assert got.flags.writeable
    finally:
        await cluster.close()


@linux
@pytest.mark.parametrize("failing", ["memfd_create", "pwrite"])
async def test_without_memory_it_is_a_plain_copy(failing: str, unix: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        shared = trd.share(DATA)
    assert (shared == DATA).all()
    assert not shared.flags.writeable
    client = await unix.connect(echo)
    assert (await patiently(client.call(shared)) == DATA).all()


WORKER = """
import asyncio, sys
from triton_distributed.runtime import DistributedRuntime

async def main():
    async with DistributedRuntime() as runtime:
        kept = []
        async def add(request):
            kept.append(request)
            yield int(request.sum())
        await runtime.endpoint("t.c.e").serve_endpoint(add)

asyncio.run(main())
"""


def maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


@linux
@pytest.mark.leaves("socket files", reason="a worker is killed")
async def test_four_processes_map_the_same_memory(trd_dir: Path, tmp_path: Path) -> None:
    async with (
        program(tmp_path, WORKER) as first,
        program(tmp_path, WORKER) as second,
        program(tmp_path, WORKER) as third,
        program(tmp_path, WORKER) as fourth,
        DistributedRuntime(config=Config.from_env(handle_signals=False)) as runtime,
    ):
        client = await runtime.endpoint("t.c.e").client()
        await patiently(client.wait_for_instances(4))
        shared = trd.share(DATA)
        sums = await patiently(asyncio.gather(*(one(client, shared, each) for each in client.instance_ids())))
        assert sums == [int(DATA.sum())] * 4
        files = [
            {line.split()[4] for line in maps(pid).splitlines() if "memfd:trd-" in line}
            for pid in (os.getpid(), first.pid, second.pid, third.pid, fourth.pid)
        ]
        assert len(files[0]) == 1
        assert files == [files[0]] * 5  # one inode
        first.process.kill()
        await first.process.wait()
        del shared
        gc.collect()
        assert "memfd:trd-" not in maps(os.getpid())

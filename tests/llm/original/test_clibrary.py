"""The functions of the original's C library, as engines find and call them."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster
from tests.runtime.conftest import unix
from triton_distributed.llm import KvIndexer, KvMetricsPublisher
from triton_distributed.runtime import Component

__all__ = ["unix"]

NAMES = ("/opt/triton/llm_binding/lib/libtriton_llm_capi.so", "libtriton_distributed_llm_capi.so")
OK, ERR = 0, 1
TOKENS = list(range(200))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, trd_dir: Path) -> Iterator[Any]:
    monkeypatch.setenv("TRD_DIR", str(trd_dir))
    found = ctypes.CDLL(NAMES[0])
    found.triton_llm_init.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64]
    found.triton_llm_init.restype = ctypes.c_uint32
    yield found
    found.triton_llm_shutdown()


def store(library: Any, names: list[int], parent: int | None = None, size: int = 64) -> int:
    result: int = library.triton_kv_event_publish_stored(
        1,
        (ctypes.c_uint32 * len(TOKENS))(*TOKENS),
        (ctypes.c_size_t * len(names))(*[size] * len(names)),
        (ctypes.c_uint64 * len(names))(*names),
        len(names),
        None if parent is None else (ctypes.c_uint64 * 1)(parent),
        0,
    )
    return result


async def becomes(component: Component, indexer: KvIndexer, expected: dict[int, int]) -> None:
    async with asyncio.timeout(30):
        while (await indexer.find_matches_for_request(TOKENS, 0)).scores != expected:
            await asyncio.sleep(0.001)


async def test_an_engine_tells_its_blocks_from_a_process_without_a_runtime(
    unix: Cluster, library: Any, caplog: pytest.LogCaptureFixture
) -> None:
    component = unix.caller.namespace("ns").component("engine")
    indexer = KvIndexer(component)
    assert not (await indexer.find_matches_for_request(TOKENS, 0)).scores
    assert store(library, [7]) == ERR
    assert library.triton_llm_load_publisher_create() == OK
    assert library.triton_llm_shutdown() == ERR
    assert library.triton_llm_init(None, b"engine", 233) == ERR
    assert library.triton_llm_init(b"ns", b"engine", 233) == OK
    assert store(library, [7]) == OK
    await becomes(component, indexer, {233: 1})
    assert store(library, [8], parent=8) == OK  # As one program of the original does: the parent is unknown.
    assert store(library, [9, 10, 11], size=63) == OK  # Only whole blocks are published.
    assert await asyncio.to_thread(store, library, [9, 10, 11]) == OK
    await becomes(component, indexer, {233: 3})
    assert library.triton_kv_event_publish_removed(2, (ctypes.c_uint64 * 2)(10, 11), 2) == OK
    assert library.triton_kv_event_publish_removed(3, None, 0) == OK
    await becomes(component, indexer, {233: 1})
    for _ in range(5):
        store(library, [9], size=1)
    assert sum("is not published" in each for each in caplog.messages) == 3
    assert library.triton_llm_init(b"ns", b"engine", 234) == OK
    assert store(library, [7]) == OK
    await becomes(component, indexer, {233: 1, 234: 1})
    assert library.triton_llm_shutdown() == OK
    assert store(library, [7]) == ERR
    with pytest.raises(ctypes.ArgumentError):
        library.triton_llm_init(b"ns", b"engine", "no number")


def engine_process(pipe: Any) -> None:
    """An engine in a process of its own, as vLLM's is. The process imports what its parent's program imports."""
    library = ctypes.CDLL(NAMES[1])
    pipe.send([library.triton_llm_init(b"ns", b"engine", 234), store(library, [7, 8])])
    pipe.recv()
    pipe.send(library.triton_llm_shutdown())


async def test_an_engine_tells_its_blocks_from_a_process_that_its_worker_spawned(
    unix: Cluster, trd_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRD_DIR", str(trd_dir))
    component = unix.caller.namespace("ns").component("engine")
    indexer = KvIndexer(component)
    assert not (await indexer.find_matches_for_request(TOKENS, 0)).scores
    spawn = multiprocessing.get_context("spawn")
    mine, theirs = spawn.Pipe()
    engine = spawn.Process(target=engine_process, args=(theirs,))
    engine.start()
    assert await asyncio.to_thread(mine.recv) == [OK, OK]
    await becomes(component, indexer, {234: 2})
    mine.send("end")
    assert await asyncio.to_thread(mine.recv) == OK
    await asyncio.to_thread(engine.join)
    assert engine.exitcode == 0
    mine.close()
    theirs.close()
    engine.close()


async def test_in_a_worker_the_functions_use_its_runtime() -> None:
    made = Cluster()  # Its events stay in memory, so another runtime's would not arrive.
    component = made.runtime().namespace("ns").component("engine")
    load, indexer = KvMetricsPublisher(), KvIndexer(component)
    await load.create_service(component)
    assert not (await indexer.find_matches_for_request(TOKENS, 0)).scores
    library = ctypes.CDLL(NAMES[1])
    assert library.triton_llm_init(b"ns", b"engine", 5) == OK
    assert store(library, [7, 8]) == OK
    await becomes(component, indexer, {5: 2})
    assert library.triton_llm_shutdown() == OK
    await made.close()


def test_a_library_that_cannot_reach_nats_says_so(
    library: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as away:
        away.setenv("NATS_SERVER", "nats://127.0.0.1:1")
        away.setenv("TRD_EVENTS", "nats")
        away.setenv("TRD_CONNECT_TIMEOUT_S", "0.2")
        assert library.triton_llm_init(b"ns", b"engine", 1) == ERR
    assert any("triton_llm_init" in each and "127.0.0.1:1" in each for each in caplog.messages)
    assert store(library, [7]) == ERR
    assert library.triton_llm_init(b"ns", b"engine", 1) == OK


def test_every_other_library_passes_untouched(tmp_path: Path) -> None:
    libc = ctypes.CDLL(None)
    assert libc.abs(-3) == 3
    assert isinstance(ctypes.CDLL(NAMES[0]), ctypes.CDLL)
    assert ctypes.cdll.LoadLibrary(NAMES[0]).triton_llm_load_publisher_create() == OK
    broken = tmp_path / "libtriton_llm_capi.so"
    broken.write_bytes(b"not a library")
    for path in ("/nowhere/libtriton_llm.so", "/nowhere/libtriton_llm_capi.so.1", str(broken), os.fspath(tmp_path)):
        with pytest.raises(OSError, match=r"cannot open|invalid ELF|too short|cannot read|not a mach-o|no such"):
            ctypes.CDLL(path)
    with pytest.raises(AttributeError):
        ctypes.CDLL(NAMES[0]).triton_other  # noqa: B018
    with pytest.raises(AttributeError):
        ctypes.CDLL(NAMES[0])._no_such  # noqa: B018

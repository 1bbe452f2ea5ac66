"""A forked child keeps none of the descriptors that are owned, and its parent keeps all of them."""

from __future__ import annotations

import ast
import asyncio
import builtins
import gc
import importlib
import os
import socket
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import triton_distributed
from triton_distributed.config import Config
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.runtime.backends import make_discovery
from triton_distributed.runtime.inspection import answering
from triton_distributed.system import shared_memory
from triton_distributed.system.fork import no_fork, own, watch_forks
from triton_distributed.system.inotify import Inotify
from triton_distributed.transport.fairness import FairShare

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="only Linux tells what a descriptor leads to"
)


def in_child(numbers: list[int]) -> list[bool]:
    """Whether each number leads to the null device in a forked child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child only answers and is gone
        child = os.fork()
        if child == 0:
            answer = 0xFF
            try:
                null = [os.readlink(f"/proc/self/fd/{each}") == os.devnull for each in numbers]
                answer = sum(found << bit for bit, found in enumerate(null))
            finally:
                os._exit(answer)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status != 0xFF
    return [bool(status >> bit & 1) for bit in range(len(numbers))]


def test_a_child_gives_up_what_is_owned_and_only_that() -> None:
    ours, other = socket.socketpair()
    with ours, other:
        own(ours)
        own(ours)  # as a transport and its socket do
        assert in_child([ours.fileno(), other.fileno()]) == [True, False]
        ours.send(b"the parent's is open")
        assert other.recv(100)


def test_a_number_that_has_another_owner_by_now_is_left_alone() -> None:
    closed, _kept = socket.socketpair()
    own(closed)
    number = closed.fileno()
    closed.close()
    with _kept, socket.socket(fileno=os.dup2(_kept.fileno(), number)):
        assert in_child([number]) == [False]


@pytest.mark.any_loop
async def test_a_transport_is_given_up_and_one_that_has_closed_is_not() -> None:
    ours, other = socket.socketpair()
    with other:
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
        own(transport)
        number = transport.get_extra_info("socket").fileno()
        assert in_child([number, other.fileno()]) == [True, False]
        transport.close()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert in_child([other.fileno()]) == [False]


def test_what_must_know_is_notified_in_the_child_alone() -> None:
    read, write = os.pipe()

    class Watching:
        def forked(self) -> None:
            os.write(write, b"forked")

    watching = Watching()
    watch_forks(watching)
    in_child([])
    assert os.read(read, 100) == b"forked"
    del watching
    gc.collect()
    in_child([])
    os.close(write)
    assert os.read(read, 100) == b""
    os.close(read)


async def test_no_thread_forks_while_the_runtime_imports_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the child, the module would stay locked by a thread that is not there."""
    held: list[bool] = []
    own_import, import_module = builtins.__import__, importlib.import_module

    def look() -> None:
        with ThreadPoolExecutor(1) as other:
            free = other.submit(no_fork.acquire, blocking=False).result()
            if free:
                other.submit(no_fork.release).result()
        held.append(not free)

    def imports(name: str, *rest: Any) -> Any:
        if name == "ctypes":
            look()
        return own_import(name, *rest)

    def late(name: str) -> Any:
        look()
        return import_module(name)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", imports)
        Inotify().close()
    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", late)
        shared_memory.mappings()
        make_discovery(Config(discovery="etcd"))
        answering(None, FairShare(asyncio.get_running_loop()))()
        async with DistributedRuntime(config=Config(discovery="memory", listen="memory://late")) as runtime:
            runtime.metrics.text()
    assert len(held) > 5
    assert all(held)


def test_every_late_import_of_the_runtime_holds_forks_off() -> None:
    """Programs import the package itself in the thread that uses it, and `trd` does not fork while it imports."""
    source = Path(triton_distributed.__file__).parent
    found = 0
    for path in source.rglob("*.py"):
        if path.parent == source or path.relative_to(source).parts[0] in ("cli", "testing"):
            continue
        tree = ast.parse(path.read_text("utf-8"))
        late = set(filter(_imports_late, ast.walk(tree)))
        for each in ast.walk(tree):
            if isinstance(each, ast.With) and any("no_fork" in ast.unparse(item) for item in each.items):
                held = late & set(ast.walk(each))
                found, late = found + len(held), late - held
        assert not late, f"{path}: without no_fork: {', '.join(map(ast.unparse, late))}"
    assert found > 4


def _imports_late(each: ast.AST) -> bool:
    if not isinstance(each, ast.Call) or not ast.unparse(each.func).endswith("import_module"):
        return False
    return "triton_distributed." in ast.unparse(each.args[0])

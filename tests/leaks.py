"""Fails the test that leaves something behind.

What is looked at, after the test and all its fixtures are through: asyncio tasks, threads, file descriptors and
sockets, child processes, errors that asyncio could only log ("Task exception was never retrieved"), and, by garbage
collection inside the test that made them, everything whose finaliser warns (unclosed files, sockets, transports;
coroutines never awaited).

A test that must leave something says so: `@pytest.mark.leaves("threads", reason="…")`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from typing import TypeVar

import pytest
from pytest_asyncio import is_async_test

from tests.marks import allowed
from tests.timing import SCALE
from tests.warm import warm

# What was closed may end a moment later: a thread past its last instruction, a transport whose close is a callback of a
# loop that is being closed. Only a failing test waits this long.
GRACE_S = 2.0 * SCALE

# Turns of the loop that a cancelled task or a closing transport may take to be gone. Not a time: each turn runs all
# that is ready, so a task that still waits after them waits for somebody who is not there any more.
LOOP_TURNS = 20

_PROC_FD = "/proc/self/fd"
failed = pytest.StashKey[bool]()

T = TypeVar("T")


# --- what is there ---------------------------------------------------------------------------------------------------


def descriptors() -> dict[int, str]:
    """Open descriptors of this process and what each points at; empty where the system does not tell."""
    found: dict[int, str] = {}
    try:
        names = os.listdir(_PROC_FD)
    except FileNotFoundError:
        return found
    for name in names:
        try:
            found[int(name)] = os.readlink(f"{_PROC_FD}/{name}")
        except FileNotFoundError:
            pass  # the one through which the folder was read
    return found


def describe_descriptor(number: int, target: str) -> str:
    """What an open descriptor is, for a person: a socket with its addresses, else what it points at."""
    if not target.startswith("socket:"):
        return f"fd {number}: {target}"
    try:
        with socket.socket(fileno=os.dup(number)) as copy:
            listening = hasattr(socket, "SO_ACCEPTCONN") and copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            try:
                peer = f" connected to {copy.getpeername() or 'an unnamed peer'}"
            except OSError:
                peer = ""
            state = "listening" if listening else "open"
            return f"fd {number}: {state} {copy.family.name} socket {copy.getsockname() or '(unnamed)'}{peer}"
    except OSError as error:
        return f"fd {number}: {target} ({error})"


def children() -> set[int]:
    """Process ids of this process's children, zombies included, except multiprocessing's two servants and tests/warm.py's."""
    try:
        found = set[int]()
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/children", "rb", buffering=0) as file:
                found.update(map(int, file.read().split()))
    except FileNotFoundError:
        found = _children_by_ps()
    servants = {
        getattr(resource_tracker._resource_tracker, "_pid", None),
        getattr(forkserver._forkserver, "_forkserver_pid", None),
        warm.process.pid if warm.process is not None else None,
    }
    return found - servants


def _children_by_ps() -> set[int]:
    with subprocess.Popen(["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, text=True) as ps:
        rows = [line.split() for line in ps.communicate()[0].splitlines()]
    return {int(pid) for pid, parent in rows if int(parent) == os.getpid()} - {ps.pid}


def describe_child(pid: int) -> str:
    row = subprocess.run(
        ["ps", "-ww", "-o", "stat=,args=", "-p", str(pid)], capture_output=True, text=True
    ).stdout.split(None, 1)
    state, command = (row[0], row[1].strip()) if len(row) == 2 else ("?", "?")
    return f"process {pid}, {'ended but never waited for' if state.startswith('Z') else 'running'}: {command}"


def describe_thread(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    where = "".join(traceback.format_stack(frame)[-3:]) if frame else "    (no stack)\n"
    return f"thread {thread.name!r}{' (daemon)' if thread.daemon else ''} at\n{where.rstrip()}"


def describe_task(task: asyncio.Task[object]) -> str:
    stack = task.get_stack(limit=3)
    where = "".join(traceback.format_stack(stack[-1])[-1:]) if stack else "    (not started)\n"
    return (
        f"task {task.get_name()!r} of {getattr(task.get_coro(), '__qualname__', task.get_coro())} at\n{where.rstrip()}"
    )


@dataclass(frozen=True)
class Snapshot:
    """What existed before a test."""

    threads: frozenset[threading.Thread]
    descriptors: dict[int, str]
    children: frozenset[int]

    @classmethod
    def take(cls) -> Snapshot:
        return cls(frozenset(threading.enumerate()), descriptors(), frozenset(children()))

    def new_threads(self) -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread not in self.threads]

    def new_descriptors(self) -> list[tuple[int, str]]:
        servants = {
            getattr(resource_tracker._resource_tracker, "_fd", None),
            warm.socket.fileno() if warm.socket is not None else None,
        }
        return [
            (number, target)
            for number, target in descriptors().items()
            if self.descriptors.get(number) != target and number not in servants and "/.coverage" not in target
        ]

    def new_children(self) -> list[int]:
        return sorted(children() - self.children)


def _settled(look: Callable[[], list[T]]) -> list[T]:
    """What `look` still sees when it sees nothing, or when the grace is over."""
    deadline = time.monotonic() + GRACE_S
    while (found := look()) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.005)
    return found


class _Errors(logging.Handler):
    """Collects what asyncio reports as errors because nobody is left to raise it to."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        trace = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
        self.texts.append(f"asyncio logged: {record.getMessage()}\n{trace}".rstrip())


# --- the fixtures ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Set up before all other fixtures of the test, so it looks when they have cleaned up and the loop is closed."""
    item: pytest.Item = request.node
    errors = _Errors()
    logger = logging.getLogger("asyncio")
    logger.addHandler(errors)
    before = Snapshot.take()
    try:
        yield
        gc.collect()  # finalisers warn inside this test, not in one that happens to run later
    finally:
        logger.removeHandler(errors)
    if item.stash.get(failed, False):  # the traceback of a failure keeps alive what it shows
        for pid in before.new_children():
            _end(pid)
        return
    leaks: list[str] = []
    if not allowed(item, "children"):
        for pid in _settled(before.new_children):
            leaks.append(describe_child(pid))
            _end(pid)
    if not allowed(item, "threads"):
        leaks += map(describe_thread, _settled(before.new_threads))
    if not allowed(item, "descriptors"):
        leaks += [describe_descriptor(number, target) for number, target in _settled(before.new_descriptors)]
    if not allowed(item, "asyncio errors"):
        leaks += errors.texts
    if leaks:
        pytest.fail("the test left behind:\n- " + "\n- ".join(leaks), pytrace=False)


@pytest.fixture(autouse=True)
def no_pending_tasks(request: pytest.FixtureRequest, no_leaks: None) -> None:
    """Has the loop of an async test looked at before it is closed, when the test's own async fixtures are through."""
    if is_async_test(request.node) and not allowed(request.node, "tasks"):
        request.getfixturevalue("_tasks_ended")


@pytest.fixture
async def _tasks_ended(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    yield
    if request.node.stash.get(failed, False):
        return
    this = asyncio.current_task()
    for _ in range(LOOP_TURNS):
        if asyncio.all_tasks() == {this}:
            return
        await asyncio.sleep(0)
    left = [describe_task(task) for task in asyncio.all_tasks() if task is not this]
    if left:
        pytest.fail("the test left tasks pending that nobody awaits or cancels:\n- " + "\n- ".join(left), pytrace=False)


def _end(pid: int) -> None:
    """End a child that the test forgot, so that it does not disturb the next one."""
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


# --- hooks -----------------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Collect no garbage while the tests are collected: nearly all that is made stays, and each look at it takes longer."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        _freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    if nextitem is None or nextitem.path != item.path:
        _freeze()


def _freeze() -> None:
    """Keep what exists now, such as imported modules and caches, out of later collections: there is one after each test."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:  # the type of what is sent in is pytest's own
    report = yield
    if report.failed:  # type: ignore[attr-defined]
        item.stash[failed] = True
    return report


def pytest_report_header(config: pytest.Config) -> str:
    if os.path.isdir(_PROC_FD):
        return "leaks: tasks, threads, descriptors, children, warnings"
    return f"leaks: tasks, threads, children, warnings; descriptors are NOT checked, this system has no {_PROC_FD}"

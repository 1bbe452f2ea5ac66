"""Calls without an event loop, and processes: forks, prefork servers, Ctrl-C, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.other_thread import OtherThread
from tests.guards.tree import SRC
from tests.timing import PATIENCE_S

# From Python 3.12 on, a fork is reported if the process has threads, as it has after its first call.
FORKS = ("-W", "error", "-W", "ignore:.*multi-threaded:DeprecationWarning")


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run this interpreter; it is killed where it still runs at the end."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC), "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with its children, which hold its pipes
        process.communicate()


def run(code: str, *options: str) -> str:
    """Run a program to its end, and return what it has printed. It must not complain."""
    with running(*options, "-c", code) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, err) == (0, ""), err
        return out


class Handlers:
    """An echo, and a handler that never answers."""

    def __init__(self, worker: OtherThread) -> None:
        self.begun = threading.Event()
        self.cancelled = threading.Event()
        self.counted = threading.Event()
        worker.serve("t.sync.echo", self.echo)
        worker.serve("t.sync.wait", self.wait)
        worker.serve("t.sync.count", self.count)

    async def echo(self, request: Any) -> Any:
        return request

    async def count(self, request: Any) -> Any:
        try:
            for each in range(request):
                yield each
        finally:
            self.counted.set()

    async def wait(self, request: Any) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


@pytest.fixture
def handlers(worker: OtherThread) -> Handlers:
    return Handlers(worker)


FORK = """
import os, sys, threading
import triton_distributed as trd
from triton_distributed.errors import ForkError

here = trd.connect_sync()
assert here.call("t.sync.echo", "before") == "before"
items = here.stream("t.sync.count", 1000)
assert next(items) == 0

def child():
    try:
        list(items)
    except ForkError:
        pass
    else:
        return 1
    assert threading.active_count() == 1
    assert here.call("t.sync.echo", "child") == "child"
    assert list(here.stream("t.sync.count", 3)) == [0, 1, 2]
    return 0

for _ in range(3):
    pid = os.fork()
    if not pid:
        status = 2
        try:
            status = child()
            if status == 0 and os.fork() == 0:  # A child of the child.
                os._exit(child())
            elif status == 0:
                status = os.waitstatus_to_exitcode(os.wait()[1])
        finally:
            os._exit(status)
    assert here.call("t.sync.echo", "parent") == "parent"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert list(items) == list(range(1, 1000))
here.close()
print("done")
"""

MULTIPROCESSING = """
import multiprocessing, sys
import triton_distributed as trd

here = trd.connect_sync()

def call(number):
    return here.call("t.sync.echo", number)

if __name__ == "__main__":
    assert call(0) == 0
    with multiprocessing.get_context("fork").Pool(3) as pool:
        print(pool.map(call, range(20)))
        assert call(1) == 1
        pool.close()
        pool.join()
"""

THREADS_FORK = """
import os, threading
import triton_distributed as trd

here = trd.connect_sync()
ending = threading.Event()

def calls():
    while not ending.is_set():
        here.call("t.sync.echo", 1)

threads = [threading.Thread(target=calls) for _ in range(4)]
for each in threads:
    each.start()
for _ in range(20):
    pid = os.fork()
    if not pid:
        os._exit(0 if here.call("t.sync.echo", "child") == "child" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
ending.set()
for each in threads:
    each.join()
print("done")
"""


def test_a_forked_child_has_a_loop_of_its_own_and_the_parent_goes_on(handlers: Handlers) -> None:
    assert run(FORK, *FORKS) == "done\n"


def test_children_of_multiprocessing_call(handlers: Handlers) -> None:
    assert run(MULTIPROCESSING, *FORKS) == f"{[*range(20)]}\n"


def test_a_fork_while_other_threads_call(handlers: Handlers) -> None:
    assert run(THREADS_FORK, *FORKS) == "done\n"


INTERRUPTED = """
import sys, threading
import triton_distributed as trd

with trd.connect_sync() as here:
    try:
        {wait}
    except KeyboardInterrupt:
        print("interrupted")
    sys.stdin.readline()
    print(here.call("t.sync.echo", "and goes on"))
"""


@pytest.mark.parametrize(
    "wait",
    [
        'here.call("t.sync.wait", 1)',
        'list(here.stream("t.sync.wait", 1))',
        'next(here.stream("t.sync.wait", 1))',
    ],
)
def test_ctrl_c_interrupts_a_waiting_call_and_cancels_its_handler(handlers: Handlers, wait: str) -> None:
    with running("-c", INTERRUPTED.format(wait=wait)) as process:
        assert handlers.begun.wait(PATIENCE_S)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "interrupted\n"
        assert handlers.cancelled.wait(PATIENCE_S)  # The process still runs.
        out, err = process.communicate("\n", timeout=PATIENCE_S)
        assert (process.returncode, out, err) == (0, "and goes on\n", "")


OFTEN = """
import random, signal
import triton_distributed as trd

class Interrupt(BaseException):
    pass

def interrupt(*_):
    raise Interrupt

signal.signal(signal.SIGALRM, interrupt)
interrupted = 0
with trd.connect_sync() as here:
    for number in range(500):
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 1e-3))
            for _ in range(20):
                assert here.call("t.sync.echo", number) == number
                assert list(here.stream("t.sync.count", 3)) == [0, 1, 2]
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupt:
            interrupted += 1
        assert here.call("t.sync.echo", number) == number
print(interrupted > 0)
"""


def test_interrupts_at_any_moment_do_no_harm(handlers: Handlers) -> None:
    with running("-c", OFTEN) as process:  # Python reports an interrupt of a finalizer, so its complaints do not count.
        out, err = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, out) == (0, "True\n"), err
        assert "never awaited" not in err


NOT_CLOSED = """
import threading, time
import triton_distributed as trd

here = trd.connect_sync()
print(here.call("t.sync.echo", "called"))
items = here.stream("t.sync.count", 10**9)
next(items)
for endpoint in ("t.sync.wait", "t.sync.nobody"):
    def call(endpoint=endpoint):
        try:
            here.call(endpoint, 1)
        except Exception:
            pass
    threading.Thread(target=call, daemon=True).start()
reading = iter(items)
next(reading)
input()
print(time.monotonic())
"""


def test_a_process_that_does_not_close_ends_at_once(handlers: Handlers) -> None:
    with running("-W", "error", "-c", NOT_CLOSED) as process:
        assert handlers.begun.wait(PATIENCE_S)
        out, err = process.communicate("\n", timeout=PATIENCE_S)
        took = time.monotonic() - float(out.split()[1])
        assert (process.returncode, out.split()[0], err) == (0, "called", "")
        assert took < PATIENCE_S / 4  # Nothing waits for an answer.
        assert handlers.cancelled.wait(PATIENCE_S)


APP = """
import os
import flask
import triton_distributed as trd

here = trd.connect_sync()
if os.environ.get("CALLS_FIRST"):
    here.call("t.sync.echo", "before the fork")
app = flask.Flask(__name__)

@app.get("/<text>")
def echo(text):
    return {"answer": here.call("t.sync.echo", text, timeout=60), "pid": os.getpid()}

@app.get("/count/<int:number>")
def count(number):
    items = here.stream("t.sync.count", number)
    items.accepted()
    return (f"{each}\\n" for each in items)
"""


@pytest.fixture(params=[False, True], ids=["", "calls before the fork"])
def server(request: pytest.FixtureRequest, handlers: Handlers, tmp_path: Path) -> Iterator[Path]:
    """A prefork server with two processes; it listens on this Unix socket."""
    pytest.importorskip("flask")
    pytest.importorskip("gunicorn")
    (tmp_path / "app.py").write_text(APP)
    path = tmp_path / "http"
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "gunicorn", "app:app", "--preload"]
    process = subprocess.Popen(
        [*command, "--workers", "2", "--bind", f"unix:{path}", "--no-control-socket", "--log-level", "warning"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SRC), "CALLS_FIRST": "1" if request.param else ""},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield path
        process.terminate()
        _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0
        assert "Traceback" not in err, err
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def asked(path: Path, text: str) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("server", timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(path))
        connection.request("GET", f"/{text}")
        with connection.getresponse() as answer:
            yield answer


def get(path: Path, text: str) -> tuple[str, int]:
    """Ask the server, and wait for it where it does not listen yet or loses the process that answers."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            with asked(path, text) as answer:
                assert answer.status == 200, answer.read()
                body = json.loads(answer.read())
                return body["answer"], body["pid"]
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < until, "the server does not answer"


@pytest.mark.slow
def test_each_process_of_a_prefork_server_calls_and_is_replaced(server: Path) -> None:
    until = time.monotonic() + PATIENCE_S

    def processes(count: int, without: int = 0) -> set[int]:
        found: set[int] = set()
        while len(found - {without}) < count and time.monotonic() < until:
            answer, pid = get(server, "hello")
            assert answer == "hello"
            found.add(pid)
        return found - {without}

    first = processes(2)
    assert len(first) == 2
    os.kill(killed := min(first), signal.SIGKILL)
    later = processes(2, killed)
    assert len(later) == 2
    assert len(later - first) == 1, "the killed process is replaced"


@pytest.mark.slow
def test_a_client_that_leaves_a_streamed_response_cancels_the_handler(server: Path, handlers: Handlers) -> None:
    get(server, "listens")
    with asked(server, "count/3") as answer:
        assert answer.read() == b"0\n1\n2\n"
    handlers.counted.clear()
    with asked(server, f"count/{10**9}") as answer:
        assert answer.readline() == b"0\n"
    assert handlers.counted.wait(PATIENCE_S)

"""SIGTERM in a process that is number 1: it ends the process at any moment, not only while an endpoint is served."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.guards.tree import SRC
from tests.timing import PATIENCE_S
from triton_distributed.system import first_process
from triton_distributed.system.signals import DrainSignals

TERM = 128 + signal.SIGTERM

# What each program does when it is told to end. It says "up" when it does that. A program blocks for a moment at a time:
# CPython handles a signal late if it arrives right before a system call that blocks.
PROGRAMS = {
    "imports": """
import triton_distributed.runtime
try:
    import slow
finally:
    print("cleaned up", flush=True)
""",
    "imports the runtime": """
import sys, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "msgspec":
            print("up", flush=True)
            while True:
                time.sleep(0.05)

sys.meta_path.insert(0, Slow())
try:
    import triton_distributed.runtime
finally:
    print("cleaned up", flush=True)
""",
    "loads a model": """
import asyncio
from triton_distributed.runtime import triton_worker

@triton_worker()
async def main(runtime):
    try:
        print("up", flush=True)
        await asyncio.sleep(3600)
    finally:
        print("cleaned up", flush=True)

asyncio.run(main())
""",
    "loads a model in the loop's thread": """
import asyncio, time
from triton_distributed.runtime import triton_worker

@triton_worker()
async def main(runtime):
    try:
        print("up", flush=True)
        while True:
            time.sleep(0.05)
    finally:
        print("cleaned up", flush=True)

asyncio.run(main())
""",
    "waits for an instance": """
import asyncio
from triton_distributed.runtime import triton_worker

@triton_worker()
async def main(runtime):
    client = await runtime.endpoint("t.c.e").client()
    asyncio.get_running_loop().call_soon(lambda: print("up", flush=True))
    try:
        await client.wait_for_instances()
    finally:
        print("cleaned up", flush=True)

asyncio.run(main())
""",
    "waits on uvloop": """
import asyncio, uvloop
from triton_distributed.runtime import triton_worker

@triton_worker()
async def main(runtime):
    client = await runtime.endpoint("t.c.e").client()
    asyncio.get_running_loop().call_soon(lambda: print("up", flush=True))
    try:
        await client.wait_for_instances()
    finally:
        print("cleaned up", flush=True)

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
""",
    "serves no more": """
import asyncio
from triton_distributed.runtime import triton_worker

async def echo(request):
    return request

@triton_worker()
async def main(runtime):
    serving = runtime.endpoint("t.c.e").serve_endpoint(echo)
    client = await runtime.endpoint("t.c.e").client()
    await client.wait_for_instances()
    serving.cancel()
    await asyncio.wait([serving])
    try:
        asyncio.get_running_loop().call_soon(lambda: print("up", flush=True))
        await asyncio.sleep(3600)
    finally:
        print("cleaned up", flush=True)

asyncio.run(main())
""",
    "has threads": """
import threading
import triton_distributed.runtime
try:
    print("up", flush=True)
    while not threading.Event().wait(0.05):
        pass
finally:
    print("cleaned up", flush=True)
""",
}

SLOW = "import time\nprint('up', flush=True)\nwhile True:\n    time.sleep(0.05)\n"
MODEL = """
import time

class Model:
    def __init__(self):
        print("up", flush=True)
        while True:
            time.sleep(0.05)

    async def generate(self, request):
        return request
"""


@functools.cache
def unable() -> str:
    """Why no process can be number 1 here; empty where one can."""
    try:
        done = subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no `unshare` here (util-linux)"
    return f"no PID namespace can be had: {done.stderr.strip()}" if done.returncode else ""


@pytest.fixture
def possible() -> None:
    if reason := unable():
        if os.environ.get("CI"):
            pytest.fail(f"CI must be able to start a process as number 1: {reason}", pytrace=False)
        pytest.skip(reason)


@dataclass
class First:
    """A process that is number 1 in its namespace."""

    process: subprocess.Popen[str]
    pid: int  # as it is seen from here

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def end(self) -> tuple[int, str, str]:
        """Its exit status and what it still says on standard output and standard error."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        out, err = self.process.stdout.read(), self.process.stderr.read()
        return self.process.wait(PATIENCE_S), out, err


@contextmanager
def default_actions() -> Iterator[None]:
    """Whoever runs the tests may ignore a signal, as `nohup` does, and processes that are started inherit that."""
    before = {each: signal.signal(each, signal.SIG_DFL) for each in first_process.SIGNALS}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@contextmanager
def first_process_of(folder: Path, *command: str) -> Iterator[First]:
    """Run a command as process 1; it has said "up" when this begins."""
    with default_actions():
        process = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SRC), str(folder)])},
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == "up\n", process.communicate(timeout=PATIENCE_S)
        [inside] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield First(process, int(inside))
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def written(folder: Path, code: str, name: str = "program.py") -> str:
    path = folder / name
    path.write_text(code)
    return str(path)


@pytest.mark.usefixtures("possible", "trd_dir")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("what", PROGRAMS)
def test_it_ends_whatever_it_does(tmp_path: Path, what: str, number: signal.Signals) -> None:
    written(tmp_path, SLOW, "slow.py")
    with first_process_of(tmp_path, written(tmp_path, PROGRAMS[what])) as first:
        first.signal(number)
        status, out, _ = first.end()
    assert (status, out) == (128 + number, "cleaned up\n")


TRD = ("-m", "triton_distributed.cli.main")


@pytest.mark.usefixtures("possible", "trd_dir")
@pytest.mark.parametrize("target", ["slow:handler", "model:Model"])
def test_trd_serve_ends_before_it_serves(tmp_path: Path, target: str) -> None:
    written(tmp_path, SLOW, "slow.py")
    written(tmp_path, MODEL, "model.py")
    with first_process_of(tmp_path, *TRD, "serve", target, "--endpoint", "t.c.e") as first:
        first.signal(signal.SIGTERM)
        status, out, err = first.end()
    assert (status, out) == (TERM, "")
    assert "Traceback" not in err


ALWAYS_UP = """
import asyncio, sys
from triton_distributed.cli.main import main
from triton_distributed.calling.candidates import Candidates

begin = Candidates.open
async def open_(*arguments):
    await begin(*arguments)
    asyncio.get_running_loop().call_soon(lambda: print("up", flush=True))
Candidates.open = open_
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.usefixtures("possible", "trd_dir")
def test_trd_call_ends_while_it_waits(tmp_path: Path) -> None:
    program = written(tmp_path, ALWAYS_UP)
    with first_process_of(tmp_path, program, "call", "t.c.e", "1", "--wait", "3600") as first:
        first.signal(signal.SIGTERM)
        status, _, err = first.end()
    assert status == TERM
    assert "Traceback" not in err


SERVES = """
import asyncio
from triton_distributed.runtime import triton_worker

async def echo(request):
    return request

@triton_worker()
async def main(runtime):
    serving = runtime.endpoint("t.c.e").serve_endpoint(echo)
    client = await runtime.endpoint("t.c.e").client()
    await client.wait_for_instances()
    print("up", flush=True)
    print("served:", await serving, flush=True)

asyncio.run(main())
"""


@pytest.mark.usefixtures("possible", "trd_dir")
def test_one_that_serves_drains(tmp_path: Path) -> None:
    with first_process_of(tmp_path, written(tmp_path, SERVES)) as first:
        first.signal(signal.SIGTERM)
        assert first.end()[:2] == (0, "served: None\n")


STUBBORN = """
import time
import triton_distributed.runtime
try:
    print("up", flush=True)
    while True:
        time.sleep(0.05)
finally:
    print("cleaning up", flush=True)
    while True:
        time.sleep(0.05)
"""


@pytest.mark.usefixtures("possible")
def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with first_process_of(tmp_path, written(tmp_path, STUBBORN)) as first:
        first.signal(signal.SIGTERM)
        assert first.line() == "cleaning up"
        while first.process.poll() is None:  # one that comes within `ECHO_S` counts as the first
            first.signal(signal.SIGTERM)
            time.sleep(first_process.ECHO_S)
        assert first.end()[0] == TERM


FORKS = """
import os, signal, time
import triton_distributed.runtime
ends = set()
for _ in range(20):
    child = os.fork()
    if child == 0:
        while True:
            time.sleep(0.05)
    os.kill(child, signal.SIGTERM)
    ends.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print("up", flush=True)
print(ends, flush=True)
"""


@pytest.mark.usefixtures("possible")
def test_its_forked_child_ends_as_any_process_does(tmp_path: Path) -> None:
    with first_process_of(tmp_path, written(tmp_path, FORKS)) as first:
        assert first.end()[:2] == (0, f"{{{-signal.SIGTERM}}}\n")


# --- the decision, in this process -----------------------------------------------------------------------------------


@pytest.fixture
def default_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Default actions for the test, and what was there before after it."""
    monkeypatch.setattr(first_process, "_asked", None)
    monkeypatch.setattr(first_process, "_hooked", True)  # this process is not number 1: its forks need nothing
    with default_actions():
        yield


@pytest.mark.usefixtures("default_signals")
class TestDecision:
    def test_any_other_process_keeps_its_default_action(self) -> None:
        for pid in (None, 2, os.getpid()):
            first_process.take(pid)
            assert {signal.getsignal(each) for each in first_process.SIGNALS} == {signal.SIG_DFL}

    def test_process_1_gets_a_handler_for_each(self) -> None:
        first_process.take(1)
        assert {signal.getsignal(each) for each in first_process.SIGNALS} == {first_process.end}
        with pytest.raises(SystemExit) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.code == TERM

    @pytest.mark.parametrize("theirs", [signal.SIG_IGN, lambda *_: None], ids=["ignored", "handled"])
    def test_what_the_program_has_chosen_stays(self, theirs: object) -> None:
        signal.signal(signal.SIGTERM, theirs)  # type: ignore[arg-type]
        first_process.take(1)
        assert signal.getsignal(signal.SIGTERM) == theirs
        assert signal.getsignal(signal.SIGHUP) is first_process.end

    def test_another_thread_changes_nothing(self) -> None:
        thread = threading.Thread(target=first_process.take, args=(1,))
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    async def test_a_drain_takes_it_over_and_hands_it_back(self) -> None:
        first_process.take(1)
        drained: list[bool] = []
        serving = DrainSignals(asyncio.get_running_loop(), lambda: drained.append(True), 30.0, list, list, list)
        for _ in range(2):
            serving.install()
            assert signal.getsignal(signal.SIGTERM) is not first_process.end
            serving.remove()
            assert signal.getsignal(signal.SIGTERM) is first_process.end
        assert not drained

"""Replicas as processes: how they start, end, and start again, and which calls survive that."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import triton_distributed as trd
from tests.runtime.test_first_process import possible as possible
from tests.supervisor.supervised import WORKER, alive, supervised, wait_until_gone, written
from tests.timing import MS, PATIENCE_S
from triton_distributed.cli.cluster import cluster
from triton_distributed.errors import Draining, NoInstances, StreamIncomplete, TritonError
from triton_distributed.runtime.reports import WorkerReport

pytestmark = pytest.mark.usefixtures("trd_dir")
killed = pytest.mark.leaves("socket files", reason="a killed process leaves its own")


async def found(here: trd.Connection, count: int) -> dict[str, int]:
    """The process ids of all replicas by their numbers."""
    pids: dict[str, int] = {}
    while len(pids) < count:
        number, pid = await here.call("a.b.who", None)
        pids[number] = pid
    return pids


async def ask(count: int) -> dict[str, int]:
    async with trd.connect() as here:
        return await asyncio.wait_for(found(here, count), PATIENCE_S)


class Load:
    """Calls all the time, some hundred in a second."""

    def __init__(self, here: trd.Connection, idempotent: bool = False) -> None:
        self.here, self.idempotent = here, idempotent
        self.errors: list[TritonError] = []
        self.pids: list[int] = []
        self._stopping = False
        self._tasks = [asyncio.ensure_future(self._call()) for _ in range(8)]

    async def _call(self) -> None:
        while not self._stopping:
            try:
                _, pid = await self.here.call("a.b.who", None, idempotent=self.idempotent)
            except TritonError as error:
                self.errors.append(error)
            else:
                self.pids.append(pid)
            await asyncio.sleep(5 * MS)

    async def until(self, count: int, gone: set[int]) -> None:
        """Go on until so many processes have answered that are none of these."""
        async with asyncio.timeout(PATIENCE_S):
            while len(set(self.pids) - gone) < count:
                await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)


def test_each_replica_serves_and_knows_its_number(tmp_path: Path) -> None:
    with supervised(tmp_path, written(tmp_path), "3") as running:
        running.ready(3)
        pids = asyncio.run(ask(3))
        assert set(pids) == {"0", "1", "2"}
        assert sorted(pids.values()) == running.replicas()
        running.stop()
    assert not any(map(alive, pids.values()))
    assert running.lines[-1] == "ran"
    assert {f"[{number}] ran" for number in range(3)} <= set(running.lines)


def test_trd_serve_does_the_same(tmp_path: Path) -> None:
    written(tmp_path)
    with supervised(tmp_path, "-m", "triton_distributed.cli.main", "serve", "worker:who", "--replicas", "2") as running:
        for _ in range(2):
            running.line(r"\[[01]\] ready: serving a\.b\.who as instance \d+ at unix://\S+")
        running.ready(2)
        pids = asyncio.run(ask(2))
        assert set(pids) == {"0", "1"}

        async def reports() -> list[WorkerReport | None]:
            async with cluster(trd.Config.from_env(), PATIENCE_S) as workers:
                return [each.worker for each in await workers.rows(await workers.instances())]

        found = {str(each.replica): each.pid for each in asyncio.run(reports()) if each is not None}
        assert found == pids
        running.stop()
    assert len(running.lines) == 3


@killed
async def test_a_load_loses_nothing_that_is_promised_in_a_kill_a_restart_and_a_shutdown(tmp_path: Path) -> None:
    held = """
@trd.serve("a.b.held")
def held(path: str) -> str:
    import time
    print("begun", flush=True)
    while not os.path.exists(path):
        time.sleep(0.01)
    return "done"

if __name__"""
    with supervised(tmp_path, written(tmp_path, WORKER.replace("if __name__", held)), "3") as running:

        async def six(gate: str) -> list[asyncio.Task[object]]:
            calls = [asyncio.ensure_future(here.call("a.b.held", str(tmp_path / gate))) for _ in range(6)]
            for _ in calls:
                await asyncio.to_thread(running.line, r"\[.\] begun")
            return calls

        await asyncio.to_thread(running.ready, 3)
        async with trd.connect() as here:
            pids = set((await found(here, 3)).values())
            victim = min(pids)
            repeatable, once = Load(here, idempotent=True), Load(here)
            await asyncio.gather(repeatable.until(3, set()), once.until(3, set()))
            os.kill(victim, signal.SIGKILL)
            await asyncio.gather(repeatable.until(1, pids), once.until(1, pids))
            # A call whose handler may have begun fails, and says so, unless it is idempotent.
            assert repeatable.errors == []
            assert [each for each in once.errors if not isinstance(each, StreamIncomplete)] == []
            once.errors.clear()

            pids = set((await found(here, 3)).values())
            calls = await six("first")
            running.signal(signal.SIGHUP)
            await asyncio.to_thread(running.line, r"restarting 3 replica\(s\), one after the other")
            await asyncio.to_thread(running.line, r"\[.\] draining: . request\(s\) may run .*")
            (tmp_path / "first").touch()
            await asyncio.to_thread(running.line, r"restarted: 3 replica\(s\)")
            await asyncio.gather(repeatable.until(3, pids), once.until(3, pids))
            assert await asyncio.gather(*calls) == ["done"] * 6
            assert not set((await found(here, 3)).values()) & pids
            assert repeatable.errors == once.errors == []

            calls = await six("second")
            running.signal(signal.SIGTERM)
            await asyncio.to_thread(running.line, r"\[.\] draining: . request\(s\) may run .*")
            await asyncio.gather(repeatable.stop(), once.stop())
            # Those that no handler has begun find no instance any more. All that had begun are answered.
            assert {type(each) for each in (*repeatable.errors, *once.errors)} <= {NoInstances, Draining}
            (tmp_path / "second").touch()
            assert await asyncio.gather(*calls) == ["done"] * 6
        await asyncio.to_thread(running.end, 0)
    assert f"replica 0: process {victim} ended by SIGKILL; starting again" in running.lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_all(tmp_path: Path, number: signal.Signals) -> None:
    fifo = tmp_path / "gate"
    os.mkfifo(fifo)
    with supervised(tmp_path, written(tmp_path), "2") as running:
        await asyncio.to_thread(running.ready, 2)
        async with trd.connect() as here:
            call = asyncio.ensure_future(here.call("a.b.gated", str(fifo)))
            await asyncio.to_thread(running.line, r"\[.\] begun")
            running.signal(number)
            await asyncio.to_thread(running.line, r"\[.\] draining: 1 request\(s\) may run .*")
            await asyncio.to_thread(fifo.write_text, "")
            assert await call == "done"
        await asyncio.to_thread(running.end, 0)


async def test_sigterm_in_a_rolling_restart_cuts_no_request(tmp_path: Path) -> None:
    fifo = tmp_path / "gate"
    os.mkfifo(fifo)
    logs = "import logging; logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
    with supervised(tmp_path, written(tmp_path, logs + WORKER), "1") as running:
        await asyncio.to_thread(running.ready, 1)
        async with trd.connect() as here:
            call = asyncio.ensure_future(here.call("a.b.gated", str(fifo)))
            await asyncio.to_thread(running.line, r"\[.\] begun")
            running.signal(signal.SIGHUP)
            await asyncio.to_thread(running.line, r"\[.\] draining: .*")
            await asyncio.sleep(50 * MS)  # A signal that follows within 20 ms is taken for an echo of the first.
            running.signal(signal.SIGTERM)
            await asyncio.to_thread(running.line, r"SIGTERM: draining 2 process\(es\)")
            await asyncio.to_thread(fifo.write_text, "")
            assert await call == "done"
        await asyncio.to_thread(running.end, 0)


@killed
async def test_a_second_signal_ends_all_at_once(tmp_path: Path) -> None:
    fifo = tmp_path / "gate"
    os.mkfifo(fifo)
    with supervised(tmp_path, written(tmp_path), "2") as running:
        await asyncio.to_thread(running.ready, 2)
        pids = running.replicas()
        async with trd.connect() as here:
            call = asyncio.ensure_future(here.call("a.b.gated", str(fifo)))
            await asyncio.to_thread(running.line, r"\[.\] begun")
            running.signal(signal.SIGTERM)
            await asyncio.to_thread(running.line, r"\[.\] draining: .*")
            await asyncio.sleep(50 * MS)  # A signal that follows within 20 ms is taken for an echo of the first.
            running.signal(signal.SIGINT)
            with pytest.raises(StreamIncomplete):
                await call
        await asyncio.to_thread(running.end, 128 + signal.SIGINT)
    assert not any(map(alive, pids))


async def test_replicas_drain_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    fifo = tmp_path / "gate"
    os.mkfifo(fifo)
    with supervised(tmp_path, written(tmp_path), "2") as running:
        await asyncio.to_thread(running.ready, 2)
        pids = running.replicas()
        async with trd.connect() as here:
            call = asyncio.ensure_future(here.call("a.b.gated", str(fifo)))
            await asyncio.to_thread(running.line, r"\[.\] begun")
            running.signal(signal.SIGKILL)
            await asyncio.to_thread(fifo.write_text, "")
            assert await call == "done"
        await asyncio.to_thread(wait_until_gone, pids)


@killed
def test_replicas_that_have_not_begun_to_serve_end_with_the_supervisor(tmp_path: Path) -> None:
    loads = """
import os, time
import triton_distributed as trd

@trd.serve("a.b.c")
async def handler(request: int) -> int:
    return request

if "TRD_REPLICA" in os.environ:
    print("loading", flush=True)
    while True:
        time.sleep(0.05)
trd.run(processes=2)
"""
    with supervised(tmp_path, written(tmp_path, loads)) as running:
        for _ in range(2):
            running.line(r"\[.\] loading")
        pids = running.replicas()
        running.signal(signal.SIGKILL)
        wait_until_gone(pids)


def test_sigterm_before_the_replicas_are_ready_is_a_clean_end(tmp_path: Path) -> None:
    loads = """
import os, time
import triton_distributed as trd

if "TRD_REPLICA" in os.environ:
    print("loading", flush=True)
    while True:
        time.sleep(0.05)

@trd.serve("a.b.c")
async def handler(request: int) -> int:
    return request

trd.run(processes=1)
"""
    with supervised(tmp_path, written(tmp_path, loads)) as running:
        running.line(r"\[0\] loading")
        running.stop()


def test_a_program_that_does_not_start_ends_the_supervisor(tmp_path: Path) -> None:
    written(tmp_path, "raise RuntimeError('no such model')\n", "broken.py")
    with supervised(tmp_path, "-m", "triton_distributed.cli.main", "serve", "broken", "--replicas", "2") as running:
        running.end(1)
    assert any(line.endswith("] RuntimeError: no such model") for line in running.lines)
    assert running.lines[-1].startswith("trd serve: error: replica ")
    assert "ended with status 1 before any replica could be called" in running.lines[-1]


def test_with_run_that_is_an_exception(tmp_path: Path) -> None:
    code = WORKER.replace("if __name__", "if 'TRD_REPLICA' in os.environ: sys.exit(3)\nif __name__")
    with supervised(tmp_path, written(tmp_path, code), "2") as running:
        running.end(1)
    assert "ended with status 3 before any replica could be called; its output says why" in running.lines[-1]


@pytest.mark.slow
async def test_one_that_ends_again_and_again_is_failing_and_the_others_go_on(tmp_path: Path) -> None:
    code = WORKER.replace(
        "if __name__",
        "if os.environ.get('TRD_REPLICA') == '1' and os.path.exists('bad'): sys.exit('no GPU 1')\nif __name__",
    )
    with supervised(tmp_path, written(tmp_path, code), "2") as running:
        await asyncio.to_thread(running.ready, 2)
        (tmp_path / "bad").touch()
        pids = await ask(2)
        os.kill(pids["1"], signal.SIGTERM)
        text = r"replica 1 is failing, 5 ends in a row: process \d+ ended with status 1; starting again in \d\.\d s; 1 of 2 .*"
        await asyncio.to_thread(running.line, text)
        assert await ask(1) == {"0": pids["0"]}
        (tmp_path / "bad").unlink()
        assert (await ask(2))["1"] != pids["1"]
        await asyncio.to_thread(running.stop)


def test_sighup_while_a_replica_loads_starts_it_again(tmp_path: Path) -> None:
    code = WORKER.replace(
        "if __name__",
        """
if "TRD_REPLICA" in os.environ:
    import time
    print("loading", os.path.exists("new"), flush=True)
    while not os.path.exists("new"):
        time.sleep(0.01)
if __name__""",
    )
    with supervised(tmp_path, written(tmp_path, code), "1") as running:
        running.line(r"\[0\] loading False")
        running.signal(signal.SIGHUP)
        running.line(r"\[0\] loading False")
        (tmp_path / "new").touch()
        running.ready(1)
        running.stop()


@killed
async def test_what_a_replica_has_started_ends_with_it(tmp_path: Path) -> None:
    code = WORKER.replace(
        "if __name__",
        """
if "TRD_REPLICA" in os.environ:
    import subprocess
    print("child", subprocess.Popen([sys.executable, "-c", "while True: __import__('time').sleep(0.05)"]).pid, flush=True)
if __name__""",
    ).replace("import asyncio", "import warnings; warnings.simplefilter('ignore')\nimport asyncio")
    with supervised(tmp_path, written(tmp_path, code), "1") as running:
        child = int(running.line(r"\[0\] child (\d+)")[1])
        running.ready(1)
        assert alive(child)
        os.kill((await ask(1))["0"], signal.SIGKILL)
        await asyncio.to_thread(wait_until_gone, [child])
        second = int(running.line(r"\[0\] child (\d+)")[1])
        running.line(r"\[0\] ready: .*")
        await asyncio.to_thread(running.stop)
        await asyncio.to_thread(wait_until_gone, [second])


def test_a_status_that_is_not_0_is_passed_on(tmp_path: Path) -> None:
    code = WORKER.replace('    print("ran")', "    if os.environ.get('TRD_REPLICA') == '1': sys.exit(5)")
    with supervised(tmp_path, written(tmp_path, code), "2") as running:
        running.ready(2)
        running.stop(5)


def test_lambdas_local_functions_and_a_program_without_a_guard_are_fine(tmp_path: Path) -> None:
    code = """
import os
import triton_distributed as trd

serve = trd.serve

def make(name):
    @serve(name)
    async def local(request: object) -> list:
        return [os.environ["TRD_REPLICA"], os.getpid()]
    return local

os.makedirs("elsewhere", exist_ok=True)
os.chdir("elsewhere")
trd.run(make("a.b.who"), serve("a.b.other")(lambda request: request), processes=2)
"""
    with supervised(tmp_path, written(tmp_path, code)) as running:
        running.ready(2)
        assert set(asyncio.run(ask(2))) == {"0", "1"}
        running.stop()


def test_processes_of_a_replica_are_no_replicas(tmp_path: Path) -> None:
    code = WORKER.replace(
        "    trd.run(processes=int(sys.argv[1]))",
        """
    if sys.argv[1] == "1" and "TRD_REPLICA" in os.environ:
        import subprocess
        done = subprocess.run([sys.executable, __file__, "0"], capture_output=True, text=True)
        print(done.stderr.splitlines()[-1], flush=True)
    trd.run(processes=int(sys.argv[1]))""",
    )
    with supervised(tmp_path, written(tmp_path, code), "1") as running:
        running.line(r"\[0\] ValueError: run\(\): processes=0: it must be at least 1")
        running.ready(1)
        running.stop()


@pytest.mark.usefixtures("possible")
def test_as_process_1_it_drains_and_removes_the_orphans_of_its_container(tmp_path: Path) -> None:
    code = WORKER.replace(
        "if __name__",
        """
@trd.serve("a.b.orphan")
def orphan(request: object) -> int:
    import subprocess
    # The shell ends at once; its child becomes an orphan, and ends after the shell.
    read, write = os.pipe()
    subprocess.run(["sh", "-c", "cat & echo $!"], stdin=read, stdout=open("orphan", "w"), check=True)
    pid = int(open("orphan").read())
    os.close(read), os.close(write)
    while os.path.exists(f"/proc/{pid}"):
        pass
    return pid

if __name__""",
    ).replace("import asyncio", "import warnings; warnings.simplefilter('ignore')\nimport asyncio")
    written(tmp_path, code)
    process = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "worker.py", "2"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRD_WATCHDOG_S": "0"},
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready:"):
                break
        else:
            pytest.fail("it has ended")

        async def orphan() -> int:
            async with trd.connect() as here:
                return await asyncio.wait_for(here.call("a.b.orphan", None), PATIENCE_S)

        assert asyncio.run(orphan()) > 1
        [first] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(PATIENCE_S) == 0, rest
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_it_drains_when_its_terminal_is_closed(tmp_path: Path) -> None:
    written(tmp_path, WORKER.replace('print("ran")', "pass"))
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(
            sys.executable, [sys.executable, "worker.py", "2"], {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        )
    text = b""
    while b"ready: 2" not in text:
        text += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

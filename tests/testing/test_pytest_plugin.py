"""The plugin within runs of pytest of its own: its modes, and the failures that it reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guards.tree import ROOT

pytest_plugins = ["pytester"]

HEAD = """
import asyncio, threading, time
import pytest
import triton_distributed
from tests.testing.contracts import *
from triton_distributed import Overloaded, connect, connect_sync
"""

PASSES = """
async def test_calls(trd):
    await trd.serve(upper)
    assert await trd.call(UPPER, Text("a")) == Text("A")
    assert await twice(Text("a")) == Text("AA")
    assert asyncio.get_running_loop() is trd.runtime.event_loop()

async def test_worker(trd):
    worker = await trd.worker()
    await worker.serve(letters)
    async for each in trd.stream(LETTERS, Text("abc")):
        break
    await worker.kill()

async def test_fake(trd, trd_fake):
    trd_fake[UPPER].returns(Text("x"))
    assert await trd.call(UPPER, Text("a")) == Text("x")

@pytest.mark.virtual_time(seed=3)
async def test_virtual_time(trd):
    async def slow(request: Text) -> Text:
        await asyncio.sleep(3600)
        return request
    await trd.serve(UPPER, slow)
    assert await trd.call(UPPER, Text("a")) == Text("a")

def test_sync(trd_sync):
    trd_sync.serve(upper)
    assert trd_sync.call(UPPER, Text("a")) == Text("A")
"""

QUIET = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:hypothesispytest"]
ASYNCIO = "asyncio_default_fixture_loop_scope = function"


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Runs a text as a file of tests. Warnings are errors."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(text: str, *options: str, head: str = HEAD, ini: str = f"asyncio_mode = auto\n{ASYNCIO}"):
        pytester.makeini(f"[pytest]\nfilterwarnings = error\n{ini}")
        pytester.makepyfile(head + text)
        return pytester.runpytest_subprocess(*QUIET, *options)

    return run


@pytest.mark.parametrize(
    ("mark", "options", "ini"),
    [
        ("", [], f"asyncio_mode = auto\n{ASYNCIO}"),
        ("@pytest.mark.asyncio\n", [], ASYNCIO),
        ("@pytest.mark.asyncio(loop_scope='module')\n", [], ASYNCIO),
        ("", [], f"asyncio_mode = auto\n{ASYNCIO}\nasyncio_default_test_loop_scope = session"),
        ("@pytest.mark.anyio\n", ["-p", "no:asyncio"], ""),
        ("@pytest.mark.anyio\n", [], ASYNCIO),
    ],
    ids=["auto", "strict", "module", "session", "anyio", "both"],
)
def test_the_fixtures_with_each_plugin_and_loop(inner, mark: str, options: list[str], ini: str) -> None:
    backend = "\n@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n" if "anyio" in mark else ""
    inner(PASSES.replace("async def test", f"{mark}async def test") + backend, *options, ini=ini).assert_outcomes(
        passed=5
    )


def test_what_a_test_leaves_fails_it_and_is_named(inner) -> None:
    result = inner(
        """
async def never(request: Text) -> Text:
    await asyncio.Event().wait()

def stuck(request: Text) -> Text:
    release.wait()

release = threading.Event()

async def test_task(trd):
    async def forgotten():
        await asyncio.Event().wait()
    test_task.kept = asyncio.create_task(forgotten(), name="the task")

async def test_handler(trd):
    await trd.serve(UPPER, never)
    await trd.send(UPPER, Text("a"))

async def test_stream(trd):
    await trd.serve(LETTERS, letters)
    test_stream.kept = trd.stream(LETTERS, Text("a" * 100000))
    await anext(test_stream.kept)

async def test_connection(trd):
    test_connection.kept = connect()

async def test_thread(trd):
    test_thread.kept = threading.Thread(target=release.wait, name="the thread")
    test_thread.kept.start()

def test_sync_handler(trd_sync):
    trd_sync.serve(UPPER, never)
    trd_sync.send(UPPER, Text("a"))

def test_sync_stream(trd_sync):
    trd_sync.serve(LETTERS, letters)
    test_sync_stream.kept = trd_sync.stream(LETTERS, Text("a" * 100000))
    next(test_sync_stream.kept)

def test_unexpected(trd_fake, trd_sync):
    with pytest.raises(AssertionError):
        trd_sync.call(UPPER, Text("a"))

async def test_wrong_answer(trd, trd_fake):
    trd_fake[UPPER].answers(lambda request: 1)
    with pytest.raises(triton_distributed.RemoteError):
        await trd.call(UPPER, Text("a"))

async def test_that_fails_itself(trd):
    await trd.serve(UPPER, never)
    await trd.send(UPPER, Text("a"))
    assert False

async def test_after_them(trd):
    release.set()
    assert await trd.instances(UPPER) == []
""",
        "-rE",
    )
    result.assert_outcomes(passed=10, failed=1, errors=9)
    for lines in (
        ["*ERROR at teardown of test_task*", "*left over at the end:*", "task the task waits at *py:* in *forgotten"],
        ["*teardown of test_handler*", "handler never of t.fixture.upper, request *, still runs at *py:* in never"],
        ["*teardown of test_stream*", "handler letters of t.fixture.letters, request *, still runs at *"],
        ["*teardown of test_connection*", "the connection of *py:* is not closed"],
        ["*teardown of test_thread*", "thread the thread is at *"],
        ["*teardown of test_sync_handler*", "handler never of t.fixture.upper, request *"],
        ["*teardown of test_sync_stream*", "handler letters of t.fixture.letters, request *"],
        ["*teardown of test_unexpected*", 'unexpected call of "t.fixture.upper"*'],
        ["*teardown of test_wrong_answer*", "trd_fake*t.fixture.upper*"],
    ):
        result.stdout.fnmatch_lines(lines)


def test_a_fixture_on_another_loop_says_which(inner) -> None:
    result = inner(
        """
import pytest_asyncio

@pytest_asyncio.fixture
async def served(trd):
    await trd.serve(upper)

@pytest.mark.asyncio(loop_scope="module")
async def test_other_loop(trd, served):
    pass

async def test_other_thread(trd):
    await asyncio.to_thread(trd.stream, LETTERS, Text("a"))
"""
    )
    result.assert_outcomes(errors=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            '*OtherLoop: serve_endpoint: the fixture `trd` belongs to the event loop*the scope "module"*'
            'asyncio_default_fixture_loop_scope = "module"*',
            '*OtherLoop*thread "MainThread"*trd_sync*',
        ]
    )


def test_misuse_says_what_to_use(inner) -> None:
    result = inner(
        """
def test_plain(trd):
    pass

async def test_blocks(trd_sync):
    with pytest.raises(RuntimeError, match="asynchronous client"):
        trd_sync.call(UPPER, Text("a"))

@pytest.mark.virtual_time
async def test_real(trd_sync):
    pass

async def test_two_loops(trd):
    def other():
        asyncio.run(calls())
    async def calls():
        connect()
    with pytest.raises(RuntimeError, match="trd_sync"):
        await asyncio.to_thread(other)
"""
    )
    result.assert_outcomes(errors=2, passed=2)
    result.stdout.fnmatch_lines(["*test_plain is a plain function: use the fixture `trd_sync`*"])
    result.stdout.fnmatch_lines(["*use the fixture `trd` with virtual_time*"])
    result = inner("@pytest.mark.virtual_time\ndef test_plain():\n    pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*virtual_time needs an `async def` test*"])


def test_without_a_plugin_for_loops(inner) -> None:
    result = inner(
        "def test_sync(trd_sync):\n    pass\n@pytest.fixture\ndef other(trd):\n    pass\ndef test_trd(other):\n    pass",
        "-p",
        "no:asyncio",
        ini="",
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*the fixture `trd` needs an event loop: pip install 'triton-distributed?pytest?'*"])


def test_virtual_time_is_repeatable_and_ends_what_waits_for_nothing(inner) -> None:
    result = inner(
        """
import random
seen = []

@pytest.mark.virtual_time(seed=7)
@pytest.mark.parametrize("run", [1, 2])
async def test_seed(trd, run):
    seen.append((random.random(), trd.runtime.instance_id, asyncio.get_running_loop().time()))
    assert len(set(seen)) == 1

async def test_real_time():
    assert type(asyncio.get_running_loop()).__name__ != "VirtualTimeLoop"

@pytest.mark.virtual_time
async def test_deadlock(trd):
    await asyncio.Event().wait()
"""
    )
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*Deadlock: deadlock: nothing is ready*"])


def test_a_run_without_the_fixtures_loads_nothing(inner, tmp_path: Path) -> None:
    result = inner(
        "def test_modules():\n    import sys\n"
        "    loaded = {each for each in sys.modules if each.startswith('triton_distributed')}\n"
        "    allowed = {'triton_distributed', 'triton_distributed.testing', 'triton_distributed.testing.pytest_plugin'}\n"
        "    assert loaded == allowed | ({'triton_distributed_asyncio'} & loaded)",
        head="",
    )
    result.assert_outcomes(passed=1)

"""The watchdog's judgement, with clocks that are handed in: when a loop counts as stuck, and what is said."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import triton_distributed
from tests.timing import PATIENCE_S
from triton_distributed.observe import LAG_BOUNDS_S, Watchdog
from triton_distributed.observe.stacks import Blame, blame, callback
from triton_distributed.observe.usage import Usage, usage_of_this_thread

LIMIT_S = 0.2


class Watched:
    """A watchdog whose thread is the test, and which takes another thread for the loop's.

    Args:
        blocks: what that thread calls; by default it is stuck in this file.
    """

    def __init__(self, blocks: Callable[[threading.Event, threading.Event], None] | None = None) -> None:
        self.now = 1000.0
        self.used = Usage(1000.0, 1000.0, 1000.0)
        self.told: list[bool] = []
        self.fails = False
        self.loop = asyncio.get_running_loop()
        self.dog = Watchdog(self.loop, LIMIT_S, self.tell, clock=lambda: self.now, usage=lambda: self.used)
        self._release, inside = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=blocks or blocks_the_loop, args=(inside, self._release))
        self._thread.start()
        inside.wait()
        assert self._thread.ident is not None
        self.dog._loop_thread = self._thread.ident
        self.dog._beat_at = self.dog._since = self.now
        self.wait_s = self.dog._sleep(LIMIT_S, self.now, self.used)

    def tell(self, stuck: bool) -> None:
        if self.fails:
            raise OSError("the disk is full")
        self.told.append(stuck)

    def look(self, late_s: float = 0.0, cpu_s: float = 0.0, loop_s: float = 0.0, starved_s: float = 0.0) -> None:
        """Let the time pass that it wanted to sleep, and look.

        Args:
            late_s: how much longer it slept.
            cpu_s, loop_s: processor time used meanwhile, by the process, by the loop's thread.
            starved_s: for which the loop's thread got no processor.
        """
        self.now += self.wait_s + late_s
        process, loop, starved = self.used
        self.used = Usage(process + cpu_s, None if loop is None else loop + loop_s, starved + starved_s)
        self.wait_s = self.dog.look()

    def beat(self) -> None:
        """The loop turns."""
        self.dog._next_beat = self.now
        self.dog._beat()
        assert self.dog._timer is not None
        self.dog._timer.cancel()

    def end(self) -> None:
        self._release.set()
        self._thread.join()


def blocks_the_loop(inside: threading.Event, release: threading.Event) -> None:
    inside.set()
    release.wait()  # the line that is blamed


@pytest.fixture
async def watched() -> Iterator[Watched]:  # type: ignore[misc]
    made = Watched()
    yield made
    made.end()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, "triton_distributed.watchdog")
    return lambda: [each.getMessage() for each in caplog.records if each.name == "triton_distributed.watchdog"]


async def test_a_stall_is_said_and_told_once_and_its_end_too(watched: Watched, said: Callable[[], list[str]]) -> None:
    for _ in range(4):
        watched.look()
    assert (watched.told, watched.dog.stats.stalls, len(said())) == ([True], 1, 1)
    (text,) = said()
    assert f"{__file__}:" in text
    assert "in blocks_the_loop" in text
    assert "release.wait()" in text  # the stack shows the line
    length_s = watched.now - 1000.0
    watched.beat()
    watched.wait_s = watched.dog.look()
    assert (watched.told, watched.dog.stats.stalls) == ([True, False], 1)
    assert f"turns again: it was stuck for {length_s - LIMIT_S / 4:.2f} s" in said()[1]
    assert watched.dog.stats.longest_s == pytest.approx(length_s - LIMIT_S / 4)


async def test_a_stall_is_counted_while_it_is_under_way(watched: Watched) -> None:
    stats, counted = watched.dog.stats, []
    for _ in range(40):
        watched.look()
        counted.append(stats.stalled_s)
        assert stats.stuck_s == stats.longest_s == pytest.approx(watched.now - 1000.0 - LIMIT_S / 4)
    assert counted[-1] > 30
    watched.now += 0.01
    watched.beat()
    ended_at = watched.now
    watched.now += 0.02  # a reader in between
    watched.wait_s = watched.dog.look()
    assert stats.stuck_s == 0.0
    assert stats.stalled_s == pytest.approx(ended_at - 1000.0 - LIMIT_S / 4)
    assert sorted(counted) == counted  # Prometheus takes any decrease for a new process
    assert counted[-1] <= stats.stalled_s
    watched.look()
    watched.look()
    assert stats.stalled_s == pytest.approx(ended_at - 1000.0 - LIMIT_S / 4 + stats.stuck_s)


async def test_it_is_noticed_within_the_limit_and_not_before_three_quarters(watched: Watched) -> None:
    for _ in range(10):  # a loop that turns, however the two clocks fall
        watched.now += watched.wait_s - 0.01
        watched.beat()
        watched.now += 0.01
        watched.wait_s = watched.dog.look()
    assert watched.dog.stats.stalls == 0
    last = watched.now - 0.01
    watched.look()
    assert watched.dog.stats.stalls == 1
    assert watched.now - last == pytest.approx(LIMIT_S)  # it can have begun a beat later at most


async def test_a_process_that_was_stopped_is_not_stuck(watched: Watched, said: Callable[[], list[str]]) -> None:
    for _ in range(5):
        watched.look(late_s=60.0)
        watched.beat()
    assert (watched.dog.stats.stalls, watched.told, said()) == (0, [], [])


async def test_one_that_holds_the_interpreter_is(watched: Watched) -> None:
    watched.look(late_s=2.0, cpu_s=2.0)
    assert (watched.dog.stats.stalls, watched.told) == (1, [True])


async def test_what_could_not_be_told_is_tried_again(watched: Watched, said: Callable[[], list[str]]) -> None:
    watched.look()
    watched.fails = True
    for _ in range(3):
        watched.beat()
        watched.look(late_s=-0.001)
    assert watched.told == [True]
    assert len([each for each in said() if "the disk is full" in each]) == 1
    watched.fails = False
    watched.beat()
    watched.look(late_s=-0.001)
    assert watched.dog.stats.stalls == 1
    assert watched.told == [True, False]


async def test_the_same_line_is_not_said_again_and_again(watched: Watched, said: Callable[[], list[str]]) -> None:
    for _ in range(5):
        watched.look()
        watched.beat()
        watched.wait_s = watched.dog.look()
    assert watched.dog.stats.stalls == 5
    assert len(said()) == 2
    watched.now += 60.0
    watched.beat()
    watched.wait_s = watched.dog.look()
    watched.look()
    assert "(4 times more since the last report)" in said()[2]


async def test_lag_is_counted(watched: Watched) -> None:
    for lag_s in (0.0, 0.0005, 0.015, 0.3, 100.0):
        watched.dog._next_beat = watched.now - lag_s
        watched.dog._beat()
        assert watched.dog._timer is not None
        watched.dog._timer.cancel()
    lag = watched.dog.stats.lag
    assert len(lag) == len(LAG_BOUNDS_S) + 1
    assert [count for count in lag if count] == [2, 1, 1, 1]
    assert watched.dog.stats.lag_s == pytest.approx(100.3155)
    assert (lag[0], lag[LAG_BOUNDS_S.index(0.02)], lag[LAG_BOUNDS_S.index(0.5)], lag[-1]) == (2, 1, 1, 1)


@pytest.mark.any_loop
async def test_the_thread_ends_with_it_and_0_starts_none() -> None:
    before = set(threading.enumerate())
    none = Watchdog(asyncio.get_running_loop(), 0.0, lambda stuck: None)
    none.start()
    assert set(threading.enumerate()) == before
    dog = Watchdog(asyncio.get_running_loop(), LIMIT_S, lambda stuck: None)
    dog.start()
    dog.start()
    (thread,) = set(threading.enumerate()) - before
    assert thread.daemon
    dog.stop()
    assert not thread.is_alive()
    dog.start()
    assert set(threading.enumerate()) == before


# --- what the machine does, and what the loop does itself -------------------------------------------------------------


async def test_time_without_a_processor_does_not_count(watched: Watched, said: Callable[[], list[str]]) -> None:
    """The loop is in a program's line all the time, and has a fifth of a processor: it is noticed when it had enough."""
    while not watched.dog.stats.stalls:
        assert (watched.told, said()) == ([], [])
        watched.look(starved_s=0.8 * watched.wait_s, loop_s=0.2 * watched.wait_s)
        assert watched.now < 1000.0 + 10 * LIMIT_S
    assert watched.now > 1000.0 + 2.5 * LIMIT_S
    assert watched.told == [True]


async def test_a_loop_that_gets_no_processor_is_never_named(watched: Watched, said: Callable[[], list[str]]) -> None:
    for _ in range(50):
        watched.look(starved_s=watched.wait_s)
    assert (watched.dog.stats.stalls, watched.told, said()) == (0, [], [])
    assert watched.wait_s == pytest.approx(LIMIT_S)  # it does not look more often for that


USER, OTHER = "/srv/app.py", "/srv/lib.py"
HERE = os.path.dirname(triton_distributed.__file__)
STDLIB = sysconfig.get_paths()["stdlib"]
ASYNCIO, WIRE, RUNTIME = (
    f"{STDLIB}/asyncio/selector_events.py",
    f"{HERE}/payload/codec.py",
    f"{HERE}/serving/request.py",
)
LIBRARY, WORKER, NATS = (f"{STDLIB}/site-packages/{name}/core.py" for name in ("numpy", "worker", "nats"))
SUBPROCESS = [f"{STDLIB}/subprocess.py", f"{STDLIB}/selectors.py"]

# The files of a callback's frames, the outermost first → whether it is a program's doing, and which file is named.
STACKS = {
    "a handler": ([RUNTIME, USER], True, USER),
    "a function that it calls": ([RUNTIME, USER, OTHER], True, OTHER),
    "a library that it calls": ([RUNTIME, USER, LIBRARY], True, USER),
    "the standard library that it calls": ([RUNTIME, USER, *SUBPROCESS], True, USER),
    "a handler that is installed": ([RUNTIME, WORKER], True, WORKER),
    "a task of the program": ([USER], True, USER),
    "a task of a library": ([LIBRARY, SUBPROCESS[0]], True, LIBRARY),
    "a validator of a request": ([RUNTIME, WIRE, LIBRARY, USER], True, USER),
    "reading a socket": ([ASYNCIO], False, ASYNCIO),
    "writing a socket": ([f"{HERE}/transport/session.py", ASYNCIO], False, f"{HERE}/transport/session.py"),
    "encoding": ([RUNTIME, WIRE], False, WIRE),
    "encoding with a library": ([RUNTIME, WIRE, LIBRARY], False, WIRE),
    "decoding for an async for": ([RUNTIME, USER, f"{HERE}/calling/response_stream.py", WIRE], False, USER),
    "the client of NATS": ([NATS, ASYNCIO], False, ASYNCIO),
    "a callback written in C": ([], False, ""),
}


def in_files(files: list[str], loop: asyncio.AbstractEventLoop) -> Callable[[threading.Event, threading.Event], None]:
    """A callback of a loop whose frames are in these files, and whose innermost waits in C."""

    def callback(inside: threading.Event, release: threading.Event) -> None:
        def unlock() -> None:
            release.wait()
            lock.release()

        lock = threading.Lock()
        lock.acquire()
        waiter = threading.Thread(target=unlock)
        waiter.start()
        call: Callable[..., object] = lock.acquire
        for file in reversed(files):
            found: dict[str, Any] = {}
            exec(compile("def work(call):\n    call()\n", file, "exec"), found)
            call = functools.partial(found["work"], call)
        inside.set()
        asyncio.Handle(call, (), loop)._run()
        waiter.join()

    return callback


async def named(files: list[str]) -> Blame:
    """What is blamed for a callback whose frames are in these files."""
    inside, release = threading.Event(), threading.Event()
    thread = threading.Thread(target=in_files(files, asyncio.get_running_loop()), args=(inside, release))
    thread.start()
    inside.wait()
    assert thread.ident is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                frame = sys._current_frames()[thread.ident]
                frames = callback(frame, None)
                if frames is not None and [each.f_code.co_filename for each in frames] == files[::-1]:
                    return blame(frames or [frame])
                await asyncio.sleep(0)
    finally:
        release.set()
        thread.join()


@pytest.mark.parametrize("what", STACKS)
async def test_whose_doing_it_is(what: str) -> None:
    files, theirs, file = STACKS[what]
    found = await named(files)
    assert found.theirs is theirs
    assert not file or found.file == file


OWN = [
    ({"loop_s": 0.2, "cpu_s": 0.2}, "It moves, encodes or decodes much data"),
    ({"loop_s": 0.01, "cpu_s": 0.3}, "other threads computed for 0.29 s and may have held the interpreter"),
    ({}, "It waits for the operating system"),
]


@pytest.mark.parametrize(("used", "words"), OWN, ids=["computes", "others compute", "waits"])
async def test_what_the_loop_does_itself_is_said_without_advice(
    used: dict[str, float], words: str, said: Callable[[], list[str]]
) -> None:
    watched = Watched(in_files([RUNTIME, WIRE], asyncio.get_running_loop()))
    try:
        await until_it_waits(watched, WIRE)
        watched.look(**used)
    finally:
        watched.end()
    (text,) = said()
    assert f"held up at {WIRE}:2 in work" in text
    assert words in text
    assert "plain `def`" not in text
    assert watched.told == [True]  # it answers nobody, whoever's doing that is


async def until_it_waits(watched: Watched, file: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while sys._current_frames()[watched.dog._loop_thread].f_code.co_filename != file:
            await asyncio.sleep(0)


@pytest.mark.any_loop
async def test_an_idle_loop_is_never_named_however_late_it_is(said: Callable[[], list[str]]) -> None:
    """It waits in its own selector, or, where it is written in C, seems to be at the line that has started it."""
    loop = asyncio.get_running_loop()
    told: list[bool] = []
    now = [1000.0]
    dog = Watchdog(loop, LIMIT_S, told.append, clock=lambda: now[0], usage=lambda: Usage(0.0))
    dog._loop_thread, dog._next_beat = threading.get_ident(), now[0]
    loop.call_soon(dog._beat)  # as its timer does, from the loop
    await asyncio.sleep(0)
    assert dog._timer is not None
    dog._timer.cancel()

    def on_the_stack() -> bool:
        frame = sys._current_frames()[dog._loop_thread]
        return any(each.f_code.co_filename == __file__ for each, _ in traceback.walk_stack(frame))

    def looks() -> None:
        end = time.monotonic() + PATIENCE_S
        while on_the_stack() and time.monotonic() < end:
            pass  # the loop has yet to begin to wait for this thread
        for _ in range(20):
            now[0] += 10.0
            dog._used = Usage(0.0)
            dog._due = now[0]
            dog.look()

    await asyncio.to_thread(looks)
    assert (dog.stats.stalls, told, said()) == (0, [], [])


@pytest.mark.any_loop
@pytest.mark.parametrize("how", ["sleeps", "waits for a lock", "runs a program"])
async def test_a_handler_that_only_waits_is_named(how: str, said: Callable[[], list[str]]) -> None:
    """Without using the processor: that a subprocess is waited for in a selector does not make the loop idle."""
    loop = asyncio.get_running_loop()
    dog = Watchdog(loop, LIMIT_S, lambda stuck: None)
    dog.start()
    lock = threading.Lock()
    lock.acquire()
    end = loop.time() + PATIENCE_S
    while not said() and loop.time() < end:
        await asyncio.sleep(0)
        if how == "sleeps":
            time.sleep(2 * LIMIT_S)
        elif how == "waits for a lock":
            lock.acquire(timeout=2 * LIMIT_S)
        else:
            subprocess.run([sys.executable, "-c", f"import time; time.sleep({2 * LIMIT_S})"], capture_output=True)
    dog.stop()
    assert f"stuck at {__file__}:" in said()[0]
    assert "in test_a_handler_that_only_waits_is_named" in said()[0]
    assert "plain `def`" in said()[0]


async def test_the_usage_of_a_thread() -> None:
    usage = usage_of_this_thread()
    before = usage()
    end = time.thread_time() + 0.05
    while time.thread_time() < end:
        pass
    after = usage()
    assert after.process - before.process >= 0.05
    if before.loop is not None and after.loop is not None:
        assert after.loop - before.loop >= 0.05
        beside = await asyncio.to_thread(usage)  # the same thread's, whoever asks
        assert beside.loop is not None
        assert beside.loop >= after.loop
    assert after.starved >= before.starved >= 0.0

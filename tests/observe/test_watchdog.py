"""The watchdog's judgement, with clocks that are handed in: when a loop counts as stuck, and what is said."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.timing import PATIENCE_S
from triton_distributed.observe import LAG_BOUNDS_S, Watchdog

LIMIT_S = 0.2


class Watched:
    """A watchdog whose thread is the test, and which takes another thread, stuck in this file, for the loop's."""

    def __init__(self) -> None:
        self.now = self.cpu = 1000.0
        self.told: list[bool] = []
        self.fails = False
        self.loop = asyncio.get_running_loop()
        self.dog = Watchdog(self.loop, LIMIT_S, self.tell, clock=lambda: self.now, cpu=lambda: self.cpu)
        self._release, inside = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=blocks_the_loop, args=(inside, self._release))
        self._thread.start()
        inside.wait()
        assert self._thread.ident is not None
        self.dog._loop_thread = self._thread.ident
        self.dog._beat_at = self.dog._since = self.now
        self.wait_s = self.dog._sleep(LIMIT_S, self.now)

    def tell(self, stuck: bool) -> None:
        if self.fails:
            raise OSError("the disk is full")
        self.told.append(stuck)

    def look(self, late_s: float = 0.0, cpu_s: float = 0.0) -> None:
        """Let the time pass that it wanted to sleep, and look."""
        self.now += self.wait_s + late_s
        self.cpu += cpu_s
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
    assert (lag[0], lag[LAG_BOUNDS_S.index(0.02)], lag[LAG_BOUNDS_S.index(0.5)], lag[-1]) == (2, 1, 1, 1)


@pytest.mark.any_loop
async def test_a_loop_that_waits_for_the_kernel_is_not_stuck_on_a_machine_that_keeps_it_waiting(
    said: Callable[[], list[str]],
) -> None:
    now = 1000.0
    dog = Watchdog(asyncio.get_running_loop(), LIMIT_S, lambda stuck: None, clock=lambda: now, cpu=lambda: now)
    dog._loop_thread = threading.get_ident()
    turned = asyncio.Event()
    dog._next_beat = now
    asyncio.get_running_loop().call_soon(dog._beat)
    asyncio.get_running_loop().call_soon(turned.set)
    await turned.wait()

    def look() -> None:
        nonlocal now
        until = time.monotonic() + PATIENCE_S
        while not dog._waits(sys._current_frames()[dog._loop_thread]):  # the loop is about to wait for this thread
            assert time.monotonic() < until
        now += LIMIT_S
        dog.look()

    await asyncio.to_thread(look)
    assert dog.stats.stalls == 0
    assert said() == []
    dog.stop()


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

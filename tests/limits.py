"""A test that takes too long is interrupted again and again until it ends; this holds for its fixtures too.

pytest-timeout raises once, in whatever runs at that moment. In a callback of an event loop the exception is only logged, and
the test goes on; and what hung in a test may hang again in a fixture, or in the loop that waits for cancelled tasks. Nothing
would end either, and the whole run would stand still.

The exception is raised only while the test or a fixture runs. Between them pytest writes its reports, which takes long on a
busy machine: an exception there would end the run.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from tests.leaks import failed
from tests.timing import PATIENCE_S

#: Seconds between two interruptions, and the time that each fixture of a failed test has. It is above what any of them waits.
AGAIN_S = 1.5 * PATIENCE_S

ALARM = getattr(signal, "SIGALRM", None)

_interruptible = False


def _phase() -> Iterator[None]:
    """One phase of a test: setup, call or teardown."""
    global _interruptible
    _interruptible = True
    try:
        return (yield)
    finally:
        _interruptible = False


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    return (yield from _phase())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    return (yield from _phase())


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    if ALARM is None or not item.stash.get(failed, False):
        return (yield from _phase())
    # pytest-timeout has stopped its timer at the failure.
    before = signal.signal(ALARM, _fixture_hangs)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S, AGAIN_S)
    try:
        return (yield from _phase())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(ALARM, before)


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: object) -> Iterator[None]:
    done = yield
    if ALARM is not None and (rest := signal.getitimer(signal.ITIMER_REAL)[0]):
        interrupt = signal.getsignal(ALARM)

        def when_it_is_safe(number: int, frame: FrameType | None) -> None:
            if _interruptible and callable(interrupt):
                interrupt(number, frame)

        signal.signal(ALARM, when_it_is_safe)
        signal.setitimer(signal.ITIMER_REAL, rest, AGAIN_S)
    return done


def _fixture_hangs(number: int, frame: FrameType | None) -> None:
    if _interruptible:
        pytest.fail(f"a fixture of the failed test still hangs after {AGAIN_S:g} s")

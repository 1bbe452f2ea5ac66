"""The limit of a test's time is said until it is heard, and holds for the test's fixtures too.

pytest-timeout raises once in whatever runs at that moment. In a callback of an event loop that is logged, and the test goes
on; and what hung in a test may then hang in a fixture, or in the loop that waits for cancelled tasks. Nothing would end
either, and a whole run would stand still instead of failing.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from tests.leaks import failed
from tests.timing import PATIENCE_S

AGAIN_S = 1.5 * PATIENCE_S  # until the next time, and for each fixture that hangs; above what any of them waits


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: object) -> Iterator[None]:
    done = yield
    if hasattr(signal, "setitimer") and (rest := signal.getitimer(signal.ITIMER_REAL)[0]):
        signal.setitimer(signal.ITIMER_REAL, rest, AGAIN_S)
    return done


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    if not (hasattr(signal, "setitimer") and item.stash.get(failed, False)):
        return (yield)
    # pytest-timeout has taken its timer back at the failure.
    before = signal.signal(signal.SIGALRM, _ended)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S, AGAIN_S)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _ended(number: int, frame: FrameType | None) -> None:
    pytest.fail(f"a fixture of the failed test still hangs after {AGAIN_S:g} s")

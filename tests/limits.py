"""The limit of a test's time holds for its fixtures too.

pytest-timeout ends a test once. Where what hung in it then hangs in a fixture, or in the loop that waits for its cancelled
tasks, nothing would end that, and a whole run would stand still instead of failing.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from tests.leaks import failed
from tests.timing import PATIENCE_S

AGAIN_S = 1.5 * PATIENCE_S  # for each fixture that hangs; above what any of them waits


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    if not (hasattr(signal, "setitimer") and item.stash.get(failed, False)):
        return (yield)
    if any(signal.getitimer(signal.ITIMER_REAL)):
        return (yield)  # it did not fail for its time, of which the rest is left
    before = signal.signal(signal.SIGALRM, _ended)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S, AGAIN_S)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _ended(number: int, frame: FrameType | None) -> None:
    pytest.fail(f"a fixture of the failed test still hangs after {AGAIN_S:g} s")

"""How the bytes of a session are shared between its streams."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from triton_distributed.wire.window import SMALLEST_WINDOW, WindowBudget


@given(
    st.integers(SMALLEST_WINDOW, 1 << 20),
    st.integers(0, 1 << 26),
    st.lists(st.one_of(st.none(), st.integers(0, 1000)), max_size=200),
)
def test_what_is_promised_stays_within_the_budget(window, total, script):
    budget = WindowBudget(window, total)
    held: list[int] = []
    for step in script:
        if step is None:
            held.append(budget.reserve())
            assert SMALLEST_WINDOW <= held[-1] <= window
            assert sum(each for each in held if each > SMALLEST_WINDOW) <= total
        elif held:
            budget.release(held.pop(step % len(held)))
    for each in held:
        budget.release(each)
    assert budget.reserve() == WindowBudget(window, total).reserve()


def test_a_hundred_thousand_streams_hold_the_smallest_each():
    budget = WindowBudget(1 << 18, 1 << 26)
    held = [budget.reserve() for _ in range(100_000)]
    assert held[0] == 1 << 18
    assert held == sorted(held, reverse=True)
    assert sum(held) <= (1 << 26) + 100_000 * SMALLEST_WINDOW

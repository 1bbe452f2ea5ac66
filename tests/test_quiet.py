"""Log entries that are rate-limited or written once."""

from __future__ import annotations

from triton_distributed.quiet import Quiet


def test_one_entry_for_many_and_the_number_of_the_others() -> None:
    now = 0.0
    quiet = Quiet(10.0, lambda: now)
    assert [quiet.due() for _ in range(5000)] == [0, *[None] * 4999]
    now = 9.999
    assert quiet.due() is None
    now = 10.0
    assert quiet.due() == 5000
    assert quiet.due() is None
    now = 30.0
    assert quiet.due() == 1
    now = 50.0
    assert quiet.due() == 0


def test_keys_do_not_count_for_each_other() -> None:
    quiet = Quiet(10.0, lambda: 0.0)
    assert [quiet.due(key) for key in "abab"] == [0, 0, None, None]


def test_without_a_period_a_key_is_logged_once_until_it_is_forgotten() -> None:
    now = 0.0
    quiet = Quiet(clock=lambda: now)
    assert quiet.due("a") == 0
    now = 1e9
    assert quiet.due("a") is None
    quiet.forget("a")
    quiet.forget("never logged")
    assert quiet.due("a") == 0
    quiet.clear()
    assert quiet.due("a") == 0


def test_it_remembers_so_many_keys_and_forgets_the_oldest() -> None:
    quiet = Quiet(most=2)
    for key in "abc":
        quiet.due(key)
    assert list(quiet) == ["b", "c"]
    assert quiet.due("b") is None
    assert quiet.due("a") == 0

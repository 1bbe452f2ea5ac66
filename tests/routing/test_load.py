"""The load book."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_distributed.routing.load import LoadBook, ReportedLoad


def test_counts_and_forgets() -> None:
    book = LoadBook()
    assert (book.inflight(1), book[1], len(book)) == (0, 0, 0)
    book.acquire(1)
    book.acquire(1)
    book.acquire(2)
    assert (book.inflight(1), book[2], len(book)) == (2, 1, 2)
    assert repr(book) == "<LoadBook of 3 stream(s) on 2 instance(s)>"
    book.release(1)
    book.release(1)
    assert (book[1], len(book)) == (0, 1)


def test_release_without_acquire_is_a_defect() -> None:
    book = LoadBook()
    with pytest.raises(ValueError, match="instance 3 has no open stream"):
        book.release(3)
    assert len(book) == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5))))
def test_is_as_large_as_what_is_open(steps: list[tuple[bool, int]]) -> None:
    book = LoadBook()
    still: list[int] = []
    for begin, instance_id in steps:
        if begin:
            book.acquire(instance_id)
            still.append(instance_id)
        elif instance_id in still:
            book.release(instance_id)
            still.remove(instance_id)
        assert len(book) == len(set(still))
        assert all(book[each] == still.count(each) for each in range(1, 6))


def test_reports_of_workers() -> None:
    now = [10.0]
    book = LoadBook(lambda: now[0])
    wanted: list[int] = []
    book.want = wanted.append
    used = [book.used]
    assert book.reported(1) is None
    assert wanted == [1]
    assert [*used, book.used] == [False, True]
    book.note_report(1, 3, 2)
    now[0] = 10.5
    assert book.reported(1) == (3, 2, 0.5)
    assert book.reported(1) == ReportedLoad(in_flight=3, queued=2, age_s=0.5)
    assert wanted == [1]
    book.note_report(1, 4, 0)
    assert book.reported(1) == (4, 0, 0.0)
    book.forget_report(1)
    book.forget_report(1)
    assert book.reported(1) is None
    assert book[1] == 0
    assert LoadBook().reported(5) is None  # a book without workers

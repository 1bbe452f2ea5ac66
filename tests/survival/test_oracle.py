"""What `make survival` finds out: every way in which an answer can be wrong shows in its counts."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.survival.__main__ import PHASES, _chosen, _seconds
from benchmarks.survival.content import KINDS, item, wrong
from benchmarks.survival.load import Load, longest_gap, merged, percentile
from benchmarks.survival.overload import _recovery_s
from benchmarks.survival.rolling import _figures
from triton_distributed.errors import Overloaded, StreamIncomplete


class Answering:
    """Stands for a client: what it answers is made of the whole answer by `spoil`."""

    def __init__(self, spoil: Any) -> None:
        self._spoil = spoil

    def _items(self, request: Any) -> list[Any]:
        return self._spoil([item(request["key"], index) for index in range(request["items"])])

    async def call(self, request: Any, **options: Any) -> Any:
        (found,) = self._items(request)
        return found

    async def generate(self, request: Any, **options: Any) -> AsyncIterator[Any]:
        for each in self._items(request):
            yield each


def incomplete(items: int) -> StreamIncomplete:
    return StreamIncomplete("t.c.e", 1, "unix:///s", "the peer closed the connection", items)


def broken_off(items: list[Any], error: Exception) -> Any:
    def rest() -> Any:
        yield from items
        raise error

    return rest()


async def judged(kind: str, spoil: Any) -> dict[str, Any]:
    load = Load(Answering(spoil), "c0", 1.0)  # type: ignore[arg-type]
    load._stopped = True
    await load._one(KINDS[kind], f"c0-{kind}-7")
    return await load.end([], 1.0)


WHOLE = {"failed": 0, "truncated": 0, "wrong": 0}


async def test_a_whole_answer_is_one() -> None:
    for kind in KINDS:
        report = await judged(kind, lambda items: items)
        assert report["bad"] == WHOLE
        assert report["whole"] == report["calls"] == {kind: 1}


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda items: items[:-1], "truncated"),
        (lambda items: [], "truncated"),
        (lambda items: [*items, items[-1]], "wrong"),
        (lambda items: [items[0], items[0], *items[2:]], "wrong"),
        (lambda items: [items[1], items[0], *items[2:]], "wrong"),
        (lambda items: [items[0], *items[2:]], "wrong"),
        (lambda items: [*items[:-1], item("c0-stream-8", len(items) - 1)], "wrong"),
        (lambda items: broken_off(items[:3], incomplete(2)), "wrong"),
        (lambda items: broken_off(items[:3], ValueError("no")), "failed"),
        (lambda items: broken_off([], Overloaded("t.c.e", 1, "full")), "failed"),
    ],
)
async def test_what_is_wrong_with_a_stream_is_counted(spoil: Any, what: str) -> None:
    report = await judged("stream", spoil)
    assert report["bad"] == {**WHOLE, what: 1}
    assert report["words"][0].startswith(f"{what}: ")


@pytest.mark.parametrize(
    ("kind", "bad"), [("stream", 0), ("unary", 0), ("resumed", 1), ("idempotent", 1), ("hedged", 1)]
)
async def test_only_calls_whose_handler_must_not_begin_twice_may_break(kind: str, bad: int) -> None:
    report = await judged(kind, lambda items: broken_off([], incomplete(0)))
    assert report["bad"] == {**WHOLE, "failed": bad}
    assert len(report["incomplete"]) == 1 - bad
    assert not report["whole"]


async def test_a_handler_that_begins_twice_breaks_a_promise() -> None:
    report = merged([await judged("unary", lambda items: items)])
    report["gaps"] = [0.001]

    def found(begun: Counter[str]) -> list[str]:
        return _figures(report, SimpleNamespace(begun=lambda: begun), [1.0]).broken  # type: ignore[arg-type]

    assert not found(Counter({"c0-unary-7": 1, "c0-hedged-1": 2, "x-x-x": 3}))
    (words,) = found(Counter({"c0-unary-7": 2}))
    assert "twice" in words


def test_wrong_names_the_first_item_that_does_not_belong() -> None:
    assert not wrong("k", [item("k", 0), item("k", 1)])
    assert wrong("k", [item("k", 0), item("k", 2)]).startswith("item 1 of k is")


def test_a_gap_counts_where_it_touches_the_time_behind_an_event() -> None:
    times = [1.0, 1.1, 1.5, 1.6, 1.7, 2.9]
    assert longest_gap(times, 1.2, 1.7) == pytest.approx(0.4)
    assert longest_gap(times, 1.55, 1.65) == pytest.approx(0.1)
    assert longest_gap(times, 1.65, 2.0) == pytest.approx(1.2)
    assert longest_gap([], 1.0, 3.0) == 2.0


def test_percentiles() -> None:
    assert percentile([], 0.5) == 0.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(100)], 0.99) == 99.0


def test_recovery_is_when_two_windows_in_a_row_are_as_usual() -> None:
    calm = {"p50_s": 0.02}
    slow, lost, good = (10, 0, 0.09), (10, 1, 0.02), (10, 0, 0.021)

    def windows(*each: Any) -> dict[str, Any]:
        return {"windows": [[(5.0 + 0.05 * number, *one) for number, one in enumerate(each)]]}

    assert _recovery_s(calm, windows(good, good)) == 0.0
    assert _recovery_s(calm, windows(slow, good, lost, good, good)) == pytest.approx(0.15)
    assert _recovery_s(calm, windows(slow, good, slow)) is None


def test_options_that_mean_nothing_are_refused() -> None:
    assert _chosen("kill,rotation", PHASES) == ["kill", "rotation"]
    for text in ("", "kill,sleep"):
        with pytest.raises(argparse.ArgumentTypeError):
            _chosen(text, PHASES)
    for text in ("0", "nan", "1e9"):
        with pytest.raises(argparse.ArgumentTypeError):
            _seconds(text)

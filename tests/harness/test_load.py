"""A load and its summary: every way in which an answer can be wrong shows in the counts of `make survival`."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from harness.load import Load
from harness.oracle import Oracle
from harness.report import percentile
from harness.requests import ENDPOINT, Work
from harness.runs.kill import KINDS, MOVING, TIMEOUT_S, figures, longest_gap, merged, summary
from harness.runs.overload import _recovery_s
from harness.runs.survival import PHASES, _chosen, _seconds
from tests.runtime.cluster import patiently
from triton_distributed.errors import Overloaded, StreamIncomplete


class Answering:
    """Stands for a client: what it answers is made of the whole answer by `spoil`."""

    closing = False

    def __init__(self, spoil: Any) -> None:
        self._spoil = spoil

    def _items(self, work: Work) -> Any:
        return self._spoil([work.item(index) for index in range(work.items)])

    async def call(self, work: Work, **options: Any) -> Any:
        (found,) = self._items(work)
        return found

    async def generate(self, work: Work, **options: Any) -> AsyncIterator[Any]:
        for each in self._items(work):
            yield each


def incomplete(items: int) -> StreamIncomplete:
    return StreamIncomplete("t.c.e", 1, "unix:///s", "the peer closed the connection", items)


def broken_off(items: list[Any], error: Exception) -> Any:
    def rest() -> Any:
        yield from items
        raise error

    return rest()


async def judged(kind: str, spoil: Any, begun: int = 1) -> dict[str, Any]:
    """The summary of one call."""
    clients: Any = {ENDPOINT: Answering(spoil)}
    load = Load(clients, Oracle(strict=True, longest_s=TIMEOUT_S, times=True), KINDS, random.Random(1), 7)
    (chosen,) = [each for each in KINDS if each.name == kind]
    await patiently(load.one(chosen))
    await load.close()
    return summary(load, Counter({7: begun} if begun else {}), [], 1.0, 0.0)


NAMES = [each.name for each in KINDS]


@pytest.mark.parametrize("kind", NAMES)
async def test_a_whole_answer_is_one(kind: str) -> None:
    report = await judged(kind, lambda items: items)
    assert report["bad"] == {}
    assert report["whole"] == report["calls"] == {each: int(each == kind) for each in NAMES}


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda items: items[:-1], "truncated"),
        (lambda items: [], "truncated"),
        (lambda items: [*items, items[-1]], "wrong"),
        (lambda items: [items[0], items[0], *items[1:-1]], "wrong"),
        (lambda items: [items[1], items[0], *items[2:]], "wrong"),
        (lambda items: [*items[:-1], Work(8, "stream", 20).item(len(items) - 1)], "wrong"),
        (lambda items: broken_off(items[:3], incomplete(2)), "failed"),
        (lambda items: broken_off(items[:3], ValueError("no")), "failed"),
        (lambda items: broken_off([], Overloaded("t.c.e", 1, "full")), "failed"),
    ],
)
async def test_what_is_wrong_with_a_stream_is_counted(spoil: Any, what: str) -> None:
    report = await judged("stream", spoil, begun=0 if what == "failed" else 1)
    assert what in report["bad"]
    assert report["words"][0].startswith("request 7 (stream, 20 items): ")


@pytest.mark.parametrize(
    ("kind", "bad"), [("stream", 0), ("unary", 0), ("resumed", 1), ("idempotent", 1), ("hedged", 1)]
)
async def test_only_calls_whose_handler_must_not_begin_twice_may_break(kind: str, bad: int) -> None:
    report = await judged(kind, lambda items: broken_off([], incomplete(0)))
    assert report["bad"] == ({"failed": 1} if bad else {})
    assert report["incomplete"] == 1
    assert not any(report["whole"].values())
    assert bad == (kind in MOVING)


async def test_a_handler_that_begins_twice_breaks_a_promise() -> None:
    async def broken(kind: str, begun: int) -> list[str]:
        report = merged([await judged(kind, lambda items: items, begun)])
        report["gaps"] = [0.001]
        return figures(report, 1).broken

    assert not await broken("unary", 1)
    assert not await broken("idempotent", 2)
    (words,) = await broken("unary", 2)
    assert "twice" in words


def test_a_gap_counts_where_it_touches_the_time_after_an_event() -> None:
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
    assert _chosen("kill,rotation", tuple(PHASES)) == ["kill", "rotation"]
    for text in ("", "kill,sleep"):
        with pytest.raises(argparse.ArgumentTypeError):
            _chosen(text, tuple(PHASES))
    for text in ("0", "nan", "1e9"):
        with pytest.raises(argparse.ArgumentTypeError):
            _seconds(text)

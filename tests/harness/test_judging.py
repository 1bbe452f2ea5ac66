"""What is flat, what has grown, and what was lost."""

from __future__ import annotations

import random
from typing import Any

import pytest

from harness.requests import filling
from harness.soak import judging
from harness.soak.news import PASSING, SIZE, News

SECONDS = 600.0
MIB = 1 << 20


def samples(grows_by: int = 0, wander: int = 300 << 10, jump_at: float = 2.0) -> list[dict[str, Any]]:
    """Of a process of 45 MiB that gains `grows_by` bytes steadily over the run, or at once at a part of it."""
    rng = random.Random(1)
    found = []
    for at in range(0, int(SECONDS), 3):
        part = at / SECONDS
        gained = grows_by * part if jump_at > 1 else grows_by * (part > jump_at)
        warming = min(1.0, part / 0.1) * 10 * MIB
        found.append({"at": float(at), "rss": int(35 * MIB + warming + gained + rng.uniform(-wander, wander))})
    return found


def quiet(**changes: Any) -> list[dict[str, Any]]:
    same = {
        "descriptors": 30,
        "tasks": 5,
        "threads": 2,
        "running": 0,
        "objects": 30_000,
        "blocks": 150_000,
        "allocated": 8 * MIB,
    }
    return [{"at": 60.0 * k, **same, **(changes if k == 10 else {})} for k in range(1, 11)]


def judged(**parts: Any) -> list[str]:
    history = {"samples": samples(), "quiet": quiet(), "growths": {"types": {}, "kept": {}}, **parts}
    return judging.process(history, SECONDS)[1]


def test_slope() -> None:
    assert judging.slope([(0, 1.0), (1, 3.0), (2, 5.0)]) == pytest.approx(2.0)
    assert judging.slope([(1, 1.0), (1, 3.0)]) == 0.0
    assert judging.slope([]) == 0.0


def test_what_warms_up_and_wanders_is_flat() -> None:
    assert judged() == []
    found = judging.memory(samples(), SECONDS)
    assert found is not None
    assert abs(found.first - 45 * MIB) < MIB / 2
    assert abs(found.fitted) < MIB / 2


@pytest.mark.parametrize(
    "leaking",
    [
        samples(grows_by=100 * 36_000),  # 100 bytes a call at 60 calls a second
        samples(grows_by=5 * MIB, jump_at=0.7),
        samples(grows_by=20 * MIB),
    ],
    ids=["100 bytes a call", "at once", "much"],
)
def test_memory_that_grows_is_found(leaking: list[dict[str, Any]]) -> None:
    (found,) = judged(samples=leaking)
    assert found.startswith("memory: +")


def test_memory_of_a_short_run_is_not_judged() -> None:
    history = {"samples": samples(20 * MIB)[:20], "quiet": [], "growths": {"types": {}, "kept": {}}}
    figures, wrong = judging.process(history, 60.0)
    assert figures["last"] > figures["first"]
    assert wrong == []
    assert judging.process({**history, "samples": []}, 60.0) == ({}, [])


@pytest.mark.parametrize("what", ["descriptors", "tasks", "threads"])
def test_one_more_at_the_last_quiet_moment_is_found(what: str) -> None:
    assert judged(quiet=quiet(**{what: 1})) == []
    (found,) = judged(quiet=quiet(**{what: 31}))
    assert found.startswith(f"{what} at quiet moments: ")


def test_what_fell_may_not_rise_again() -> None:
    moments = quiet()
    moments[5] = {**moments[5], "tasks": 4}
    (found,) = judged(quiet=moments)
    assert found == "tasks at quiet moments: 5, 5, 5, 5, 4, 5, 5, 5, 5"


def test_a_call_that_is_open_is_found() -> None:
    assert "3 calls or handlers are open when nothing goes on" in judged(quiet=quiet(running=3))


def test_what_differs_in_the_warm_up_is_let_be() -> None:
    early = quiet()
    early[0] = {**early[0], "descriptors": 1, "objects": 1}
    assert judged(quiet=early) == []


@pytest.mark.parametrize("what", judging.MOST)
def test_what_stays_is_found(what: str) -> None:
    most = quiet()[0][what] + judging.MOST[what]
    assert judged(quiet=quiet(**{what: most})) == []
    (found,) = judged(quiet=quiet(**{what: most + 1}))
    assert found.startswith(f"{what} at quiet moments: ")


def test_what_the_package_keeps_is_found() -> None:
    own, foreign = "triton_distributed.transport.session.Session", "builtins.dict"
    assert judged(growths={"types": {own: 16, foreign: 400}, "kept": {"SessionPool._live": 40}}) == []
    assert (
        judged(growths={"types": {"triton_distributed.names.Instance": 60}, "kept": {"Instance.addresses": 60}}) == []
    )
    assert len(judged(growths={"types": {own: 17}, "kept": {"SessionPool._live": 41}})) == 2


def test_streams_break_only_where_a_worker_was_broken() -> None:
    assert judging.lost({7: 3}, {7}) == []
    assert judging.lost({7: 3, 8: 1}, {7}) == ["1 streams of instance 8 broke, which was neither killed nor cut off"]


def tally(published: int, heard: dict[str, int]) -> dict[str, Any]:
    return {"published": published, "heard": heard, "dropped": 0, "wrong": []}


def test_events_reach_everybody() -> None:
    assert judging.events({"a": tally(3, {"a": 3}), "w": tally(0, {"a": 3})}) == []
    assert judging.events({"a": tally(3, {"a": 3}), "w": tally(0, {"a": 2})}) == [
        "w heard event 2 of a last, which published 3"
    ]
    assert len(judging.events({"a": tally(3, {"a": 3}), "w": tally(0, {})})) == 1


@pytest.mark.parametrize(("numbers", "wrong"), [((4, 5, 6), 0), ((4, 6), 1), ((4, 4), 1), ((5, 4), 1)])
def test_events_come_once_and_in_order(numbers: tuple[int, ...], wrong: int) -> None:
    news = News(None, "w")  # type: ignore[arg-type]
    for n in numbers:
        news.take({"by": "a", "n": n, "text": filling(n, 0, SIZE)})
        news.take({"by": PASSING, "n": 1, "text": filling(1, 0, SIZE)})
    assert len(news.wrong) == wrong
    news.take({"by": "a", "n": numbers[-1] + 1, "text": "?"})
    assert len(news.wrong) == wrong + 1

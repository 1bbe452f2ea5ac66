"""The soak runs, and finds what is planted: a wrong answer, a descriptor or a task that is kept."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from benchmarks.soak import load as loads
from benchmarks.soak.calls import KINDS, Caller, Kind, WrongAnswer, read, same
from benchmarks.soak.load import Load
from benchmarks.soak.run import soak
from benchmarks.soak.stage import Options
from benchmarks.soak.table import render
from tests.runtime.cluster import patiently
from triton_distributed.errors import NoInstances, StreamIncomplete

SHORT = {"seconds": 6.0, "settle_s": 3.0}


async def run(**options: Any) -> dict[str, Any]:
    return await soak(Options(**{**SHORT, **options}), "python -m benchmarks.soak", print)


@pytest.mark.slow
async def test_a_short_soak_ends_well() -> None:
    result = await run(settle_s=30.0)
    assert result["wrong"] == []
    assert {"killed", "ended"} <= result["faults"].keys()
    assert sum(result["outcomes"]["unary"].values()) > 20
    assert all(len(each["quiet"]) >= 2 for each in result["processes"].values())
    text = render(result)
    for name in (*result["processes"].keys() - {"restarted"}, "two way", "Passed"):
        assert name in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("lies", ["WrongAnswer: {'i': "]),
        ("keeps", ["descriptors at quiet moments: ", "tasks at quiet moments: "]),
    ],
)
async def test_what_is_planted_is_found(fault: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", fault)
    result = await run(worker="tests.benchmarks.faulty_worker")
    assert all(any(words in each for each in result["wrong"]) for words in found), result["wrong"]
    assert "Failed" in render(result)


# --- how calls are judged --------------------------------------------------------------------------------------------


class NobodysCalls:
    """Stands for a `Caller` of calls that need none."""

    open_calls = 0


async def outcome(work: Callable[[Any], Awaitable[str | None]], **options: Any) -> tuple[dict[str, int], list[str]]:
    kind = Kind(work, 1, **options)
    load = Load(NobodysCalls(), 1000, random.Random(1), (kind,))  # type: ignore[arg-type]
    await patiently(load.one(kind))
    await load.close()
    return load.outcomes[kind.name], load.failures


def broken() -> StreamIncomplete:
    return StreamIncomplete("t", 7, "unix:///s", "lost", 3)


async def test_a_call_that_ends_well_is_counted() -> None:
    async def work(_: Caller) -> None:
        same([1], [1])

    assert await outcome(work) == ({"ok": 1}, [])


@pytest.mark.parametrize(
    "raised", [WrongAnswer("no"), NoInstances("t"), asyncio.CancelledError("by nobody"), TimeoutError()], ids=repr
)
async def test_an_error_that_was_not_promised_fails_the_run(raised: BaseException) -> None:
    async def work(_: Caller) -> None:
        raise raised

    counts, failures = await outcome(work)
    assert counts == {type(raised).__name__: 1}
    assert len(failures) == 1
    assert failures[0].startswith("work: Traceback")


async def test_a_promised_error_is_counted_with_its_instance() -> None:
    async def work(_: Caller) -> None:
        raise broken()

    assert await outcome(work) == ({"StreamIncomplete": 1}, [])
    counts, failures = await outcome(work, permits=lambda error: False)
    assert counts == {"StreamIncomplete": 1}
    assert len(failures) == 1


async def test_a_call_that_does_not_end_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "PATIENCE_S", 0.01)

    async def work(_: Caller) -> None:
        await asyncio.Event().wait()

    counts, failures = await outcome(work)
    assert counts == {"TimeoutError": 1}
    assert len(failures) == 1


def of(*items: Any) -> Any:
    async def stream() -> Any:
        for each in items:
            yield each

    return stream()


@pytest.mark.parametrize("items", [(1, 2), (1, 2, 3, 4), (1, 3, 2), (1, 2, 2, 3), ()], ids=str)
async def test_a_stream_that_differs_is_wrong(items: tuple[int, ...]) -> None:
    await read(of(1, 2, 3), [1, 2, 3])
    with pytest.raises(WrongAnswer):
        await read(of(*items), [1, 2, 3])


def test_no_two_kinds_of_calls_have_one_name() -> None:
    assert len({each.name for each in KINDS}) == len(KINDS)

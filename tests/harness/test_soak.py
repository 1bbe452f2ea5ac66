"""The soak runs, and finds what is planted: a wrong answer, a descriptor or a task that is kept."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from harness import load as loads
from harness.load import Kind, Load
from harness.oracle import Oracle
from harness.runs.soak import Options, soak
from harness.soak.kinds import PLANNED, Unplanned, WrongAnswer, same
from harness.soak.table import render
from tests.runtime.cluster import patiently
from triton_distributed.errors import NoInstances

SHORT = {"seconds": 3.0, "rests": 3, "settle_s": 1.0}


async def run(**options: Any) -> dict[str, Any]:
    return await soak(Options(**{**SHORT, **options}), "python -m harness.runs.soak", print)


@pytest.mark.slow
async def test_a_short_soak_ends_well() -> None:
    result = await run(settle_s=30.0)
    assert result["wrong"] == []
    assert {"killed", "ended"} <= result["faults"].keys()
    assert sum(result["outcomes"]["unary"].values()) > 10
    assert all(len(each["quiet"]) >= 2 for each in result["processes"].values())
    text = render(result)
    for name in (*result["processes"].keys() - {"restarted"}, "two way", "Passed"):
        assert name in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("lies", [", b'?'], not ["]),
        ("keeps", ["descriptors at quiet moments: ", "tasks at quiet moments: "]),
    ],
)
async def test_what_is_planted_is_found(fault: str, found: list[str]) -> None:
    result = await run(work=f"tests.harness.plants:faulty:{fault}")
    assert all(any(words in each for each in result["wrong"]) for words in found), result["wrong"]
    assert "Failed" in render(result)


# --- how calls that judge themselves are counted ----------------------------------------------------------------------


async def outcome(work: Callable[[], Awaitable[str | None]]) -> tuple[dict[str, int], list[str]]:
    kind = Kind("work", 1, work=work)
    load = Load({}, Oracle(), (kind,), random.Random(1), 0)
    await patiently(load.one(kind))
    await load.close()
    return load.outcomes["work"], load.failures


async def test_a_call_that_ends_well_is_counted() -> None:
    async def work() -> None:
        same([1], [1])

    assert await outcome(work) == ({"answered": 1}, [])


@pytest.mark.parametrize(
    "raised", [WrongAnswer("no"), NoInstances("t"), asyncio.CancelledError("by nobody"), TimeoutError()], ids=repr
)
async def test_an_error_that_was_not_promised_fails_the_run(raised: BaseException) -> None:
    async def work() -> None:
        raise raised

    counts, failures = await outcome(work)
    assert counts == {type(raised).__name__: 1}
    assert len(failures) == 1
    assert failures[0].startswith("work: Traceback")


async def test_a_call_that_does_not_end_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "PATIENCE_S", 0.01)

    async def work() -> None:
        await asyncio.Event().wait()

    counts, failures = await outcome(work)
    assert counts == {"TimeoutError": 1}
    assert len(failures) == 1


def test_no_two_kinds_of_calls_have_one_name() -> None:
    own = Unplanned(None, {}, None, random.Random(1))  # type: ignore[arg-type]
    own._news = type("", (), {"publish": None})()
    names = [each.name for each in (*PLANNED, *own.kinds())]
    assert len(set(names)) == len(names)

"""`trd bench`: the load, its arithmetic, and what the command shows."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from triton_distributed.cli.bench import seconds_or_none
from triton_distributed.cli.load import Load, Quantiles, Sample, bars, duration, quantiles, summary
from triton_distributed.errors import NoInstances
from triton_distributed.testing.virtual_time import run_in_virtual_time


async def quick() -> AsyncIterator[int]:
    yield 1


def sample(whole_s: float, outcome: str = "ok", due_s: float = 0.0) -> Sample:
    return Sample(due_s, 0.0, whole_s / 2, whole_s, 3, outcome)


def test_a_warmup_can_be_left_out() -> None:
    assert seconds_or_none("0") == 0.0
    assert seconds_or_none("0.5") == 0.5
    with pytest.raises(argparse.ArgumentTypeError):
        seconds_or_none("0.001")


def test_quantiles_are_values_that_occurred() -> None:
    assert quantiles(float(each) for each in range(1, 101)) == Quantiles(50, 90, 99, 100)
    assert quantiles([7.0]) == Quantiles(7, 7, 7, 7)
    assert quantiles([]) is None


def test_a_summary_counts_all_and_times_those_that_ended_well() -> None:
    found = summary([sample(1.0), sample(3.0, due_s=1.0), sample(9.0, "Overloaded")])
    assert (found.requests, found.items, found.seconds) == (3, 9, 9.0)
    assert found.outcomes == {"ok": 2, "Overloaded": 1}
    assert found.whole == Quantiles(1.0, 3.0, 3.0, 3.0)
    assert found.first == Quantiles(0.5, 1.5, 1.5, 1.5)
    assert summary([]).requests == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.0, "2 s"), (0.0123, "12.3 ms"), (0.5, "500 ms"), (0.000_15, "150 µs"), (123.4, "123 s"), (1e-7, "0.1 µs")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_bars_are_in_proportion_and_empty_runs_are_one_line() -> None:
    lines = bars([0.0011] * 40 + [0.0019] * 20 + [1.0])
    assert [line.split()[1:3] for line in lines if "≤" in line] == [["1.5", "ms"], ["2", "ms"], ["1", "s"]]
    assert [line.count("█") for line in lines] == [40, 20, 0, 1]
    assert lines[2].strip() == "⋮ │"
    assert bars([]) == []


def test_an_open_loop_counts_the_delay_of_every_request_that_a_stall_holds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> list[Sample]:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr("triton_distributed.cli.load.perf_counter", loop.time)
        began = loop.time()

        async def stalled_in_the_first_second() -> AsyncIterator[int]:
            await asyncio.sleep(max(0.0, began + 1.0 - loop.time()))
            yield 1

        load = Load(stalled_in_the_first_second)
        await load.at_rate(100.0, 2.0, random.Random(1))
        return load.samples

    samples = run_in_virtual_time(main())
    early = [each for each in samples if each.due_s < 1.0]
    assert 80 < len(early) < 120
    assert all(each.whole_s == pytest.approx(1.0 - each.due_s) for each in early)
    assert all(each.whole_s == pytest.approx(0.0) for each in samples if each.due_s > 1.0)


async def test_a_closed_loop_keeps_its_callers_and_counts_errors() -> None:
    running: list[int] = [0, 0]

    async def call() -> AsyncIterator[int]:
        running[0] += 1
        running[1] = max(running)
        await asyncio.sleep(0)
        running[0] -= 1
        if random.random() < 0.5:
            raise NoInstances("a.b.c", "nowhere")
        yield 1

    load = Load(call)
    await load.at_once(3, 0.05)
    assert running == [0, 3]
    assert set(summary(load.samples).outcomes) <= {"ok", "NoInstances"}


def test_the_command(trd: Any) -> None:
    trd.serve("worker:count", "demo.b.g")
    said = trd.run("bench", "demo.b.g", '{"n": 3}', "--duration", "0.5", "--warmup", "0.1")
    assert (said.status, said.err) == (0, "")
    assert said.lines[0].split() == ["p50", "p90", "p99", "max"]
    assert said.lines[2].startswith("whole answer")
    assert " ok; " in said.out
    assert "│█" in said.out
    said = trd.run("bench", "demo.b.g", '{"n": 3}', "--duration", "0.3", "--concurrency", "4", "--json")
    found = json.loads(said.out)
    assert found["outcomes"] == {"ok": found["requests"]}
    assert found["items"] == 3 * found["requests"] > 0
    assert found["whole"]["p50"] <= found["whole"]["max"]


def test_requests_that_fail_make_the_status_1(trd: Any) -> None:
    trd.handlers_raise = True
    trd.serve("worker:fail", "demo.b.g")
    said = trd.run("bench", "demo.b.g", "1", "--duration", "0.3", "--rate", "20")
    assert said.status == 1
    assert "RemoteError: " in said.out
    assert "no such" in said.out


@pytest.mark.parametrize("options", [["--rate", "0"], ["--rate", "x"], ["--rate", "5", "--concurrency", "2"]])
def test_bad_options(trd: Any, options: list[str]) -> None:
    said = trd.run("bench", "demo.b.g", "1", *options)
    assert (said.status, said.out) == (2, "")

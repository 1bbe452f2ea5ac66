"""Which process is replaced next, and what happens when that fails. No process is started here."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest

from tests.timing import PATIENCE_S
from triton_distributed.supervisor.bell import Bell
from triton_distributed.supervisor.place import Place
from triton_distributed.supervisor.process import Process
from triton_distributed.supervisor.replacement import Replacer


class FakeProcess:
    """A process whose changes the test makes."""

    def __init__(self, pid: int, started_at: int, is_ready: bool = True) -> None:
        self.pid, self.started_at, self.is_ready = pid, started_at, is_ready
        self.is_over = self.is_draining = self.worn = False
        self.status: int | None = None


class Program:
    """Two replicas and their replacer.

    Attributes:
        becomes: what a process is at once after its start: `ready`, `loading` or `over`.
        started: all processes that were started, after the first two.
        said: the lines on standard output.
    """

    def __init__(self, wait: bool = True) -> None:
        self.bell, self.stopping = Bell(), asyncio.Event()
        self.places = [Place(0), Place(1)]
        self.becomes = "ready"
        self.clock = itertools.count(1)
        self.started: list[FakeProcess] = []
        self.said: list[str] = []
        for place in self.places:
            place.take(cast(Process, FakeProcess(place.index, next(self.clock))))
        self.replacer = Replacer(
            self.places,
            self.bell,
            self.stopping,
            self._start,
            self._drain,
            self._say,
            drain_first=False,
            wait=wait,
        )

    def _start(self, place: Place) -> Process:
        if self.becomes == "refused":
            raise BlockingIOError("no more processes")
        process = FakeProcess(100 + len(self.started), next(self.clock), self.becomes == "ready")
        if self.becomes == "over":
            process.is_over, process.status = True, 1
        self.started.append(process)
        self.bell.ring()  # For the test, as below.
        return cast(Process, process)

    def _say(self, line: str) -> None:
        self.said.append(line)
        self.bell.ring()

    def _drain(self, process: Process) -> None:
        found = cast(FakeProcess, process)
        found.is_over, found.is_ready, found.status = True, False, 0
        self.bell.ring()

    def processes(self) -> list[int]:
        return [each.process.pid for each in self.places if each.process is not None]

    def outdate(self) -> None:
        self.replacer.outdate(next(self.clock), "")

    async def until(self, condition: object) -> None:
        await asyncio.wait_for(self.bell.until(condition), PATIENCE_S)  # type: ignore[arg-type]


@asynccontextmanager
async def running(program: Program) -> AsyncIterator[Program]:
    task = asyncio.ensure_future(program.replacer.run())
    yield program
    program.stopping.set()
    program.bell.ring()
    await asyncio.wait_for(task, PATIENCE_S)


async def test_all_are_replaced_one_after_the_other() -> None:
    program = Program()
    program.becomes = "loading"
    async with running(program):
        program.outdate()
        await program.until(lambda: program.started)
        assert program.processes() == [0, 1]
        program.becomes = "ready"
        [first] = program.started
        first.is_ready = True
        program.bell.ring()
        await program.until(lambda: program.said[-1].startswith("restarted"))
        assert program.processes() == [100, 101]
    assert program.said == ["restarting 2 replica(s), one after the other", "restarted: 2 replica(s)"]


async def test_a_change_while_a_successor_loads_starts_another(caplog: pytest.LogCaptureFixture) -> None:
    program = Program()
    program.becomes = "loading"
    async with running(program):
        program.outdate()
        await program.until(lambda: program.started)
        program.becomes = "ready"
        program.outdate()
        await program.until(lambda: program.said[-1].startswith("restarted"))
        assert program.started[0].is_over
        assert program.processes() == [101, 102]
    assert not caplog.records


@pytest.mark.parametrize("becomes", ["over", "refused"])
async def test_a_failure_leaves_all_as_they_are(becomes: str, caplog: pytest.LogCaptureFixture) -> None:
    program = Program()
    program.becomes = becomes
    async with running(program):
        program.outdate()
        async with asyncio.timeout(PATIENCE_S):
            while "the restart stops: replica 0" not in caplog.text:
                await asyncio.sleep(0)
        assert program.processes() == [0, 1]
    assert len(program.said) == 1


async def test_a_worn_process_goes_on_until_its_successor_can_be_called(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    program = Program()
    program.becomes = "over"
    async with running(program):
        cast(FakeProcess, program.places[1].process).worn = True
        program.bell.ring()
        async with asyncio.timeout(PATIENCE_S):
            while (
                "replica 1 has served its number of requests and could not be replaced; trying again in 0.5 s"
                not in caplog.text
            ):
                await asyncio.sleep(0)
        assert len(program.started) == 1
        assert program.processes() == [0, 1]
        assert "replica 1: process 1 has served its requests and is replaced" in caplog.messages
        program.becomes = "ready"
        await program.until(lambda: program.processes() == [0, 101])
        program.outdate()
        await program.until(lambda: program.said[-1].startswith("restarted"))


@pytest.mark.parametrize(("both", "says"), [(False, "process 0 goes on"), (True, "process 0 has ended, too")])
async def test_the_log_says_what_became_of_the_old_process(
    both: bool, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    program = Program()
    program.becomes = "loading"
    async with running(program):
        program.outdate()
        await program.until(lambda: program.started)
        [new] = program.started
        new.is_over, new.status = True, 1
        if both:
            old = cast(FakeProcess, program.places[0].process)
            old.is_over, old.is_ready, old.status = True, False, -9
            program.places[0].process = None  # As its keeper does.
        program.bell.ring()
        async with asyncio.timeout(PATIENCE_S):
            while says not in caplog.text:
                await asyncio.sleep(0)

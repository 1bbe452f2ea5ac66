"""Workers that are out of rotation: when they are tried, and what brings them back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.runtime.cluster import turns, until
from triton_distributed.calling.candidates import Candidates
from triton_distributed.calling.prober import Prober
from triton_distributed.discovery import Snapshot
from triton_distributed.errors import ConnectionFailed
from triton_distributed.names import EndpointName, Instance

NAME = EndpointName("t", "c", "e")
WORKER = ("a",)


class Pool:
    """Is asked for proofs, and does what a test says each time."""

    def __init__(self, *answers: Callable[[], None]) -> None:
        self.answers = list(answers)
        self.probes = 0

    async def probe(self, addresses: Any) -> None:
        assert addresses == WORKER
        self.probes += 1
        if self.answers:
            self.answers.pop(0)()


def prober_of(view: Candidates) -> Prober:
    made = Prober(asyncio.get_running_loop())
    made.add(view)
    return made


async def never(apply: object) -> Any:
    raise AssertionError("nothing here watches")


@pytest.fixture
async def view() -> AsyncIterator[Candidates]:
    made = Candidates(NAME, asyncio.get_running_loop(), random.Random(1), never)
    made.table.apply(Snapshot((Instance(NAME, 1, WORKER), Instance(NAME, 2, ("b",)))))
    yield made
    made.close()


@pytest.mark.any_loop
@pytest.mark.parametrize("later", range(6))
async def test_a_worker_that_is_lost_right_after_it_was_found_is_probed_again(later: int, view: Candidates) -> None:
    prober = prober_of(view)

    def lose(left: int) -> None:
        if left:
            asyncio.get_running_loop().call_soon(lose, left - 1)
        else:
            prober.lost(WORKER)

    pool = prober.pool = Pool(lambda: lose(later + 1))  # type: ignore[assignment]
    prober.lost(WORKER)
    assert 1 in view.rotation.down
    await until(lambda: pool.probes == 2)
    await until(lambda: not view.rotation.down)
    await turns()
    assert prober._probes == {}
    await prober.close()


@pytest.mark.any_loop
async def test_a_worker_that_does_not_prove_itself_stays_out(view: Candidates) -> None:
    def fails() -> None:
        assert 1 in view.rotation.down
        raise ConnectionFailed("a worker", [("a", "no answer to a PING")])

    prober = prober_of(view)
    pool = prober.pool = Pool(fails, fails)  # type: ignore[assignment]
    prober.lost(WORKER)
    await until(lambda: not view.rotation.down)
    assert pool.probes == 3
    await prober.close()


async def test_closing_ends_the_probes(view: Candidates) -> None:
    prober = prober_of(view)
    pool = prober.pool = Pool()  # type: ignore[assignment]
    prober.lost(WORKER)
    await prober.close()
    prober.lost(WORKER)
    await turns()
    assert pool.probes == 0

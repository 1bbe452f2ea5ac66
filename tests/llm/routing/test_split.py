"""Where a prompt is computed, if there are prefill workers."""

from __future__ import annotations

import pytest

from triton_distributed.llm.routing.split import split, taker, transfer_speed
from triton_distributed.llm.routing.view import Candidate, Question
from triton_distributed.names import EndpointName, Instance

INSTANCE = Instance(EndpointName("n", "c", "e"), 1, ("tcp://127.0.0.1:1",))
LONG = Question(tokens=12_000)


def worker(number: int, prefill_s: float = 0.0, **fields: float) -> Candidate:
    return Candidate((number, 0), INSTANCE, prefill_s=prefill_s, **fields)  # type: ignore[arg-type]


def elsewhere(question: Question, here: Candidate, there: Candidate) -> bool:
    return split(question, here, there, [here], transfer_speed()) is not None


def test_a_long_prompt_goes_to_a_prefill_worker_if_others_would_wait_for_it():
    there = worker(9, 0.24)
    assert not elsewhere(LONG, worker(1, 0.24, running=0), there), "nothing is gained: the transfer takes time"
    assert elsewhere(LONG, worker(1, 0.3, running=1), worker(9, 0.3))
    assert not elsewhere(LONG, worker(1, 0.24, running=50), there), "the transfer takes more than they are delayed"
    assert elsewhere(LONG, worker(1, 0.24, wait_s=0.5), there), "the worker has other prompts to compute first"
    assert not elsewhere(LONG, worker(1, 0.24, running=8), worker(9, 0.24, wait_s=2.0)), "they wait there for longer"
    for held_s, expected in (((5.0, 0.0), True), ((5.0, 5.0), False)):
        found = split(LONG, here := worker(1, 0.24), there, [here], transfer_speed(), held_s)
        assert (found is here) == expected, "what the routers hold comes before"


def test_a_cached_prompt_stays_and_one_that_is_cached_there_goes():
    cached = worker(1, 0.021, running=8, cached_tokens=11_968)
    assert not elsewhere(LONG, cached, worker(9, 0.24))
    assert elsewhere(LONG, worker(1, 0.24), worker(9, 0.021)), "without others, too: the transfer takes less"


def test_the_answer_goes_on_where_the_least_is_to_be_sent_and_to_be_done():
    speed = transfer_speed()
    holder = worker(1, cached_tokens=8_000)
    assert taker(LONG, [worker(2), holder], speed) is holder
    busy = worker(1, cached_tokens=8_000, wait_s=0.3)
    assert taker(LONG, [busy, idle := worker(2)], speed) is idle
    assert taker(LONG, [worker(1, running=3), few := worker(2, running=2)], speed) is few
    assert taker(LONG, [], speed) is None
    assert split(LONG, worker(1, 9.0), worker(9, 0.1), [], speed) is None, "no worker can go on with it"


def test_the_time_of_a_transfer_is_learned():
    speed = transfer_speed()
    assert speed.seconds(12_000) == pytest.approx(0.065)
    for tokens in (1_000, 4_000, 16_000, 8_000):
        for _ in range(10):
            speed.note(tokens, 0.05 + 1e-4 * tokens)
    assert speed.seconds(12_000) == pytest.approx(1.25, rel=0.02)
    assert split(LONG, worker(1, 0.24, running=8), worker(9, 0.24), [worker(1)], speed) is None

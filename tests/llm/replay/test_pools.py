"""Pools of workers for prefill and decode in virtual time."""

import pytest

from benchmarks.llm.pools import FEW, mixed
from tests.llm.replay.traces import trace
from triton_distributed.llm import InvalidParameter
from triton_distributed.llm.engines.mock.timing import DYNAMO
from triton_distributed.llm.replay import simulate

CHAT = {"timestamp": 0, "input_length": 500, "output_length": 800, "hash_ids": [1]}
DOCUMENT = {"timestamp": 1000, "input_length": 24_000, "output_length": 1, "hash_ids": [*range(2, 49)]}
MORE = {"timestamp": 4000, "input_length": 24_500, "output_length": 3, "hash_ids": [*range(2, 50)]}


def prefill_s(tokens):
    a, b, c = DYNAMO.prefill
    return ((a * tokens + b) * tokens + c) / 1000


def test_a_long_prompt_is_computed_elsewhere_and_holds_nothing_up():
    found = simulate(trace([CHAT, DOCUMENT, MORE]), workers=2, prefill=1)
    chat, document, more = found.requests
    assert (chat.prefill_worker, document.prefill_worker, more.prefill_worker) == (-1, 0, 0)
    assert {each.worker for each in found.requests} == {1}
    computed = sum(map(prefill_s, (8192, 8192, 24_000 - 2 * 8192))) + DYNAMO.transfer_ms(24_000) / 1000
    step = 0.01  # At most, with one answer or two.
    assert computed < document.ttft_s < computed + 2 * step
    assert more.cached_tokens == 24_000, "the prefill worker keeps what it has computed"
    assert more.ttft_s < prefill_s(500) + DYNAMO.transfer_ms(500) / 1000 + 2 * step, "and the other has the rest"
    assert chat.e2e_s == pytest.approx(800 * 0.006, rel=0.2)
    assert found.itl_s.most < step
    assert simulate(trace([CHAT, DOCUMENT, MORE]), workers=1).itl_s.most > 0.1


def test_pools_keep_the_time_between_tokens_low_on_a_mixed_load():
    load = mixed(FEW, 40.0, 700)
    both, pools = (simulate(load, workers=8, prefill=prefill) for prefill in (0, 3))
    assert pools.itl_s.p99 < 0.95 * both.itl_s.p99
    assert pools.ttft_s.mean < 1.1 * both.ttft_s.mean


def test_a_report_tells_of_each_pool():
    load = mixed(FEW, 60.0, 300)
    found, again = (simulate(load, workers=4, prefill=1, blocks=1200, batch_tokens=1024) for _ in range(2))
    assert found == again
    prefill, decode = found.pools
    assert (prefill.role, prefill.workers, decode.role, decode.workers) == ("prefill", 1, "decode", 3)
    assert [each.role for each in found.workers] == ["prefill", "decode", "decode", "decode"]
    handed_over = [each for each in found.requests if each.prefill_worker == 0]
    assert 0 < prefill.prompts == len(handed_over) == found.workers[0].requests
    assert prefill.prompts + decode.prompts == 300 == sum(each.requests for each in found.workers[1:])
    assert prefill.within + decode.within == found.within
    assert prefill.goodput + decode.goodput == pytest.approx(found.goodput)
    assert min(each.ttft_s for each in handed_over) > 0
    # However often a request is preempted, the times between its tokens are those of its whole answer.
    assert sum(each.preemptions for each in found.workers) > 50
    gaps = sum(each.answer_tokens - 1 for each in found.requests)
    assert found.itl_s.mean * gaps == pytest.approx(sum(each.e2e_s - each.ttft_s for each in found.requests))
    assert all(each.worker > 0 for each in found.requests)
    (alone,) = simulate(load, workers=4).pools
    assert (alone.role, alone.workers, alone.prompts) == ("both", 4, 300)


@pytest.mark.parametrize("prefill", [-1, 8])
def test_a_pool_that_cannot_be_is_refused(prefill):
    with pytest.raises(InvalidParameter, match=f"prefill: expected less than the 8 workers, .*, got {prefill}"):
        simulate(trace([CHAT]), prefill=prefill)

"""A trace in virtual time: the engine's times, determinism, the policies, and what the report adds up to."""

import itertools

import pytest

from tests.llm.replay.traces import chats, trace
from triton_distributed.errors import ConfigError
from triton_distributed.llm import InvalidParameter
from triton_distributed.llm.replay import simulate

CHATS = trace(chats())
FEW = trace(chats(60, apart_ms=40))

# What `run_mocker_trace_replay` of ai-dynamo-runtime 1.6.1 tells for these chats, by blocks of each of its two engines:
# mean times in ms to the first token, between tokens and to the end; the part of the prompts that was cached at first.
OF_DYNAMO = {
    16_384: (98.45682529165195, 14.600086994283593, 3035.62932636665, 0.5438373243420818),
    900: (23498.08180620422, 37.21929757472748, 30985.673995800007, 0.5294962547178035),
}


@pytest.mark.parametrize("blocks", OF_DYNAMO)
def test_the_engines_have_the_times_of_dynamos_replay(blocks):
    found = simulate(CHATS, "round_robin", workers=2, blocks=blocks)
    ms = (found.ttft_s.mean * 1000, found.itl_s.mean * 1000, found.e2e_s.mean * 1000)
    assert (*ms, found.hit_rate) == pytest.approx(OF_DYNAMO[blocks], rel=5e-4)
    assert (sum(each.preemptions for each in found.workers) > 0) == (blocks == 900)


def test_one_request_takes_the_time_of_its_steps():
    lines = [{"timestamp": 5000, "input_length": 1000, "output_length": 3, "hash_ids": [1, 2]}]
    found = simulate(trace(lines), speed=2)
    (only,) = found.requests
    prefill = (4.209989e-07 * 1000**2 + 1.518344e-02 * 1000 + 16.50142) / 1000
    assert only.at_s == 2.5
    assert only.ttft_s == pytest.approx(prefill)
    assert found.itl_s.mean == pytest.approx(only.itl_s)
    assert found.duration_s == pytest.approx(only.e2e_s)
    assert found.workers[only.worker].busy == pytest.approx(1)
    assert found.itl_s.most < 0.006


def test_the_same_seed_gives_the_same_report():
    assert simulate(FEW, "kv", workers=3) == simulate(FEW, "kv", workers=3)
    assert simulate(FEW, "p2c", workers=3, seed=4) == simulate(FEW, "p2c", workers=3, seed=4)
    assert simulate(FEW, "p2c", workers=3, seed=4) != simulate(FEW, "p2c", workers=3, seed=5)


def test_a_router_that_knows_the_caches_finds_more_in_them():
    kv, least = (simulate(CHATS, policy, workers=4, speed=8) for policy in ("kv", "least_loaded"))
    assert kv.hit_rate > 1.1 * least.hit_rate
    assert kv.ttft_s.mean < 0.9 * least.ttft_s.mean


def test_a_report_adds_up():
    found = simulate(CHATS, "kv", workers=2, blocks=900, speed=2, ttft_sla_s=20.0, itl_sla_s=0.05)
    assert [each.at_s * 2 for each in found.requests] == pytest.approx([each.at_s for each in CHATS.requests])
    assert sum(each.requests for each in found.workers) == len(CHATS.requests)
    cached, prompts = (
        sum(each.cached_tokens for each in found.requests),
        sum(each.prompt_tokens for each in found.requests),
    )
    assert found.hit_rate == pytest.approx(cached / prompts)
    assert sum(each.cached_tokens for each in found.workers) == cached
    assert sum(each.prefill_tokens for each in found.workers) >= prompts - cached, "preempted ones are computed anew"
    assert found.within == sum(1 for each in found.requests if each.ttft_s <= 20 and each.itl_s <= 0.05)
    assert 0 < found.within < len(CHATS.requests)
    assert found.goodput == pytest.approx(found.within / found.duration_s)
    # The time between tokens over all tokens is that of the single requests, each with the weight of its tokens.
    gaps = sum(each.answer_tokens - 1 for each in found.requests)
    assert found.itl_s.mean == pytest.approx(sum(each.e2e_s - each.ttft_s for each in found.requests) / gaps)
    assert max(each.held for each in found.moments) > 0
    assert all(0 < each.busy <= 1 for each in found.workers)
    summary = found.summary()
    assert summary["requests"] == len(CHATS.requests)
    assert "moments" not in summary


def test_small_blocks_are_joined_for_the_index():
    """With blocks of 16 tokens the index has those of 64, and finds what the engines then find."""
    by_size: dict[int, list[int]] = {}

    def policy(question, candidates):
        found = max(candidates, key=lambda each: (each.cached_tokens, -each.waiting - each.running))
        by_size.setdefault(question.block_tokens, []).append(found.cached_tokens)
        return found

    for size in (16, 64):
        found = simulate(FEW, policy, workers=2, block_tokens=size, blocks=1_048_576 // size)
        assert found.hit_rate > 0.5
    assert list(by_size) == [64]
    assert by_size[64][:60] == by_size[64][60:]


def test_a_users_policy_sees_what_the_caches_hold():
    turn = itertools.count()

    def in_turn(question, candidates):
        return candidates[next(turn) % len(candidates)]

    found = simulate(FEW, in_turn, workers=3)
    assert found.policy.endswith("in_turn")
    assert {each.requests for each in found.workers} == {20}
    with pytest.raises(ConfigError, match="kv_linear"):
        simulate(FEW, "best")
    with pytest.raises(ValueError, match=r"policy .*returned None"):
        simulate(FEW, lambda question, candidates: None)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"workers": 0}, "workers: expected at least 1, got 0"),
        ({"speed": 0}, "speed: expected a number above 0, got 0"),
        ({"slots": 0}, "slots: expected at least 1, got 0"),
        ({"batch_tokens": 0}, "batch_tokens: expected at least 1, got 0"),
        (
            {"block_tokens": 48},
            "block_tokens: blocks of 48 tokens, which the index joins to 96, do not divide the trace's 512",
        ),
        ({"block_tokens": 1024}, "block_tokens: blocks of 1024 tokens do not divide the trace's 512"),
        ({"blocks": 100}, "blocks: .* tokens do not fit in the 100 blocks"),
    ],
)
def test_invalid_values_are_named(values, problem):
    with pytest.raises(InvalidParameter, match=problem):
        simulate(FEW, **values)

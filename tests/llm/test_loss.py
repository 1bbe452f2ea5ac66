"""What an answer does after its worker was lost: every case of the table."""

import pytest

from triton_distributed.llm import Guide, Request, Sampling
from triton_distributed.llm.models.loss import MOST_LOSSES, Next, Progress, decide

GREEDY = Sampling(temperature=0)
TOOL = {"type": "function", "function": {"name": "f"}}


def progress(tokens: int = 5, *, engine_text: bool = False, ended: bool = False, losses: int = 1) -> Progress:
    return Progress(tokens, engine_text, ended, losses)


def test_nothing_seen_is_sent_again_whatever_it_asks():
    for request in (Request(), Request(guide=Guide(json=True)), Request(tools=[TOOL], sampling=Sampling(logprobs=1))):
        assert decide(request, "never", progress(0, losses=MOST_LOSSES)) is Next.AGAIN


def test_a_request_that_loses_worker_after_worker_ends():
    for tokens in (0, 5):
        reason = decide(Request(sampling=GREEDY), "always", progress(tokens, losses=MOST_LOSSES + 1))
        assert isinstance(reason, str)
        assert f"{MOST_LOSSES + 1} workers in a row" in reason


def test_a_complete_answer_needs_no_worker():
    for losses in (1, MOST_LOSSES + 1):
        assert decide(Request(max_tokens=5), "never", progress(5, losses=losses)) is Next.LENGTH
        assert decide(Request(max_tokens=9), "never", progress(5, ended=True, losses=losses)) is Next.STOPPED


@pytest.mark.parametrize("continues", ["greedy", "always"])
def test_greedy_goes_on(continues):
    assert decide(Request(sampling=GREEDY), continues, progress()) is Next.CONTINUE
    assert decide(Request(sampling=Sampling(temperature=0.7, top_k=1)), continues, progress()) is Next.CONTINUE


@pytest.mark.parametrize(
    ("sampling", "word"),
    [
        (Sampling(), "chance"),
        (Sampling(seed=1), "chance"),
        (Sampling(temperature=0, presence_penalty=0.1), "penalties"),
        (Sampling(temperature=0, frequency_penalty=0.1), "penalties"),
        (Sampling(temperature=0, repetition_penalty=1.1), "penalties"),
        (Sampling(temperature=0, logprobs=0), "log-probabilities"),
    ],
)
def test_what_only_an_engine_that_always_continues_can(sampling, word):
    request = Request(sampling=sampling)
    assert word in str(decide(request, "greedy", progress()))
    assert decide(request, "always", progress()) is Next.CONTINUE
    assert "cannot continue" in str(decide(request, "never", progress()))


@pytest.mark.parametrize(
    ("request_", "found", "word"),
    [
        (Request(sampling=GREEDY, guide=Guide(regex="a+")), progress(), "guide"),
        (Request(sampling=GREEDY, tools=[TOOL]), progress(), "tool calls"),
        (Request(sampling=GREEDY), progress(engine_text=True), "text itself"),
        (Request(sampling=GREEDY, max_tokens=5), progress(0, engine_text=True), "text itself"),
        (Request(sampling=GREEDY, max_tokens=5), progress(5, engine_text=True, ended=True), "text itself"),
    ],
)
def test_state_in_the_engine_is_never_continued(request_, found, word):
    assert word in str(decide(request_, "always", found))

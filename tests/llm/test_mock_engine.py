"""The mock engine as its callers see it: repeatable answers, limits, exact times, and nothing left."""

import asyncio
import math
import struct

import pytest

from triton_distributed.llm import EmbedRequest, Guide, InvalidParameter, Request, Sampling, packed
from triton_distributed.llm.engines.mock.engine import MockEngine
from triton_distributed.testing import run_in_virtual_time

PROMPT = b"once upon a time"


def ids(text):
    return packed(list(text))


def request(prompt=PROMPT, **fields):
    return Request(prompt=ids(prompt), **fields)


async def outputs(engine, request):
    return [each async for each in engine.generate(request)]


def run(engine, request):
    return run_in_virtual_time(outputs(engine, request))


def tokens(found):
    return [token for each in found for token in each.token_ids]


def test_an_answer_follows_from_prompt_and_seeds():
    def text(engine=None, prompt=PROMPT, **sampling):
        found = run(engine or MockEngine(), request(prompt, max_tokens=100, sampling=Sampling(**sampling)))
        return bytes(tokens(found)).decode("ascii")

    assert text() == text()
    assert len({text(), text(seed=1), text(seed=2), text(prompt=b"other"), text(MockEngine(seed="5"))}) == 5
    assert text(temperature=0) == text(temperature=0, seed=7), "a greedy answer does not depend on the seed"
    assert all(len(word) == 5 for word in text().split()[:-1])


@pytest.mark.parametrize("lost_after", [1, 99, 384, 500])
def test_a_continued_answer_is_the_undisturbed_one(lost_after):
    asked = request(max_tokens=600, sampling=Sampling(seed=3))
    whole = tokens(run(MockEngine(answer_tokens=599), asked))
    assert len(whole) == 600
    assert whole[-1] == 0
    rest = request(list(PROMPT) + whole[:lost_after], continued=lost_after, max_tokens=600, sampling=Sampling(seed=3))
    assert tokens(run(MockEngine(answer_tokens=599), rest)) == whole[lost_after:]


def test_what_ends_an_answer():
    def end(**fields):
        found = run(MockEngine(answer_tokens=50), request(**fields))
        assert [each.finish_reason for each in found[:-1]] == [None] * (len(found) - 1)
        last = found[-1]
        assert last.usage.completion_tokens == len(tokens(found))
        assert last.usage.prompt_tokens == len(PROMPT)
        return len(tokens(found)), last.finish_reason, last.stop_reason

    assert end(max_tokens=50) == (50, "length", None)
    assert end(max_tokens=51) == (51, "stop", None)
    assert end(max_tokens=80, ignore_eos=True) == (80, "length", None)
    assert end(max_tokens=80, min_tokens=60) == (61, "stop", None)
    assert end(max_tokens=80, stop_token_ids=[ord(" "), 10**6]) == (6, "stop", 32)
    assert end(max_tokens=80, stop_token_ids=[ord(" ")], min_tokens=6) == (12, "stop", 32)
    assert tokens(run(MockEngine(context_tokens=20), request(max_tokens=80)))[4:] == []


def test_outputs_have_as_many_tokens_as_asked():
    sizes = [len(each.token_ids) for each in run(MockEngine(tokens_per_output="7"), request(max_tokens=20))]
    assert sizes == [7, 7, 6]
    assert len(run(MockEngine(tokens_per_output=0), request(max_tokens=100))) == 1


def test_log_probabilities_are_those_of_a_distribution():
    found = run(MockEngine(), request(max_tokens=9, sampling=Sampling(logprobs=4)))
    for output in found:
        (report,) = output.logprobs
        assert report.token_id == output.token_ids[0] == report.top[0].token_id
        assert report.logprob == report.top[0].logprob
        chances = [math.exp(each.logprob) for each in report.top]
        assert len({each.token_id for each in report.top}) == 4
        assert sorted(chances, reverse=True) == chances
        assert sum(chances) <= 1
    bare = run(MockEngine(), request(sampling=Sampling(logprobs=0)))
    assert bare[0].logprobs[0].top == []


def test_guided_answers_have_the_form():
    def text(guide, **fields):
        found = run(MockEngine(), request(guide=guide, max_tokens=90, **fields))
        assert found[-1].finish_reason == "stop"
        return bytes(tokens(found)[:-1]).decode()

    assert text(Guide(json=True)).startswith('{"answer": "')
    assert text(Guide(choice=["yes", "no"])) in ("yes", "no")


def test_embeddings_are_unit_vectors_of_their_text():
    async def vectors(**fields):
        found = await MockEngine().embed(EmbedRequest(prompts=[ids(b"one"), ids(b"two"), ids(b"one")], **fields))
        assert found.prompt_tokens == 9
        return [struct.unpack(f"<{len(each) // 4}f", each) for each in found.vectors]

    one, two, again = asyncio.run(vectors())
    assert one == again != two
    assert len(one) == 64
    assert math.hypot(*one) == pytest.approx(1)
    short = asyncio.run(vectors(dimensions=8))[0]
    assert math.hypot(*short) == pytest.approx(1)
    assert short[0] / short[1] == pytest.approx(one[0] / one[1])
    with pytest.raises(InvalidParameter, match="dimensions: expected 1 to 64, got 65"):
        asyncio.run(vectors(dimensions=65))


@pytest.mark.parametrize(
    "options",
    [
        {"slots": "0"},
        {"slots": "two"},
        {"seed": "-1"},
        {"itl_ms": "nan"},
        {"itl_ms": "-1"},
        {"speed": "fast"},
        {"speed": "dynamo", "itl_ms": "3"},
        {"name": ""},
    ],
)
def test_an_invalid_option_is_named(options):
    with pytest.raises(InvalidParameter) as caught:
        MockEngine(**options)
    assert caught.value.param in options


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": b""}, "prompt"),
        ({"prompt": b"abc"}, "prompt"),
        ({"text": "hello"}, "prompt"),
        ({"prompt": ids(b"x" * 200)}, "prompt"),
        ({"prompt": ids(b"x"), "continued": 2}, "continued"),
        ({"prompt": ids(b"x"), "max_tokens": 0}, "max_tokens"),
        ({"prompt": ids(b"x"), "tools": [{}]}, "tools"),
        ({"prompt": ids(b"x"), "guide": Guide(regex="a")}, "guide"),
        ({"prompt": ids(b"x"), "sampling": Sampling(logprobs=21)}, "logprobs"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(fields, param):
    engine = MockEngine(context_tokens=200)
    with pytest.raises(InvalidParameter) as caught:
        run(engine, Request(**fields))
    assert caught.value.param == param
    assert engine.metrics().active == 0


def test_times_are_exact_in_virtual_time():
    async def times():
        loop, engine = asyncio.get_running_loop(), MockEngine(ttft_ms="50", prefill_token_ms="0.5", itl_ms="10")
        began, found = loop.time(), []
        async for _ in engine.generate(request(max_tokens=4)):
            found.append(round((loop.time() - began) * 1000, 6))
        await engine.close()
        return found

    assert run_in_virtual_time(times()) == [58, 68, 78, 88]


def test_a_cancelled_request_frees_its_slot_at_once():
    async def program():
        engine = MockEngine(itl_ms="10")
        task = asyncio.create_task(outputs(engine, request(max_tokens=1000)))
        await asyncio.sleep(0.055)
        assert engine.metrics().active == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert engine.metrics().active == 0
        await engine.close()

    run_in_virtual_time(program())


@pytest.mark.parametrize("options", [{}, {"itl_ms": "1"}])
def test_a_caller_that_leaves_between_outputs_frees_its_slot(options):
    async def program():
        engine = MockEngine(**options)
        answer = engine.generate(request(max_tokens=1000))
        await anext(answer)
        assert engine.metrics().active == 1
        await answer.aclose()
        assert engine.metrics().active == 0
        await engine.close()

    run_in_virtual_time(program())

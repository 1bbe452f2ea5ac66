"""The values that engines, workers and front ends share."""

from __future__ import annotations

import pickle
import subprocess
import sys
from array import array
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import triton_distributed as trd
from triton_distributed.discovery.record import encode
from triton_distributed.llm import (
    AnswerLost,
    EngineStalled,
    Guide,
    InvalidParameter,
    Model,
    ModelCard,
    ModelConflict,
    ModelNotFound,
    Output,
    Request,
    Sampling,
    TokenLogprob,
    Usage,
    packed,
    unpacked,
)
from triton_distributed.llm.contract.request import encoded
from triton_distributed.names import EndpointName, Instance
from triton_distributed.payload.codec import encode as encode_value
from triton_distributed.payload.outofband import OUT_OF_BAND

CARD = ModelCard(name="Org/My Model-7B", context_tokens=8192, eos_token_ids=(2,), continues="greedy")


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_token_ids_are_packed_in_four_bytes_each(ids):
    assert packed(ids) == b"".join(each.to_bytes(4, "little") for each in ids)
    assert unpacked(packed(ids)) == array("I", ids)
    assert Request(prompt=packed(ids)).token_ids.tolist() == ids


@pytest.mark.parametrize(("ids", "error"), [([-1], OverflowError), ([2**32], OverflowError), ([1.5], TypeError)])
def test_what_is_no_token_id_is_refused(ids, error):
    with pytest.raises(error):
        packed(ids)


def test_a_plain_request_is_encoded_as_the_codec_does_and_any_other_is_left_to_it():
    sampling = Sampling(temperature=0.5, logit_bias={7: -1.0})
    for plain in (
        Request(),
        Request(model="m", prompt=b"\xc4" * 16_000, stop=["é"], sampling=sampling, text="t", rank=3),
    ):
        assert encoded(plain) == encode_value(plain)
    guided = {"guide": Guide(json=True), "tools": [{}], "tool_choice": "auto", "messages": [{}], "extra": {"a": 1}}
    wrong: list[Any] = [{"prompt": bytearray(b"abcd")}, {"prompt": b"a" * OUT_OF_BAND}, {"max_tokens": 2**64}]
    for other in [*({name: value} for name, value in guided.items()), *wrong]:
        assert encoded(Request(**other)) is None


def test_half_a_token_id_is_refused():
    with pytest.raises(ValueError, match="not a multiple of item size"):
        unpacked(b"\1\2\3")


@pytest.mark.parametrize(
    ("sampling", "greedy"),
    [
        (Sampling(), False),
        (Sampling(temperature=0), True),
        (Sampling(top_k=1), True),
        (Sampling(temperature=0.1, top_k=2), False),
    ],
)
def test_greedy_means_without_chance(sampling, greedy):
    assert sampling.greedy is greedy


async def test_requests_and_outputs_travel_unchanged():
    """Every form of both, through a real endpoint."""
    contract = trd.Stream[Request, Output]("models.test-00000000.generate")
    request = Request(
        model="m",
        prompt=packed(range(70_000)),
        continued=3,
        max_tokens=5,
        stop=["\n\n"],
        stop_token_ids=[7],
        sampling=Sampling(temperature=0, seed=1, logit_bias={5: -100.0}, logprobs=2),
        guide=Guide(schema={"type": "object"}),
        messages=[{"role": "user", "content": [{"type": "text", "text": "é"}]}],
        tools=[{"type": "function", "function": {"name": "f"}}],
        tool_choice="auto",
        extra={"top_a": 0.1},
    )
    outputs = [
        Output(token_ids=[1, 2], logprobs=[TokenLogprob(1, -0.5, "a"), TokenLogprob(2, -9999.0)]),
        Output(text="é", reasoning="why", tool_calls=[{"index": 0, "function": {"arguments": "{"}}]),
        Output(finish_reason="stop", stop_reason="\n\n", usage=Usage(70_000, 2, 64)),
        Output(finish_reason="length", stop_reason=7),
    ]
    got = []

    async def handler(asked: Request):
        got.append(asked)
        for each in outputs:
            yield each

    async with trd.connect(trd.Config(discovery="memory")) as here:
        await here.serve(contract, handler)
        assert [item async for item in here.stream(contract, request)] == outputs
    assert got == [request]


def test_equal_cards_share_a_component_and_different_ones_do_not():
    again = ModelCard(name="Org/My Model-7B", context_tokens=8192, eos_token_ids=(2,), continues="greedy")
    assert CARD.component == again.component
    assert CARD.component.startswith("org-my-model-7b-")
    others = [
        msgspec.structs.replace(CARD, **change)
        for change in ({"context_tokens": 4096}, {"generation": 1}, {"template": "blake2b:00"}, {"aliases": ("x",)})
    ]
    assert len({each.component for each in (CARD, *others)}) == 5


def test_the_digest_is_the_same_in_every_process():
    program = (
        "from triton_distributed.llm import ModelCard\n"
        "print(ModelCard(name='Org/My Model-7B', context_tokens=8192, eos_token_ids=(2,), continues='greedy').digest)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert found == CARD.digest


@pytest.mark.parametrize("name", ["…", "a" * 500, "x.y/z:latest", "Ünïcode", "--"])
def test_every_name_gives_a_valid_component(name):
    card = ModelCard(name=name)
    assert EndpointName("models", card.component, "generate").component == card.component


def test_a_card_is_plain_metadata_of_an_instance():
    model = Model(card=CARD, tokenizer=b"{}" * 1_000_000, template="{{ messages }}" * 10_000)
    published = model.published
    metadata = {"model": msgspec.to_builtins(published)}
    record = encode(Instance(EndpointName("models", published.component, "generate"), 1, ("tcp://h:1",), "h", metadata))
    assert len(record) < 2_000  # Its contents stay out of discovery.
    assert msgspec.convert(metadata["model"], ModelCard) == published
    assert set(model.assets) == {published.tokenizer, published.template}
    assert model.assets[published.template] == str(model.template).encode()


def test_a_model_of_bytes_or_text_has_no_assets():
    assert Model(card=CARD, tokenizer="bytes").published.tokenizer == "bytes"
    assert Model(card=CARD, tokenizer="bytes").assets == {}
    assert Model(card=CARD).published == CARD


@pytest.mark.parametrize(
    "error",
    [
        ModelNotFound("x", ["a", "b"]),
        InvalidParameter("messages[0].content", "an image, which the model does not take", "unsupported"),
        ModelConflict("x", 2, ["context_tokens: 1 and 2"], "instance 7"),
        AnswerLost("x", "its output is guided", 12),
        EngineStalled("x", 30.0),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_keep_their_fields_between_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert vars(again) == vars(error)
    assert str(again) == str(error)
    assert str(error.args[0]) in str(error)


def test_the_contract_is_light():
    program = (
        "import sys, triton_distributed.llm\n"
        "print(*{'jinja2', 'starlette', 'tokenizers', 'fastokens', 'uvicorn', 'httpx', 'numpy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert found == ""

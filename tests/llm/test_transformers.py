"""The engine transformers, held to `generate` of transformers itself on tiny models of random weights."""

import asyncio
import json
import struct
from contextlib import aclosing

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: `make test-transformers` runs this file")
transformers = pytest.importorskip("transformers", reason="see `make test-transformers`")

from tests.llm.test_worker import connect  # noqa: E402
from triton_distributed.cli.model.engines import make_engine  # noqa: E402
from triton_distributed.llm import (  # noqa: E402
    EmbedRequest,
    Guide,
    InvalidParameter,
    Models,
    Request,
    Sampling,
    Usage,
    packed,
    serve_model,
)
from triton_distributed.llm.engines import transformers_batch  # noqa: E402
from triton_distributed.llm.engines.transformers import TransformersEngine  # noqa: E402

VOCABULARY, CONTEXT, END = 64, 96, 2
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": END,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "sliding": lambda: transformers.MistralConfig(**SHAPE, sliding_window=8),
    "mixed": lambda: transformers.Gemma3TextConfig(
        **SHAPE, head_dim=8, pad_token_id=0, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "positions": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, bos_token_id=1, eos_token_id=END
    ),
}
GREEDY = Sampling(temperature=0)
PROMPTS = [[5, 6, 7], [1, 9], list(range(3, 63)), [8] * 20, [40, 3, 22, 17, 30]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each kind of model. Its weights are large, so that the answers differ much from each other."""
    found = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(3)
        made = transformers.AutoModelForCausalLM.from_config(config())
        for weights in made.parameters():
            if weights.dim() > 1:
                torch.nn.init.normal_(weights, std=0.3)
        found[name] = folder = tmp_path_factory.mktemp(name)
        made.save_pretrained(folder)
        vocabulary = {f"t{token}": token for token in range(VOCABULARY)}
        told = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
        split = {"type": "WhitespaceSplit"}
        (folder / "tokenizer.json").write_text(
            json.dumps({"version": "1.0", "model": told, "pre_tokenizer": split, "added_tokens": []})
        )
        (folder / "chat_template.jinja").write_text("{% for each in messages %}{{ each.content }}{% endfor %}")
    return found


@pytest.fixture
async def engine(folders):
    made, takes_model = make_engine("transformers", str(folders["llama"]), {"slots": "4", "embeddings": "true"})
    assert takes_model
    await made.start()
    yield made
    await made.close()


async def read(engine, prompt, max_tokens=12, **fields):
    fields.setdefault("sampling", GREEDY)
    return [each async for each in engine.generate(Request(prompt=packed(prompt), max_tokens=max_tokens, **fields))]


async def ids(engine, prompt, **fields):
    return [token for each in await read(engine, prompt, **fields) for token in each.token_ids]


def plain(folder, prompt, max_tokens=12, **options):
    """What `generate` answers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    options = {"do_sample": False, "eos_token_id": END, **options}
    given = torch.tensor([prompt])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=max_tokens, pad_token_id=0, **options
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("step_tokens", [512, 7])
async def test_a_batch_answers_as_generate_does(folders, kind, step_tokens, monkeypatch):
    monkeypatch.setattr(transformers_batch, "STEP_TOKENS", step_tokens)
    engine = TransformersEngine(model=str(folders[kind]), slots=3)
    await engine.start()
    assert engine._batch is not None
    rows, forward = [], engine._batch._forward

    def counted(given, lengths, cache, hidden=False):
        rows.append(len(lengths))
        return forward(given, lengths, cache, hidden)

    monkeypatch.setattr(engine._batch, "_forward", counted)
    found = await asyncio.gather(
        *(ids(engine, prompt, max_tokens=9 + 4 * at) for at, prompt in enumerate(PROMPTS)), ids(engine, PROMPTS[0])
    )
    for at, prompt in enumerate(PROMPTS):
        assert found[at] == plain(folders[kind], prompt, 9 + 4 * at), prompt
    assert len(set(map(tuple, found[:5]))) == 5
    assert max(rows) == 3
    assert len(rows) < sum(map(len, found)), "the steps are shared"
    assert engine.metrics().active == 0
    await engine.close()


async def test_the_card_and_the_end_of_an_answer(engine, folders):
    card = engine.model.card
    assert (card.name, card.context_tokens, card.eos_token_ids) == (folders["llama"].name, CONTEXT, (END,))
    assert (card.chat, card.continues, card.dimensions) == (True, "greedy", 32)
    answer = await ids(engine, [5, 6, 7], max_tokens=30, ignore_eos=True)
    last = (await read(engine, [5, 6, 7]))[-1]
    assert (last.finish_reason, last.usage) == ("length", Usage(3, 12))
    stop = next(each for each in answer[3:] if each not in answer[:3])
    found = await read(engine, [5, 6, 7], stop_token_ids=[stop])
    assert (found[-1].token_ids, found[-1].finish_reason, found[-1].stop_reason) == ([stop], "stop", stop)
    later = await ids(engine, [5, 6, 7], stop_token_ids=[stop], min_tokens=8)
    assert len(later) >= 8
    assert stop not in later[:7]
    bias = {END: 1e4}
    ended = await read(engine, [5], sampling=Sampling(temperature=0, logit_bias=bias))
    assert [each.token_ids for each in ended] == [[END]]
    assert (ended[0].finish_reason, ended[0].stop_reason) == ("stop", None)
    assert await ids(engine, [5], ignore_eos=True, sampling=Sampling(temperature=0, logit_bias=bias)) == [END] * 12
    before = engine.metrics().prompt_tokens
    assert await ids(engine, [5, 6, 7, *answer[:10]], continued=10, max_tokens=20, ignore_eos=True) == answer[10:]
    assert engine.metrics().prompt_tokens == before + 13


async def test_options_of_sampling(engine, folders):
    folder = folders["llama"]
    assert await ids(engine, [5, 6], sampling=Sampling(temperature=0, repetition_penalty=1.7)) == plain(
        folder, [5, 6], repetition_penalty=1.7
    )
    full = Sampling(temperature=1.5, top_k=40, top_p=0.95, min_p=0.01, seed=7)
    first = await ids(engine, [5, 6], sampling=full, max_tokens=30)
    other = Sampling(temperature=1.5, seed=8)
    again, busy, *_ = await asyncio.gather(
        ids(engine, [5, 6], sampling=full, max_tokens=30), ids(engine, [5, 6], sampling=other, max_tokens=30)
    )
    assert again == first != busy
    assert first != await ids(engine, [5, 6], max_tokens=30)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        assert await ids(engine, [5, 6], sampling=Sampling(**narrow)) == plain(folder, [5, 6]), narrow
    none_twice = await ids(engine, [5, 6], sampling=Sampling(temperature=0, presence_penalty=1e4), ignore_eos=True)
    assert len(set(none_twice)) == 12
    often = Sampling(temperature=0, frequency_penalty=1e4)
    others = await ids(engine, [5, 6, *none_twice], continued=12, sampling=often, ignore_eos=True)
    assert len({*none_twice, *others}) == 24


async def test_log_probabilities_are_those_of_the_model(engine, folders):
    found = await read(engine, [5, 6, 7], max_tokens=3, sampling=Sampling(temperature=0, logprobs=2))
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"])
    (one,) = found[0].logprobs
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7]])).logits[0, -1].log_softmax(-1)
    assert [each.token_id for each in one.top] == expected.topk(2).indices.tolist()
    assert one.token_id == one.top[0].token_id == found[0].token_ids[0]
    assert one.logprob == pytest.approx(float(expected.max()), abs=1e-4)
    assert one.top[1].logprob == pytest.approx(float(expected.topk(2).values[1]), abs=1e-4)
    assert (await read(engine, [5]))[0].logprobs is None
    (alone,) = (await read(engine, [5], sampling=Sampling(logprobs=0)))[0].logprobs
    assert alone.top == []


async def test_a_caller_that_leaves_frees_the_slot(engine):
    async def begin(count):
        stream = engine.generate(Request(prompt=packed([5, count]), max_tokens=90, ignore_eos=True, sampling=GREEDY))
        await anext(stream)
        return stream

    streams = [await begin(each) for each in range(4)]  # all slots
    assert engine.metrics().active <= 4
    waiting = asyncio.create_task(read(engine, [9, 9], max_tokens=2))
    gone = asyncio.create_task(read(engine, [7]))
    await asyncio.sleep(0)
    gone.cancel()
    for stream in streams:
        await stream.aclose()
    assert (await waiting)[-1].finish_reason == "length"
    with pytest.raises(asyncio.CancelledError):
        await gone
    before = engine.metrics().generated_tokens
    assert len(await ids(engine, [5], max_tokens=5, ignore_eos=True)) == 5
    assert engine.metrics().generated_tokens == before + 5, "nothing was generated for those that left"
    assert (engine.metrics().active, engine.metrics().waiting) == (0, 0)


async def test_embeddings(engine, folders, monkeypatch):
    monkeypatch.setattr(transformers_batch, "STEP_TOKENS", 16)
    found = await engine.embed(EmbedRequest(prompts=[packed(PROMPTS[2]), packed([5])]))
    assert found.prompt_tokens == 61
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"])
    for vector, prompt in zip(found.vectors, (PROMPTS[2], [5]), strict=True):
        with torch.no_grad():
            mean = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0].mean(0)
        assert struct.unpack("<32f", vector) == pytest.approx((mean / mean.norm()).tolist(), abs=1e-4)
    with pytest.raises(InvalidParameter, match="dimensions"):
        await engine.embed(EmbedRequest(prompts=[packed([5])], dimensions=8))
    with pytest.raises(InvalidParameter, match="input: it is empty"):
        await engine.embed(EmbedRequest(prompts=[b""]))


async def test_what_is_invalid_is_refused_and_the_others_go_on(engine):
    async with aclosing(engine.generate(Request(prompt=packed([5]), max_tokens=90, ignore_eos=True))) as other:
        await anext(other)
        with pytest.raises(InvalidParameter, match="prompt: it is empty"):
            await read(engine, [])
        with pytest.raises(InvalidParameter, match="prompt: a token id is not below 64"):
            await read(engine, [5, 64])
        with pytest.raises(InvalidParameter, match="prompt"):
            await read(engine, [2**32 - 1])
        with pytest.raises(InvalidParameter, match="max_tokens"):
            await read(engine, [5], max_tokens=CONTEXT)
        with pytest.raises(InvalidParameter, match="logit_bias"):
            await read(engine, [5], sampling=Sampling(logit_bias={64: 1}))
        with pytest.raises(InvalidParameter, match="guide"):
            await read(engine, [5], guide=Guide(json=True))
        assert (await read(engine, [5], stop_token_ids=[999], max_tokens=2))[-1].finish_reason == "length"
        assert await anext(other)


async def test_a_failed_step_ends_its_requests_and_no_others(engine, monkeypatch):
    batch, error = engine._batch, RuntimeError("no memory")
    forward = type(batch)._forward

    def broken(self, given, lengths, cache, hidden=False):
        if given.shape[1] == 1 and len(lengths) == 2:
            raise error
        return forward(self, given, lengths, cache, hidden)

    monkeypatch.setattr(type(batch), "_forward", broken)
    first = engine.generate(Request(prompt=packed([5, 6]), max_tokens=90, ignore_eos=True))
    await anext(first)
    with pytest.raises(RuntimeError, match="no memory"):
        await read(engine, [7, 8], max_tokens=90, ignore_eos=True)
    with pytest.raises(RuntimeError, match="no memory"):
        async for _ in first:
            pass
    assert len(await ids(engine, [5, 6], ignore_eos=True)) == 12


async def test_options_and_models_that_are_invalid(folders, tmp_path):
    for options, named in (
        ({"dtype": "int3"}, "dtype"),
        ({"slots": "0"}, "slots"),
        ({"device": "cpux"}, "device"),
        ({"device": "cuda:77"}, "device"),
        ({"context_tokens": str(CONTEXT + 1)}, "context_tokens"),
    ):
        with pytest.raises(InvalidParameter, match=named):
            made = TransformersEngine(model=str(folders["llama"]), **options)
            await made.start()
    (tmp_path / "tokenizer.json").write_text("{}")
    made = TransformersEngine(model=str(tmp_path))
    with pytest.raises(InvalidParameter, match="cannot load"):
        await made.start()
    await made.close()
    state = transformers.AutoModelForCausalLM.from_config(
        transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1)
    )
    state.save_pretrained(tmp_path)
    with pytest.raises(InvalidParameter, match="keys and values"):
        await TransformersEngine(model=str(tmp_path), context_tokens=32).start()


async def test_it_is_served(folders):
    async with connect() as connection, Models(connection) as models:
        await serve_model(connection, TransformersEngine(model=str(folders["llama"])), name="tiny")
        model = await models.wait_for("tiny", 10)
        prompt = await model.prompts.chat([{"role": "user", "content": "t5 t6 t7"}])
        found = [each async for each in model.answer(prompt, Request(max_tokens=6, sampling=GREEDY))]
    assert [token for each in found for token in each.token_ids] == plain(folders["llama"], [5, 6, 7], 6)

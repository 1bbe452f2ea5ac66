"""The engines vllm and sglang, held to the published signatures by stand-ins that refuse every other argument."""

import asyncio
import json
import re
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.llm.standins import recorded
from triton_distributed.llm import (
    Candidate,
    EngineDead,
    Guide,
    InvalidParameter,
    Request,
    Sampling,
    TokenLogprob,
    Usage,
    packed,
)
from triton_distributed.llm.contract.cache import CacheCleared, CacheEvents
from triton_distributed.llm.engines.checkpoint import read_checkpoint
from triton_distributed.llm.engines.mock.publisher import EventPublisher
from triton_distributed.llm.engines.sglang import SglangEngine
from triton_distributed.llm.engines.transformers import TransformersEngine
from triton_distributed.llm.engines.vllm import VllmEngine

KINDS = [(VllmEngine, recorded.AsyncLLM), (SglangEngine, recorded.SglangEngine)]
FULL = Sampling(
    temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, presence_penalty=1, seed=4, logit_bias={5: 2}, logprobs=1
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, module in recorded.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "tokenizer.json").write_text("{}")
    template = [{"name": "tools", "template": "t"}, {"name": "default", "template": "hi"}]
    told = {"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64, "eos_token_id": 1}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    return tmp_path


async def read(engine, prompt=(5, 6), **fields):
    return [each async for each in engine.generate(Request(prompt=packed(prompt), **fields))]


@pytest.mark.parametrize(("kind", "standin"), KINDS)
@pytest.mark.parametrize("cumulative", [True, False])
async def test_tokens_go_in_and_come_out_once(folder, kind, standin, cumulative, monkeypatch):
    monkeypatch.setattr(recorded.SglangEngine, "cumulative", cumulative)
    engine = kind(model=str(folder), name="m", slots="8", context_tokens="32")
    await engine.start()
    card = engine.model.card
    assert (card.name, card.context_tokens, card.eos_token_ids, card.continues) == ("m", 32, (2, 3), "greedy")
    assert (engine.model.tokenizer, engine.model.template) == (b"{}", "hi")
    found = await read(engine, max_tokens=5, sampling=FULL, stop=["x"], stop_token_ids=[9], ignore_eos=True)
    assert [each.token_ids for each in found] == [[1, 2], [3, 4], [5]]
    assert [each.finish_reason for each in found] == [None, None, "length"]
    assert found[-1].usage == Usage(prompt_tokens=2, completion_tokens=5, cached_tokens=1)
    assert found[1].logprobs == [TokenLogprob(each, -1.0, None, [Candidate(99, -0.5)]) for each in (3, 4)]
    made = standin.made[-1]
    (asked,) = made.calls
    prompt, sampling = asked
    assert (prompt["prompt_token_ids"] if kind is VllmEngine else prompt) == [5, 6]
    given: Any = vars(sampling) if kind is VllmEngine else sampling
    assert given["temperature"] == 0.5
    assert given["stop_token_ids"] == [9]
    assert given["ignore_eos"] is True
    assert not given.get("stop"), "stop texts are looked for outside of the engine"
    assert engine.metrics().generated_tokens == 5
    await engine.close()
    assert made.closed


@pytest.mark.parametrize(("kind", "standin"), KINDS)
async def test_a_caller_that_leaves_frees_the_slot(folder, kind, standin):
    engine = kind(model=str(folder))
    await engine.start()
    made = standin.made[-1]
    first = asyncio.Event()

    async def caller():
        async with aclosing(engine.generate(Request(prompt=packed([7]), max_tokens=9))) as stream:
            async for _ in stream:
                first.set()

    task = asyncio.create_task(caller())
    await first.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(made.aborted) == 1
    async with aclosing(engine.generate(Request(prompt=packed([5]), max_tokens=9))) as stream:
        await anext(stream)
    assert len(made.aborted) == 2
    assert engine.metrics().active == 0
    await engine.close()


async def test_vllm_keeps_a_prompt_for_another_worker_that_fetches_it(folder):
    engines = {}
    for role in ("prefill", "decode"):
        engines[role] = VllmEngine(
            model=str(folder), role=role, engine_args='{"kv_transfer_config": {"kv_load_failure_policy": "recompute"}}'
        )
        await engines[role].start()
        assert engines[role].model.card.role == role
        config = recorded.AsyncLLM.made[-1].args.kv_transfer_config
        assert (config.kv_connector, config.kv_role, config.kv_load_failure_policy) == (
            "NixlConnector", "kv_both", "recompute",
        )  # fmt: skip
    prefill, decode = recorded.AsyncLLM.made[-2:]
    first, last = await read(engines["prefill"], max_tokens=3, ignore_eos=True)
    assert prefill.calls[0][1].extra_args["kv_transfer_params"]["do_remote_decode"] is True
    assert (first.kv_transfer, last.finish_reason) == (None, "length")
    decode.fetched.set()
    found = await read(engines["decode"], max_tokens=3, kv_transfer=last.kv_transfer)
    assert [each.token_ids for each in found] == [[1, 2], [3]]
    assert decode.calls[0][1].extra_args == {"kv_transfer_params": last.kv_transfer}
    await read(engines["decode"], max_tokens=3)
    assert decode.calls[1][1].extra_args is None
    # A caller that leaves: vLLM is not asked to abort in the middle of the transfer.
    decode.fetched.clear()
    for left in (True, False):
        reader = asyncio.create_task(read(engines["decode"], max_tokens=3, kv_transfer=last.kv_transfer))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert (len(decode.aborted), engines["decode"].metrics().active) == (0 if left else 1, 0)
        if left:
            decode.fetched.set()
            while engines["decode"]._ending:
                await asyncio.sleep(0)
            assert len(decode.aborted) == 1
            decode.fetched.clear()
    for engine in engines.values():
        await engine.close()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1
    with pytest.raises(InvalidParameter, match="kv_transfer_config is not a JSON object"):
        await VllmEngine(model=str(folder), role="decode", engine_args='{"kv_transfer_config": 1}').start()
    with pytest.raises(InvalidParameter, match="role: expected one of"):
        VllmEngine(model=str(folder), role="other")


async def test_two_workers_of_sglang_meet_at_the_prefill_worker(folder):
    prefill, decode = (SglangEngine(model=str(folder), role=role) for role in ("prefill", "decode"))
    await prefill.start()
    await decode.start()
    standins = recorded.SglangEngine.made[-2:]
    assert [each.args["disaggregation_mode"] for each in standins] == ["prefill", "decode"]
    assert prefill.model.card.digest == decode.model.card.digest
    assert decode.model.card.decode_only
    first, *rest = await read(prefill, max_tokens=1, ignore_eos=True)
    told = first.kv_transfer
    assert (set(told), told["bootstrap_port"], first.token_ids) == (
        {"bootstrap_host", "bootstrap_port", "bootstrap_room"}, 8998, [],
    )  # fmt: skip
    assert [each.finish_reason for each in rest] == ["length"]
    await read(decode, max_tokens=3, kv_transfer=told)
    assert standins[0].meetings == standins[1].meetings == [tuple(told.values())]
    with pytest.raises(RuntimeError, match="a decode worker of SGLang computes no prompt"):
        await read(decode, max_tokens=3)
    standins[0].tokenizer_manager.server_args.dist_init_addr = "[::1]:5000"
    (first, _), (second, _) = await read(prefill, max_tokens=1), await read(prefill, max_tokens=1)
    assert first.kv_transfer["bootstrap_host"] == "[::1]"
    assert first.kv_transfer["bootstrap_room"] != second.kv_transfer["bootstrap_room"]
    for engine in (prefill, decode):
        await engine.close()


async def test_a_salt_of_the_cache_goes_to_vllm(folder):
    engine = VllmEngine(model=str(folder))
    await engine.start()
    assert "cache_salt" in engine.model.card.extra_fields
    for salt in ("", "mine"):
        await read(engine, cache_salt=salt)
    plain, salted = (prompt for prompt, _ in recorded.AsyncLLM.made[-1].calls)
    assert plain == {"prompt_token_ids": [5, 6]}
    assert salted == {"prompt_token_ids": [5, 6], "cache_salt": "mine"}
    await engine.close()


@pytest.mark.parametrize(("kind", "standin"), KINDS)
async def test_a_request_that_names_an_adapter_is_computed_with_it(folder, kind, standin):
    engine = kind(model=str(folder), name="m", adapters="sql=/models/sql, chat=/models/chat", kv_events="on")
    # The events of SGLang do not tell the adapter of a block.
    assert engine.kv_events(lambda events: None) == (kind is VllmEngine)
    await engine.start()
    assert engine.model.card.adapters == ("sql", "chat")
    for name in ("m", "chat", "sql"):
        await read(engine, model=name)
    made = standin.made[-1]
    if kind is VllmEngine:
        assert made.args.enable_lora
        found = [each and (each.lora_name, each.lora_int_id, each.lora_path) for each in made.adapters]
        assert found == [None, ("chat", 2, "/models/chat"), ("sql", 1, "/models/sql")]
    else:
        assert made.args["lora_paths"] == {"sql": "/models/sql", "chat": "/models/chat"}
        assert made.adapters == [None, "chat", "sql"]
    await engine.close()
    for wrong in ("sql", "sql=", "=x", "sql=a,sql=b", "sql=a,"):
        with pytest.raises(InvalidParameter, match="adapters: expected name=path"):
            kind(model="m", adapters=wrong)


async def test_a_dead_engine_of_vllm_is_told_apart_from_other_failures(folder):
    engine = VllmEngine(model=str(folder), kv_events="off")
    await engine.start()
    with pytest.raises(EngineDead, match="the engine is dead: EngineCore encountered an issue"):
        await read(engine, [13])
    assert engine.metrics().active == 0
    await engine.close()


async def test_guides_and_what_is_refused(folder):
    vllm, sglang = VllmEngine(model=str(folder), kv_events="tcp://*:1"), SglangEngine(model=str(folder))
    await vllm.start()
    await sglang.start()
    assert recorded.AsyncLLM.made[-1].args.kv_events_config.endpoint == "tcp://*:1"
    for guide in (Guide(json=True), Guide(schema={}), Guide(regex="a"), Guide(grammar="g"), Guide(choice=["a"])):
        await read(vllm, guide=guide)
    assert recorded.AsyncLLM.made[-1].calls[0][1].structured_outputs.json_object
    assert sglang.model.card.guides == (), "SGLang makes grammars from the tokenizer that it does not have"
    for engine, field, refused in (
        (sglang, "guide", {"guide": Guide(regex="a")}),
        (sglang, "min_tokens", {"min_tokens": 2}),
        (sglang, "request", {"prompt": [8]}),
        (vllm, "logprobs", {"sampling": Sampling(logprobs=13)}),
    ):
        with pytest.raises(InvalidParameter) as found:
            await read(engine, **refused)
        assert found.value.param == field
        assert engine.metrics().active == 0
    with pytest.raises(RuntimeError, match="SGLang ended the request: planned"):
        await read(sglang, [9])
    assert recorded.SglangEngine.made[-1].aborted == []
    for kind in (VllmEngine, SglangEngine):
        with pytest.raises(InvalidParameter, match="slots"):
            kind(model="m", slots="0")
        with pytest.raises(InvalidParameter, match="JSON object"):
            kind(model="m", engine_args="[1]")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InvalidParameter, match=r"no tokenizer\.json"):
        read_checkpoint(str(folder))


def config_of(made: Any) -> dict[str, Any]:
    """What an engine was told of its events."""
    if isinstance(made, recorded.SglangEngine):
        return dict(json.loads(made.args["kv_events_config"]))
    assert made.args.kv_events_config.enable_kv_cache_events
    return dict(vars(made.args.kv_events_config))


@pytest.mark.parametrize(("kind", "standin"), KINDS)
async def test_the_events_of_an_engine_reach_the_worker(folder, kind, standin):
    engine = kind(model=str(folder))
    found, came = [], asyncio.Event()

    def publish(events):
        found.append(events)
        came.set()

    assert engine.kv_events(publish)
    await engine.start()
    assert engine.model.card.kv_block_tokens == {VllmEngine: 16, SglangEngine: 1}[kind]
    config = config_of(standin.made[-1])
    assert config["publisher"] == "zmq"
    private = Path(config["endpoint"].removeprefix("ipc://")).parent
    assert private.stat().st_mode & 0o777 == 0o700
    publisher = EventPublisher(config["endpoint"], config["replay_endpoint"])
    publisher.start()
    publisher.publish(msgspec.msgpack.encode([1.0, [["AllBlocksCleared"]], 0]))
    async with asyncio.timeout(20):
        await came.wait()
    assert found == [CacheEvents([CacheCleared()])]
    publisher.publish(b"no msgpack")
    async with asyncio.timeout(20):
        while not engine.metrics().kv_unread:
            await asyncio.sleep(0.005)
    assert engine.metrics().kv_lost == 0
    await publisher.close()
    await engine.close()
    assert not private.exists()


@pytest.mark.parametrize(("kind", "standin"), KINDS)
async def test_the_ranks_of_an_engine_are_heard_at_the_next_ports(folder, kind, standin):
    first, second = EventPublisher("tcp://127.0.0.1:*"), EventPublisher("tcp://127.0.0.1:*")
    for port in range(20_000, 30_000, 7):
        first.endpoint, second.endpoint = (f"tcp://127.0.0.1:{port + rank}" for rank in range(2))
        try:
            first.start()
            second.start()
            break
        except InvalidParameter:
            await first.close()
    ranks = {VllmEngine: '{"data_parallel_size": 2}', SglangEngine: '{"dp_size": 2}'}[kind]
    engine = kind(model=str(folder), engine_args=ranks, kv_events=f"tcp://*:{port}")
    found: set[int] = set()
    assert engine.kv_events(lambda events: found.add(events.rank))
    await engine.start()
    assert config_of(standin.made[-1])["endpoint"] == f"tcp://*:{port}"
    async with asyncio.timeout(20):
        while found != {0, 1}:
            for publisher in (first, second):
                publisher.publish(msgspec.msgpack.encode([1.0, [["BlockRemoved", [1]]]]))
            await asyncio.sleep(0.01)
    await read(engine, rank=1)
    assert standin.made[-1].ranks == [1]
    for each in (engine, first, second):
        await each.close()
    assert not kind(model=str(folder), engine_args=ranks).kv_events(lambda events: None), "it needs an endpoint"


def test_options_of_events_that_are_invalid():
    for options, param in (
        ({"kv_events": "yes"}, "kv_events"),
        ({"kv_replay": "tcp://*:1"}, "kv_replay"),
        ({"kv_events": "ipc:///tmp/x", "engine_args": '{"data_parallel_size": 2, "dp_size": 2}'}, "kv_events"),
    ):
        for kind in (VllmEngine, SglangEngine):
            with pytest.raises(InvalidParameter) as refused:
                kind(model="m", **options)
            assert refused.value.param == param
    assert not VllmEngine(model="m", kv_events="off").kv_events(lambda events: None)


async def test_a_package_that_is_missing_is_named(folder, monkeypatch):
    for name in list(recorded.modules()):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch", None)
    for kind, package in (
        (VllmEngine, "vllm"),
        (SglangEngine, "sglang"),
        (TransformersEngine, "'triton-distributed[transformers]'"),
    ):
        with pytest.raises(ImportError, match=f"pip install {re.escape(package)}"):
            await kind(model=str(folder)).start()

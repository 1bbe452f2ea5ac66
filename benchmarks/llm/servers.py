"""The servers that are measured: ours, a bare one, and those of other systems. Each answers the chats of `work`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from benchmarks import environments
from benchmarks.llm.bare import split
from benchmarks.llm.processes import Processes, Server
from benchmarks.llm.steps import GAPS
from benchmarks.llm.work import Work
from benchmarks.peers import compiled_build
from benchmarks.peers.places import free_port
from harness.processes import ROOT

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)  # The mock engine's.
VOCABULARY = 32_000
MOCKED_STEP_S = 0.006  # What a step of the engine takes that Dynamo's mocker simulates, with 128 short streams.


async def ours(processes: Processes, works: Sequence[Work], *, compiled: bool = False) -> Server:
    """`trd http`, and for each model a worker with the mock engine."""
    folder = processes.folder / ("compiled" if compiled else "ours")
    folder.mkdir(mode=0o700)
    path = os.pathsep.join(map(str, filter(None, (compiled_build() if compiled else None, ROOT))))
    environ = {"TRD_DIR": str(folder), "PYTHONPATH": path, GAPS: str(folder / "gaps")}
    trd = str(Path(sys.executable).with_name("trd"))
    port = free_port()
    front = await processes.start(trd, "http", "--port", str(port), "--no-access-log", environ=environ)
    workers = []
    for each in works:
        options = {"answer_tokens": "0", "tokens_per_output": "1" if each.each else "0", "slots": "1024"}
        if each.step_s:
            options["itl_ms"] = f"{each.step_s * 1e3:g}"
        told = [word for name, value in options.items() for word in ("--option", f"{name}={value}")]
        engine = ("--engine", "benchmarks.llm.engines:Timed" if each.step_s else "mock")
        workers.append(await processes.start(trd, "model", "serve", each.name, *engine, *told, environ=environ))
    server = Server(port, [each.pid for each in (front, *workers)])
    await processes.until_answers(server, works, front, *workers)
    return server


async def bare(processes: Processes, works: Sequence[Work], bodies: Mapping[str, bytes]) -> Server:
    """A bare app on uvicorn, which answers the given bytes."""
    folder = processes.folder / "bare"
    folder.mkdir()
    for each in works:
        body = bodies[each.name]
        # Of an answer without end there are only the first events: the second one, of a token, stands for all.
        (folder / each.name).write_bytes(split(body)[1] * each.tokens if each.endless else body)
    port = free_port()
    environ = {GAPS: str(processes.folder / "gaps")}
    app = await processes.start(sys.executable, "-m", "benchmarks.llm.bare", str(port), str(folder), environ=environ)
    server = Server(port, [app.pid], under_path=True)
    await processes.until_answers(server, works, app)
    return server


async def litellm(processes: Processes, works: Sequence[Work], upstream: Server) -> Server:
    """LiteLLM's proxy, one worker process, in front of the bare app."""
    entries = []
    for each in works:
        base = f"http://127.0.0.1:{upstream.port}{upstream.path(each).removesuffix('/chat/completions')}"
        params = {"model": f"openai/{each.name}", "api_base": base, "api_key": "none"}
        entries.append({"model_name": each.name, "litellm_params": params})
    config = processes.folder / "litellm.yaml"
    config.write_text(json.dumps({"model_list": entries, "litellm_settings": {"telemetry": False}}))  # JSON is YAML.
    port = free_port()
    program = str(Path(environments.python("litellm")).with_name("litellm"))
    environ = {
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
    }
    options = ("--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False")
    proxy = await processes.start(program, *options, environ=environ)
    server = Server(port, [proxy.pid, *upstream.pids])
    await processes.until_answers(server, works, proxy)
    return server


def dynamo(kind: str) -> Callable[[Processes, Sequence[Work]], Awaitable[Server]]:
    """Return what starts `service`, `echo`, or the front end with a `worker` or a `mocker`; see `on_dynamo`.

    The echo and the mocker have one model, so all workloads must be alike.
    """

    async def start(processes: Processes, works: Sequence[Work]) -> Server:
        first = works[0]
        folder = processes.folder / f"dynamo-{kind}-{first.name}"
        model_files(folder / "model")
        environ = {
            "DYN_FILE_KV": str(folder / "discovery"),
            "DYN_LOG": "off",
            "DYN_TCP_RPC_HOST": "127.0.0.1",
            "DYN_TOKEN_ECHO_DELAY_MS": f"{first.step_s * 1e3:g}",
            "PYTHONPATH": str(ROOT),
            GAPS: str(folder / "gaps"),
        }
        command = (environments.python("dynamo"), "-m", "benchmarks.llm.on_dynamo")
        kinds = ("front", kind) if kind in ("worker", "mocker") else (kind,)
        port = free_port()
        after = (str(port), str(folder / "model"), str(MOCKED_STEP_S / first.step_s if first.step_s else 1e6))
        started = [await processes.start(*command, each, *after, environ=environ) for each in kinds]
        asked: dict[str, Any] = {"model": kind} if kind in ("echo", "mocker") else {}
        if kind == "echo":
            asked["content"] = "a" * (first.tokens if first.each else 1)
        if kind == "mocker" and not first.each:
            asked["tokens"] = 1
        server = Server(port, [each.pid for each in started], **asked)
        await processes.until_answers(server, works, *started)
        return server

    return start


def model_files(folder: Path) -> None:
    """Write the files of a model that Dynamo reads: a tokenizer, and the mock engine's template.

    A prompt is tokenized as bytes. The further tokens are words, which only the mocker's answers have.
    """
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {each: id for id, each in enumerate([*alphabet, *(f"word{n}" for n in range(VOCABULARY))])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("</s>", special=True)])
    made.save(str(folder / "tokenizer.json"))
    end = {"eos_token_id": len(vocabulary), "bos_token_id": len(vocabulary)}
    sizes = {"vocab_size": len(vocabulary) + 1, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 131_072}
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "</s>"}
    (folder / "config.json").write_text(json.dumps({**shape, **sizes, **end}))
    (folder / "generation_config.json").write_text(json.dumps(end))
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, "chat_template": TEMPLATE}))

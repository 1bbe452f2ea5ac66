"""Stand-ins for vLLM and SGLang. They take the arguments of the published signatures and no others.

Recorded from vllm-project/vllm at 00080ee1 (`v1/engine/async_llm.py`) and 00388f65 (`sampling_params.py`), and from
sgl-project/sglang at 001067ff (`srt/entrypoints/engine.py`) and 00c17caf (`srt/sampling/sampling_params.py`).
"""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass
from http import HTTPStatus
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar


class VLLMValidationError(Exception):
    """Since vLLM 0.27 it is not a ValueError."""

    def __init__(self, message: str, *, parameter: str | None = None, value: Any = None) -> None:
        super().__init__(message)
        self.parameter, self.value = parameter, value


class RequestOutputKind(enum.Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class StructuredOutputsParams:
    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        kinds = (self.json, self.regex, self.choice, self.grammar, self.json_object, self.structural_tag)
        if sum(each is not None for each in kinds) != 1:
            raise VLLMValidationError("one kind of structured outputs")


@dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.logprobs == 13:
            raise VLLMValidationError("planned: too many", parameter="logprobs", value=13)


@dataclass
class AsyncEngineArgs:
    model: str
    served_model_name: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    kv_events_config: Any = None
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    kv_transfer_config: Any = None
    enable_lora: bool = False


@dataclass
class KVEventsConfig:
    enable_kv_cache_events: bool = False
    publisher: str = "null"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    topic: str = ""


@dataclass
class KVTransferConfig:
    kv_connector: str | None = None
    engine_id: str | None = None
    kv_buffer_device: str = "cuda"
    kv_buffer_size: float = 1e9
    kv_role: str | None = None
    kv_rank: int | None = None
    kv_parallel_size: int = 1
    kv_ip: str = "127.0.0.1"
    kv_port: int = 14579
    kv_connector_extra_config: Any = None
    kv_connector_module_path: str | None = None
    kv_load_failure_policy: str = "fail"


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    tensorizer_config_dict: dict[str, Any] | None = None
    load_inplace: bool = False


class EngineDeadError(Exception):
    def __init__(self, *args: Any, suppress_context: bool = False, **kwargs: Any) -> None:
        super().__init__("EngineCore encountered an issue.", *args, **kwargs)


class AsyncLLM:
    """Answers with the tokens 1, 2, 3… in steps of two; token 7 as the first of a prompt makes it wait for ever, and token 13 kills it."""

    made: ClassVar[list[AsyncLLM]] = []
    calls: list[Any]
    aborted: list[str]

    def __init__(self, args: AsyncEngineArgs) -> None:
        self.args, self.calls, self.aborted, self.closed = args, [], [], False
        self.fetched = asyncio.Event()
        self.ranks: list[int | None] = []
        self.adapters: list[LoRARequest | None] = []
        self.model_config = SimpleNamespace(max_model_len=args.max_model_len or 512)
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=16))
        AsyncLLM.made.append(self)

    @classmethod
    def from_engine_args(
        cls, engine_args: Any, start_engine_loop: bool = True, usage_context: Any = None, stat_loggers: Any = None
    ) -> AsyncLLM:
        return cls(engine_args)

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: Any = None,
        tokenization_kwargs: Any = None,
        trace_headers: Any = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        session_id: str | None = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: Any = None,
    ):
        self.calls.append((prompt, sampling_params))
        self.ranks.append(data_parallel_rank)
        self.adapters.append(lora_request)
        if prompt["prompt_token_ids"][0] == 13:
            raise EngineDeadError
        try:
            for at in range(1, sampling_params.max_tokens + 1, 2):
                tokens = list(range(at, min(at + 2, sampling_params.max_tokens + 1)))
                finished = tokens[-1] == sampling_params.max_tokens
                logprobs = None
                if sampling_params.logprobs is not None:
                    logprobs = [
                        {each: SimpleNamespace(logprob=-1.0), 99: SimpleNamespace(logprob=-0.5)} for each in tokens
                    ]
                one = SimpleNamespace(
                    token_ids=tokens,
                    logprobs=logprobs,
                    finish_reason="length" if finished else None,
                    stop_reason=None,
                )
                asked = (sampling_params.extra_args or {}).get("kv_transfer_params") or {}
                kept = {"do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [4, 2]}
                told = kept if finished and asked.get("do_remote_decode") else None
                if asked.get("do_remote_prefill"):
                    await self.fetched.wait()
                yield SimpleNamespace(outputs=[one], finished=finished, num_cached_tokens=1, kv_transfer_params=told)
                if prompt["prompt_token_ids"][0] == 7:
                    await asyncio.Event().wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            raise

    def shutdown(self, timeout: float | None = None) -> None:
        self.closed = True


_SGLANG_SAMPLING = {
    *("max_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k", "min_p"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens", "n", "json_schema", "regex"),
    *("ebnf", "structural_tag", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens"),
    *("no_stop_trim", "custom_params", "stream_interval", "logit_bias", "sampling_seed"),
}
_SGLANG_SERVER = {"model_path", "skip_tokenizer_init", "context_length", "max_running_requests", "tp_size"}
_SGLANG_SERVER |= {"dp_size", "kv_events_config", "lora_paths", "disaggregation_mode"}


class SglangEngine:
    """As `AsyncLLM` above; tokens 8 and 9 as the first have it end the request. `cumulative` is what SGLang does without `incremental_streaming_output`."""

    made: ClassVar[list[SglangEngine]] = []
    calls: list[Any]
    aborted: list[str]
    cumulative = True

    def __init__(self, **kwargs: Any) -> None:
        assert set(kwargs) <= _SGLANG_SERVER, kwargs
        self.args, self.calls, self.aborted, self.closed = kwargs, [], [], False
        self.ranks: list[int | None] = []
        self.adapters: list[str | None] = []
        self.server_args = SimpleNamespace(page_size=1)
        told = SimpleNamespace(dist_init_addr=None, disaggregation_bootstrap_port=8998)
        self.tokenizer_manager = SimpleNamespace(abort_request=self._abort, server_args=told)
        self.meetings: list[tuple[Any, ...]] = []
        SglangEngine.made.append(self)

    def _abort(self, rid: str = "", abort_all: bool = False) -> None:
        self.aborted.append(rid)

    async def async_generate(
        self,
        prompt: Any = None,
        sampling_params: Any = None,
        input_ids: Any = None,
        return_logprob: Any = False,
        logprob_start_len: Any = None,
        top_logprobs_num: Any = None,
        token_ids_logprob: Any = None,
        lora_path: Any = None,
        stream: bool = False,
        bootstrap_host: Any = None,
        bootstrap_port: Any = None,
        bootstrap_room: Any = None,
        routed_dp_rank: int | None = None,
        disagg_prefill_dp_rank: int | None = None,
        kv_router_hint: Any = None,
        rid: str | None = None,
        priority: int | None = None,
        session_id: str | None = None,
        *,
        cache_salt: Any = None,
    ):
        assert set(sampling_params) <= _SGLANG_SAMPLING, sampling_params
        assert stream
        self.calls.append((input_ids, sampling_params))
        self.ranks.append(routed_dp_rank)
        self.adapters.append(lora_path)
        self.meetings.append((bootstrap_host, bootstrap_port, bootstrap_room))
        top = top_logprobs_num if return_logprob else None
        return self._steps(input_ids, sampling_params["max_new_tokens"], top)

    async def _steps(self, input_ids: list[int], count: int, top: int | None):
        if refused := {8: 400, 9: 503}.get(input_ids[0]):
            reason = {"type": "abort", "message": "planned", "status_code": HTTPStatus(refused)}
            told: dict[str, Any] = {"completion_tokens": 0, "prompt_tokens": 1, "finish_reason": reason}
            yield {"output_ids": [], "meta_info": told}
            return
        for at in range(1, count + 1, 2):
            last = min(at + 1, count)
            tokens = list(range(1 if self.cumulative else at, last + 1))
            told = {
                "completion_tokens": last,
                "prompt_tokens": len(input_ids),
                "cached_tokens": 1,
                "finish_reason": {"type": "length", "length": count} if last == count else None,
            }
            if top is not None:
                told["output_token_logprobs"] = [(-1.0, each, None) for each in tokens]
                told["output_top_logprobs"] = [[(-0.5, 99, None), (-1.0, each, None)][:top] for each in tokens]
            yield {"output_ids": tokens, "meta_info": told}
            if input_ids[0] == 7:
                await asyncio.Event().wait()

    def shutdown(self) -> None:
        self.closed = True


def modules() -> dict[str, ModuleType]:
    """What `sys.modules` gets."""
    found: dict[str, Any] = {}
    for name, values in {
        "vllm": {"TokensPrompt": dict},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": AsyncEngineArgs},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM},
        "vllm.v1.engine.exceptions": {"EngineDeadError": EngineDeadError},
        "vllm.exceptions": {"VLLMValidationError": VLLMValidationError},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.config": {"KVEventsConfig": KVEventsConfig, "KVTransferConfig": KVTransferConfig},
        "vllm.sampling_params": {
            "SamplingParams": SamplingParams,
            "RequestOutputKind": RequestOutputKind,
            "StructuredOutputsParams": StructuredOutputsParams,
        },
        "sglang": {"Engine": SglangEngine},
    }.items():
        found[name] = ModuleType(name)
        vars(found[name]).update(values)
    return found

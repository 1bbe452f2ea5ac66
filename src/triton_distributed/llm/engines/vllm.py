"""vLLM as an engine, by its class `AsyncLLM`."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from triton_distributed.llm.contract.cache import Publish
from triton_distributed.llm.contract.engine import Engine, EngineMetrics
from triton_distributed.llm.contract.output import Candidate, Output, TokenLogprob
from triton_distributed.llm.contract.request import Guide, Request
from triton_distributed.llm.engines.checkpoint import arguments, imported, read_checkpoint
from triton_distributed.llm.engines.options import whole
from triton_distributed.llm.engines.reporting import Reporting
from triton_distributed.llm.engines.running import Running

__all__: list[str] = []

_LOWEST = -9999.0


class VllmEngine(Engine):
    """Serves a model with vLLM, which batches and caches. Token ids go in and come out: vLLM needs no detokenizer.

    Args:
        model: a folder, or a model of the Hugging Face hub.
        name: the name to serve it under; by default `model`.
        slots: the most requests that generate at once (`max_num_seqs`).
        context_tokens: the most tokens of prompt and answer together (`max_model_len`); 0 for the model's own.
        kv_events: `on` reports what the KV cache stores and removes, `off` does not. An endpoint of ZeroMQ, e.g.
            `tcp://*:5557`, lets others hear it too; several data-parallel ranks need one.
        kv_replay: with such an endpoint, another one that answers with earlier events, e.g. `tcp://*:5657`.
        engine_args: further arguments of `AsyncEngineArgs`, as a JSON object.

    Raises:
        InvalidParameter: an option is invalid.
    """

    def __init__(
        self,
        *,
        model: str,
        name: str = "",
        slots: str | int = 256,
        context_tokens: str | int = 0,
        kv_events: str = "on",
        kv_replay: str = "",
        engine_args: str = "",
    ) -> None:
        self.slots = whole("slots", slots, 1)
        self._path, self._name = model, name
        self._arguments: dict[str, Any] = {"model": model, "max_num_seqs": self.slots}
        if context := whole("context_tokens", context_tokens, 0):
            self._arguments["max_model_len"] = context
        self._arguments |= arguments("engine_args", engine_args)
        self._ranks = whole("data_parallel_size", self._arguments.get("data_parallel_size", 1), 1)
        self._reporting = Reporting(kv_events, kv_replay, self._ranks)
        self._engine: Any = None
        self._running = Running()

    def kv_events(self, publish: Publish) -> bool:
        """Report the events of the KV cache. See `Engine.kv_events`."""
        return self._reporting.wanted(publish)

    async def start(self) -> None:
        """Load the model.

        Raises:
            ImportError: vLLM is not installed.
            InvalidParameter: there is no such model.
        """
        arg_utils, async_llm = imported("vllm.engine.arg_utils"), imported("vllm.v1.engine.async_llm")
        files = await asyncio.to_thread(read_checkpoint, self._path)
        if self._reporting.endpoint:
            self._arguments["kv_events_config"] = imported("vllm.config").KVEventsConfig(
                enable_kv_cache_events=True,
                publisher="zmq",
                endpoint=self._reporting.endpoint,
                replay_endpoint=self._reporting.replay or None,
            )
        made = arg_utils.AsyncEngineArgs(**self._arguments)
        self._engine = await asyncio.to_thread(async_llm.AsyncLLM.from_engine_args, made)
        self.model = files.model(
            name=self._name or self._path,
            context_tokens=int(self._engine.model_config.max_model_len),
            guides=("json", "schema", "regex", "choice", "grammar"),
            extra_fields=("cache_salt",),
            kv_block_tokens=int(self._engine.vllm_config.cache_config.block_size or 0),
            engine="vllm",
        )
        self._reporting.start()

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Answer a request. See `Engine.generate`."""
        salted = {"cache_salt": request.cache_salt} if request.cache_salt else {}
        prompt = imported("vllm").TokensPrompt(prompt_token_ids=request.token_ids.tolist(), **salted)
        # vLLM aborts a request whose generator is closed or cancelled.
        with self._running.request(request, imported("vllm.exceptions").VLLMValidationError) as counted:
            rank = request.rank if self._ranks > 1 else None
            stream = self._engine.generate(
                prompt, self._sampling(request), secrets.token_hex(8), data_parallel_rank=rank
            )
            async with aclosing(stream):
                async for step in stream:
                    (one,) = step.outputs
                    counted.generated += len(one.token_ids)
                    output = Output(token_ids=list(one.token_ids))
                    if request.sampling.logprobs is not None and one.logprobs is not None:
                        output.logprobs = _logprobs(one.token_ids, one.logprobs, request.sampling.logprobs)
                    if step.finished:
                        if one.finish_reason not in ("stop", "length"):
                            raise RuntimeError(f"vLLM ended the request with {one.finish_reason!r}")
                        counted.cached = step.num_cached_tokens or 0
                        output.finish_reason, output.stop_reason = one.finish_reason, one.stop_reason
                        output.usage = counted.usage
                    yield output

    def metrics(self) -> EngineMetrics:
        """The requests that are in vLLM now, and the tokens of those that have ended."""
        return self._reporting.added_to(self._running.metrics())

    async def close(self) -> None:
        """End vLLM's processes."""
        await self._reporting.close()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)

    def _sampling(self, request: Request) -> Any:
        params = imported("vllm.sampling_params")
        sampling = request.sampling
        return params.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            logit_bias=sampling.logit_bias,
            logprobs=sampling.logprobs,
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
            stop_token_ids=request.stop_token_ids,
            ignore_eos=request.ignore_eos,
            detokenize=False,  # So stop texts stay outside of vLLM, as the contract has it.
            output_kind=params.RequestOutputKind.DELTA,
            structured_outputs=None if request.guide is None else _structured(params, request.guide),
        )


def _structured(params: Any, guide: Guide) -> Any:
    if guide.json:
        return params.StructuredOutputsParams(json_object=True)
    return params.StructuredOutputsParams(
        json=guide.schema, regex=guide.regex, choice=guide.choice, grammar=guide.grammar
    )


def _logprobs(token_ids: Sequence[int], found: Sequence[Mapping[int, Any]], count: int) -> list[TokenLogprob]:
    made = []
    for token, ranked in zip(token_ids, found, strict=True):
        best = sorted(ranked.items(), key=lambda each: -each[1].logprob)[:count]
        top = [Candidate(each, max(value.logprob, _LOWEST)) for each, value in best]
        made.append(TokenLogprob(token, max(ranked[token].logprob, _LOWEST), None, top))
    return made

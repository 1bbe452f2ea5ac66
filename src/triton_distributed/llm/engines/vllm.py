"""vLLM as an engine, by its class `AsyncLLM`."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.contract.output import Candidate, Output, TokenLogprob
from triton_distributed.llm.contract.request import Guide, Request
from triton_distributed.llm.engines.checkpoint import imported, read_checkpoint
from triton_distributed.llm.engines.in_process import InProcessEngine

__all__: list[str] = []

_LOWEST = -9999.0
_KEEP = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}  # As vLLM's own proxy asks it.


class VllmEngine(InProcessEngine):
    """Serves a model with vLLM, which batches and caches. Token ids go in and come out: vLLM needs no detokenizer.

    `slots` is its `max_num_seqs`, `context_tokens` its `max_model_len`, and `engine_args` has arguments of
    `AsyncEngineArgs`. See `InProcessEngine` for the options.
    """

    RANKS = "data_parallel_size"

    async def start(self) -> None:
        """Load the model.

        Raises:
            ImportError: vLLM is not installed.
            InvalidParameter: there is no such model, or an argument is invalid.
        """
        arg_utils, async_llm = imported("vllm.engine.arg_utils"), imported("vllm.v1.engine.async_llm")
        files = await asyncio.to_thread(read_checkpoint, self._path)
        given: dict[str, Any] = {"model": self._path, "max_num_seqs": self.slots}
        if self._context_tokens:
            given["max_model_len"] = self._context_tokens
        if self._adapters:
            given["enable_lora"] = True
        given |= self._given
        if self._reporting.endpoint:
            given["kv_events_config"] = imported("vllm.config").KVEventsConfig(
                enable_kv_cache_events=True,
                publisher="zmq",
                endpoint=self._reporting.endpoint,
                replay_endpoint=self._reporting.replay or None,
            )
        if self._role != "both":
            transfer = given.get("kv_transfer_config", {})
            if not isinstance(transfer, dict):
                raise InvalidParameter("engine_args", "kv_transfer_config is not a JSON object")
            transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", **transfer}
            given["kv_transfer_config"] = imported("vllm.config").KVTransferConfig(**transfer)
        made = arg_utils.AsyncEngineArgs(**given)
        self._engine = await asyncio.to_thread(async_llm.AsyncLLM.from_engine_args, made)
        self.model = files.model(
            name=self._name,
            adapters=tuple(self._adapters),
            context_tokens=int(self._engine.model_config.max_model_len),
            guides=("json", "schema", "regex", "choice", "grammar"),
            extra_fields=("cache_salt",),
            kv_block_tokens=int(self._engine.vllm_config.cache_config.block_size or 0),
            engine="vllm",
            role=self._role,
        )
        self._reporting.start()

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Answer a request. See `Engine.generate`."""
        salted = {"cache_salt": request.cache_salt} if request.cache_salt else {}
        prompt = imported("vllm").TokensPrompt(prompt_token_ids=request.token_ids.tolist(), **salted)
        # vLLM aborts a request whose generator is closed or cancelled.
        with self._running.request(
            request,
            refusal=imported("vllm.exceptions").VLLMValidationError,
            death=imported("vllm.v1.engine.exceptions").EngineDeadError,
        ) as counted:
            stream = self._engine.generate(
                prompt,
                self._sampling(request),
                secrets.token_hex(8),
                lora_request=self._adapter(request.model),
                data_parallel_rank=request.rank if self._ranks > 1 else None,
            )
            if request.kv_transfer is not None:
                stream = self._fetching(stream)
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
                        if self._role == "prefill" and step.kv_transfer_params:
                            output.kv_transfer = dict(step.kv_transfer_params)
                    yield output

    async def _fetching(self, stream: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        """What a request answers that fetches its blocks first.

        If its caller leaves before the first step, it is aborted after that: to abort it in the transfer can end the
        whole engine of vLLM, as Dynamo's adapter has it.
        """
        first = asyncio.ensure_future(anext(stream))
        try:
            await asyncio.wait([first])
        except asyncio.CancelledError:
            ending = asyncio.create_task(_abort_after(first, stream))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            raise
        try:
            yield first.result()
            async for step in stream:
                yield step
        finally:
            await stream.aclose()

    def _adapter(self, name: str) -> Any:
        path = self._adapters.get(name)
        if path is None:
            return None
        number = list(self._adapters).index(name) + 1  # vLLM numbers adapters from 1.
        return imported("vllm.lora.request").LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)

    def _transfer(self, request: Request) -> dict[str, Any] | None:
        """What vLLM's connector needs to know: keep the blocks for another worker, or fetch those that one keeps."""
        params = _KEEP if self._role == "prefill" else request.kv_transfer
        return None if params is None else {"kv_transfer_params": dict(params)}

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
            extra_args=self._transfer(request),
            structured_outputs=None if request.guide is None else _structured(params, request.guide),
        )


async def _abort_after(first: asyncio.Future[Any], stream: AsyncGenerator[Any, None]) -> None:
    try:
        await asyncio.wait([first])
    finally:
        first.cancel()
        await asyncio.wait([first])
        first.cancelled() or first.exception()  # Nothing else reads it.
        await stream.aclose()


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

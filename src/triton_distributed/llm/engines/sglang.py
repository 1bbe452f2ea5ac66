"""SGLang as an engine, by its class `Engine`."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from triton_distributed.llm.contract.engine import Engine, EngineMetrics
from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.contract.model import Model, ModelCard
from triton_distributed.llm.contract.output import Candidate, Output, TokenLogprob, Usage
from triton_distributed.llm.contract.request import Request
from triton_distributed.llm.engines.checkpoint import arguments, imported, read_checkpoint
from triton_distributed.llm.engines.options import whole

__all__: list[str] = []

_LOWEST = -9999.0


class SglangEngine(Engine):
    """Serves a model with SGLang, which batches and caches. Token ids go in and come out: SGLang gets no tokenizer.

    Without a tokenizer SGLang takes no `min_tokens`.

    Args:
        model: a folder, or a model of the Hugging Face hub.
        name: the name to serve it under; by default `model`.
        slots: the most requests that generate at once (`max_running_requests`).
        context_tokens: the most tokens of prompt and answer together (`context_length`); 0 for the model's own.
        engine_args: further arguments of `sglang.Engine`, as a JSON object.

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
        engine_args: str = "",
    ) -> None:
        self.slots = whole("slots", slots, 1)
        self._path, self._name = model, name
        self._context_tokens = whole("context_tokens", context_tokens, 0)
        self._arguments: dict[str, Any] = {
            "model_path": model,
            "max_running_requests": self.slots,
            "skip_tokenizer_init": True,
        }
        if self._context_tokens:
            self._arguments["context_length"] = self._context_tokens
        self._arguments |= arguments("engine_args", engine_args)
        self._engine: Any = None
        self._active = self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0

    async def start(self) -> None:
        """Load the model. SGLang installs handlers of signals, so it loads on the main thread and holds it meanwhile.

        Raises:
            ImportError: SGLang is not installed.
            InvalidParameter: there is no such model.
        """
        sglang = imported("sglang")
        files = await asyncio.to_thread(read_checkpoint, self._path)
        self._engine = sglang.Engine(**self._arguments)
        self.model = Model(
            card=ModelCard(
                name=self._name or self._path,
                context_tokens=self._context_tokens or files.context_tokens,
                template_values=files.template_values,
                eos_token_ids=files.eos_token_ids,
                chat=files.template is not None,
                max_logprobs=20,
                guides=("json", "schema", "regex", "grammar"),
                continues="greedy",
                engine="sglang",
            ),
            tokenizer=files.tokenizer,
            template=files.template,
        )

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Answer a request. See `Engine.generate`."""
        top = request.sampling.logprobs
        request_id = secrets.token_hex(8)
        seen, ended = 0, False
        self._active += 1
        try:
            stream = await self._engine.async_generate(
                input_ids=request.token_ids.tolist(),
                sampling_params=_sampling(request),
                return_logprob=top is not None,
                top_logprobs_num=top or 0,
                stream=True,
                rid=request_id,
            )
            async for step in stream:
                told = step["meta_info"]
                # An option of SGLang decides whether a step has all tokens so far or only the new ones.
                fresh = told["completion_tokens"] - seen
                seen += fresh
                tokens = list(step["output_ids"][-fresh:]) if fresh else []
                output = Output(token_ids=tokens)
                if top is not None:
                    output.logprobs = _logprobs(told, fresh)
                if told["finish_reason"] is not None:
                    ended = True
                    reason = told["finish_reason"]
                    if reason["type"] not in ("stop", "length"):
                        raise RuntimeError(f"SGLang ended the request: {reason.get('message') or reason['type']}")
                    output.finish_reason, output.stop_reason = reason["type"], _asked(reason.get("matched"), request)
                    output.usage = Usage(told["prompt_tokens"], seen, told.get("cached_tokens") or 0)
                    self._cached_tokens += output.usage.cached_tokens
                yield output
        except ValueError as error:
            raise InvalidParameter("request", str(error)) from error
        finally:
            self._active -= 1
            self._prompt_tokens += len(request.prompt) // 4
            self._generated_tokens += seen
            if not ended:
                self._engine.tokenizer_manager.abort_request(rid=request_id)

    def metrics(self) -> EngineMetrics:
        """The requests that are in SGLang now, and their tokens."""
        return EngineMetrics(
            active=self._active,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
        )

    async def close(self) -> None:
        """End SGLang's processes."""
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)


def _sampling(request: Request) -> dict[str, Any]:
    sampling, guide = request.sampling, request.guide
    if request.min_tokens:
        raise InvalidParameter("min_tokens", "SGLang without a tokenizer does not take it")
    made: dict[str, Any] = {
        "max_new_tokens": request.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": request.stop_token_ids,
        "ignore_eos": request.ignore_eos,
    }
    if sampling.seed is not None:
        made["sampling_seed"] = sampling.seed
    if sampling.logit_bias:
        made["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if guide is not None:
        if guide.choice is not None:
            raise InvalidParameter("guided_choice", "SGLang has no choice of texts; use a regular expression")
        schema = {"type": "object"} if guide.json else guide.schema
        made |= {"json_schema": None if schema is None else json.dumps(schema)}
        made |= {"regex": guide.regex, "ebnf": guide.grammar}
    return made


def _asked(matched: object, request: Request) -> int | None:
    return matched if isinstance(matched, int) and matched in request.stop_token_ids else None


def _logprobs(told: dict[str, Any], count: int) -> list[TokenLogprob] | None:
    """SGLang's triples of log-probability, token id and text."""
    if not count:
        return None
    found: Sequence[Any] = told["output_token_logprobs"][-count:]
    tops = (told.get("output_top_logprobs") or [[]] * count)[-count:]
    return [
        TokenLogprob(each[1], max(each[0], _LOWEST), None, [Candidate(a[1], max(a[0], _LOWEST)) for a in best or ()])
        for each, best in zip(found, tops, strict=True)
    ]

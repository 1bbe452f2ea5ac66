"""SGLang as an engine, by its class `Engine`."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from http import HTTPStatus
from typing import Any

from triton_distributed.llm.contract.cache import Publish
from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.contract.output import Candidate, Output, TokenLogprob
from triton_distributed.llm.contract.request import Request
from triton_distributed.llm.engines.checkpoint import imported, read_checkpoint
from triton_distributed.llm.engines.in_process import InProcessEngine

__all__: list[str] = []

_LOWEST = -9999.0
_MEETING = ("bootstrap_host", "bootstrap_port", "bootstrap_room")


class SglangEngine(InProcessEngine):
    """Serves a model with SGLang, which batches and caches. Token ids go in and come out: SGLang gets no tokenizer.

    Without a tokenizer SGLang takes no `min_tokens` and no guides. If one of its processes dies, SGLang ends this
    process. `slots` is its `max_running_requests`, `context_tokens` its `context_length`, and `engine_args` has
    arguments of `sglang.Engine`. See `InProcessEngine` for the options.
    """

    RANKS = "dp_size"

    def kv_events(self, publish: Publish) -> bool:
        """Report the events of the KV cache, but not with adapters: SGLang's events do not tell a block's adapter."""
        return not self._adapters and super().kv_events(publish)

    async def start(self) -> None:
        """Load the model. SGLang installs handlers of signals, so it loads on the main thread and holds it meanwhile.

        Raises:
            ImportError: SGLang is not installed.
            InvalidParameter: there is no such model.
        """
        sglang = imported("sglang")
        files = await asyncio.to_thread(read_checkpoint, self._path)
        given: dict[str, Any] = {
            "model_path": self._path,
            "max_running_requests": self.slots,
            "skip_tokenizer_init": True,
        }
        if self._context_tokens:
            given["context_length"] = self._context_tokens
        if self._adapters:
            given["lora_paths"] = self._adapters
        given |= self._given
        if self._reporting.endpoint:
            config = {"publisher": "zmq", "endpoint": self._reporting.endpoint}
            if self._reporting.replay:
                config["replay_endpoint"] = self._reporting.replay
            given["kv_events_config"] = json.dumps(config)
        if self._role != "both":
            given["disaggregation_mode"] = self._role
        self._engine = sglang.Engine(**given)
        self.model = files.model(
            name=self._name,
            adapters=tuple(self._adapters),
            context_tokens=self._context_tokens or files.context_tokens,
            kv_block_tokens=int(self._engine.server_args.page_size or 0),
            engine="sglang",
            role=self._role,
            decode_only=self._role != "both",
        )
        self._reporting.start()

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Answer a request. See `Engine.generate`."""
        transfer = self._transfer(request)
        if self._role == "prefill":
            yield Output(kv_transfer=transfer)  # Both workers begin: they meet at the prefill worker's server.
        top = request.sampling.logprobs
        request_id = secrets.token_hex(8)
        ended = False
        with self._running.request(request) as counted:
            stream = await self._engine.async_generate(
                input_ids=request.token_ids.tolist(),
                sampling_params=_sampling(request),
                return_logprob=top is not None,
                top_logprobs_num=top or 0,
                lora_path=request.model if request.model in self._adapters else None,
                stream=True,
                routed_dp_rank=request.rank if self._ranks > 1 else None,
                rid=request_id,
                **transfer,
            )
            try:
                async for step in stream:
                    told = step["meta_info"]
                    # An option of SGLang decides whether a step has all tokens so far or only the new ones.
                    fresh = told["completion_tokens"] - counted.generated
                    counted.generated += fresh
                    output = Output(token_ids=list(step["output_ids"][-fresh:]) if fresh else [])
                    if top is not None:
                        output.logprobs = _logprobs(told, fresh)
                    if (reason := told["finish_reason"]) is not None:
                        ended = True
                        if reason["type"] not in ("stop", "length"):
                            raise _failure(reason)
                        counted.cached = told.get("cached_tokens") or 0
                        output.finish_reason = reason["type"]
                        output.stop_reason = _asked(reason.get("matched"), request)
                        output.usage = counted.usage
                    yield output
            finally:
                if not ended:
                    self._engine.tokenizer_manager.abort_request(rid=request_id)
                await stream.aclose()

    def _transfer(self, request: Request) -> dict[str, Any]:
        """Where the two workers of a request meet: arguments of `async_generate`."""
        if self._role == "decode":
            if request.kv_transfer is None:
                raise RuntimeError("a decode worker of SGLang computes no prompt, and no prefill worker has")
            return {key: request.kv_transfer.get(key) for key in _MEETING}
        if self._role == "both":
            return {}
        told = self._engine.tokenizer_manager.server_args
        host = str(told.dist_init_addr).rpartition(":")[0] if told.dist_init_addr else _address()
        return dict(zip(_MEETING, (host, told.disaggregation_bootstrap_port, secrets.randbits(63)), strict=True))


def _address() -> str:
    """The address of this host for others. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # An address for documents, RFC 5737: no host has it.
        except OSError:
            return "127.0.0.1"
        return str(sock.getsockname()[0])


def _sampling(request: Request) -> dict[str, Any]:
    sampling = request.sampling
    for field, asked in (("min_tokens", request.min_tokens), ("guide", request.guide)):
        if asked:
            raise InvalidParameter(field, "SGLang without a tokenizer does not take it")
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
    return made


def _failure(reason: dict[str, Any]) -> Exception:
    """The error for an answer that SGLang has ended itself."""
    said = str(reason.get("message") or reason["type"])
    if reason.get("status_code") == HTTPStatus.BAD_REQUEST:
        return InvalidParameter("request", said)
    return RuntimeError(f"SGLang ended the request: {said}")


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

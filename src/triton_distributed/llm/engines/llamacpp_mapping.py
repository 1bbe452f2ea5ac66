"""What llama.cpp is asked for a request, and what its chunks say. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.contract.output import Candidate, Output, TokenLogprob
from triton_distributed.llm.contract.request import Guide, Request, Sampling
from triton_distributed.llm.engines.llamacpp_schema import NATIVE

__all__: list[str] = []

GUIDES = ("json", "schema", "choice", "grammar")
UNKNOWN = -9999.0  # OpenAI's value for a log-probability that is too low to tell


def body_of(request: Request, context: int) -> dict[str, Any]:
    """The fields of a completion request to llama.cpp, without the prompt and its limits.

    Args:
        request: what is asked.
        context: tokens of a slot: as many are looked at for penalties.

    Raises:
        InvalidParameter: the engine cannot do what the request asks.
    """
    sampling = request.sampling
    body: dict[str, Any] = {
        "stream": True,
        "cache_prompt": True,
        "return_progress": True,  # a chunk for each part of the prompt: it can be left there
        "timings_per_token": True,  # tells how many tokens a chunk stands for
        "n_probs": max(1, sampling.logprobs or 0),  # at least 1: only then has a chunk the id of its token
        "repeat_last_n": context,
        **_sampling(sampling),
    }
    if request.guide is not None:
        body |= _guide(request.guide)
    return body


def _sampling(sampling: Sampling) -> dict[str, Any]:
    body: dict[str, Any] = {
        # llama.cpp has other defaults, and takes the temperature last.
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repeat_penalty": sampling.repetition_penalty,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed % 0xFFFFFFFF  # 0xFFFFFFFF itself means a random seed
    if sampling.logit_bias:
        body["logit_bias"] = [[token_id, bias] for token_id, bias in sampling.logit_bias.items()]
    return body


def _guide(guide: Guide) -> dict[str, Any]:
    if guide.regex is not None:
        raise InvalidParameter(
            guide.field, "llama.cpp takes no regular expressions; use a grammar", "unsupported_parameter"
        )
    if guide.choice is not None:
        return {"grammar": "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in guide.choice)}
    if guide.grammar is not None:
        if guide.grammar.lstrip().startswith(NATIVE):  # llama.cpp would not report a mistake in it.
            raise InvalidParameter(guide.field, "write the grammar in GBNF", "unsupported_parameter")
        return {"grammar": guide.grammar}
    return {"json_schema": {"type": "object"} if guide.schema is None else guide.schema}


def failure(error: Mapping[str, Any], guide: Guide | None = None) -> Exception:
    """The exception for an error that llama.cpp answers to a request with this guide."""
    message = str(error.get("message", error))
    if error.get("type") == "exceed_context_size_error":
        return InvalidParameter("prompt", message, "context_length_exceeded")
    if error.get("code") == 400:
        return InvalidParameter(guide.field if guide is not None and "grammar" in message else "prompt", message)
    return RuntimeError(f"llama.cpp failed: {message}")


class Tokens:
    """Finds the tokens of llama.cpp's chunks.

    A chunk has whole characters and only the last token's id. The other tokens of a character of several tokens are
    found from its bytes.

    Args:
        token_bytes: the bytes of each token, by its id.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._bytes = token_bytes
        self._ids = {piece: token_id for token_id, piece in enumerate(token_bytes) if piece}
        self._longest = max(map(len, self._ids), default=0)

    def of(self, text: str, last: int, count: int) -> list[int]:
        """The ids of a chunk's tokens.

        Args:
            text: of the chunk.
            last: the id of its last token.
            count: how many tokens it stands for.
        """
        if count <= 1:
            return [last]
        missing = text.encode().removesuffix(self._bytes[last])
        found = self._split(missing, count - 1) or self._split(missing, None)
        if found is None:
            raise RuntimeError(f"llama.cpp's chunk {text!r} cannot be divided into tokens")
        return [*found, last]

    def _split(self, piece: bytes, count: int | None) -> list[int] | None:
        """Divide bytes into tokens, into `count` of them if it is given; the longest first."""
        if not piece or count == 0:
            return [] if not piece and not count else None
        for end in range(min(len(piece), self._longest), 0, -1):
            if (token_id := self._ids.get(piece[:end])) is not None:
                rest = self._split(piece[end:], None if count is None else count - 1)
                if rest is not None:
                    return [token_id, *rest]
        return None


def logprobs_of(token_ids: Sequence[int], entry: Mapping[str, Any], count: int) -> list[TokenLogprob]:
    """The log-probabilities of a chunk's tokens. llama.cpp tells only that of the last one: the others get -9999.

    Args:
        entry: of the last token, as llama.cpp gives it.
        count: how many alternatives are asked for.
    """
    top = [Candidate(each["id"], _logprob(each)) for each in entry.get("top_logprobs", ())[:count]]
    unknown = [TokenLogprob(token_id, UNKNOWN) for token_id in token_ids[:-1]]
    return [*unknown, TokenLogprob(token_ids[-1], _logprob(entry), top=top)]


def _logprob(entry: Mapping[str, Any]) -> float:
    found = entry.get("logprob")
    return max(UNKNOWN, found) if isinstance(found, (int, float)) and math.isfinite(found) else UNKNOWN


def joined(outputs: Sequence[Output]) -> Output:
    """One output for several that came together; the last one may be the end."""
    if len(outputs) == 1:
        return outputs[0]
    last = outputs[-1]
    texts = [output.text for output in outputs if output.text is not None]
    logprobs = [each for output in outputs for each in output.logprobs or ()]
    return Output(
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        text="".join(texts) if texts else None,
        logprobs=logprobs or None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        usage=last.usage,
    )

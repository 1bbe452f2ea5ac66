"""Chooses the next token of an answer from the model's logits, with transformers' own filters of probabilities."""

from __future__ import annotations

from typing import Any

from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.contract.output import Candidate, TokenLogprob
from triton_distributed.llm.contract.request import Request

__all__: list[str] = []

_LOWEST = -9999.0  # OpenAI's value for a log-probability that is too low to tell
_NEVER = float("-inf")


class Choice:
    """The choice of one answer's tokens.

    Args:
        torch, transformers: the modules.
        request: its options of sampling are used.
        prompt: the token ids, a tensor of shape [tokens] on the model's device.
        ends: the tokens that end the answer. None of them is chosen among the first `min_tokens`.
        vocabulary: the number of logits.

    Raises:
        InvalidParameter: an option is invalid.
    """

    def __init__(
        self, torch: Any, transformers: Any, request: Request, prompt: Any, ends: frozenset[int], vocabulary: int
    ) -> None:
        sampling, device = request.sampling, prompt.device
        self._torch, self._sampling, self._min_tokens = torch, sampling, request.min_tokens
        self._ends = torch.tensor([each for each in ends if each < vocabulary], dtype=torch.long, device=device)
        self._chosen = 0
        self._bias = self._seen = self._counts = self._generator = None
        if sampling.logit_bias:
            if not all(0 <= each < vocabulary for each in sampling.logit_bias):
                raise InvalidParameter("logit_bias", f"a token id is not below {vocabulary}")
            self._bias = torch.zeros(vocabulary, device=device)
            self._bias[list(sampling.logit_bias)] = torch.tensor(list(sampling.logit_bias.values()), device=device)
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self._seen[prompt] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            answer = prompt[len(prompt) - request.continued :]
            self._counts = torch.bincount(answer, minlength=vocabulary).float()
        self._filters = transformers.LogitsProcessorList()
        if not sampling.greedy:
            self._filters.append(transformers.TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self._filters.append(transformers.TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._filters.append(transformers.TopPLogitsWarper(sampling.top_p))
            if sampling.min_p:
                self._filters.append(transformers.MinPLogitsWarper(sampling.min_p))
            if sampling.seed is not None:
                self._generator = torch.Generator(device).manual_seed(sampling.seed % 2**63)

    def choose(self, logits: Any, best: int) -> tuple[int, TokenLogprob | None]:
        """Choose the next token.

        Args:
            logits: of the model, a tensor of shape [vocabulary].
            best: the token with the highest logit.

        Returns:
            the token, and its log-probability as the model gives it, before all options, if the request asks for it.

        Raises:
            RuntimeError: the logits are not numbers.
        """
        torch, sampling = self._torch, self._sampling
        scores = plain = logits.float()
        if self._bias is not None:
            scores = scores + self._bias
        if self._seen is not None:
            penalty = sampling.repetition_penalty
            scores = torch.where(self._seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
        if self._counts is not None:
            scores = scores - self._counts * sampling.frequency_penalty - (self._counts > 0) * sampling.presence_penalty
        if self._chosen < self._min_tokens:
            scores = scores.index_fill(0, self._ends, _NEVER)
        if not sampling.greedy:
            weights = self._filters(None, scores[None])[0].softmax(-1)
            token = int(torch.multinomial(weights, 1, generator=self._generator))
        else:
            token = best if scores is plain else int(scores.argmax())
        self._chosen += 1
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        return token, None if sampling.logprobs is None else self._told(logits, token, sampling.logprobs)

    def _told(self, logits: Any, token: int, count: int) -> TokenLogprob:
        found = logits.float().log_softmax(-1)
        top = found.topk(min(count, len(found)))
        best = [
            Candidate(each, max(value, _LOWEST))
            for each, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        return TokenLogprob(token, max(float(found[token]), _LOWEST), None, best)

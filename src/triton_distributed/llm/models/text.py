"""The text of an answer: tokens to text, stop texts, log-probabilities and usage. Pure, and without a worker."""

from __future__ import annotations

from array import array
from collections.abc import Collection

from triton_distributed.llm.contract.errors import LLMError
from triton_distributed.llm.contract.model import ModelCard
from triton_distributed.llm.contract.output import Candidate, FinishReason, Output, TokenLogprob, Usage
from triton_distributed.llm.contract.request import Request
from triton_distributed.llm.models.delta import Delta, TokenText
from triton_distributed.llm.tokens.reader import TextReader
from triton_distributed.llm.tokens.tokenizer import Tokenizer


class AnswerText:
    """Turns the outputs of one answer into deltas. It outlives workers.

    Args:
        card: the model.
        request: the request as it was sent first.
        prompt_tokens: tokens of the prompt; 0 if only the engine knows.
        tokenizer: None for an engine that makes text itself.

    Attributes:
        engine_text: the engine has made a part of the answer itself.
    """

    __slots__ = (
        "_cached", "_card", "_end_ids", "_held_ids", "_held_logprobs", "_lost_tokens", "_made", "_prompt_tokens",
        "_request", "_simple", "_tokenizer", "_total", "_usage", "engine_text",
    )  # fmt: skip

    def __init__(
        self,
        card: ModelCard,
        request: Request,
        prompt_tokens: int,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._card = card
        self._request = request
        self._prompt_tokens = prompt_tokens
        self._tokenizer = tokenizer
        self._made: TextReader | None = None  # A whole answer in one output needs none.
        self._simple = tokenizer is not None and not request.stop
        ends = () if request.ignore_eos else card.eos_token_ids
        self._end_ids: Collection[int] = {*ends, *request.stop_token_ids} if request.stop_token_ids else ends
        self._total = 0  # Tokens of the whole answer.
        self._lost_tokens = 0  # Those of workers before the present one.
        self._usage: Usage | None = None  # As the present worker reports it.
        self._cached: int | None = None  # As the first worker of an answer reported it that went on at another one.
        self._held_ids: list[int] = []  # Tokens without text yet.
        self._held_logprobs: list[TokenText] = []
        self.engine_text = False

    def ends(self, tokens: array[int]) -> bool:
        """Whether the last of the answer's tokens ends it."""
        return bool(tokens) and len(tokens) > self._request.min_tokens and tokens[-1] in self._end_ids

    def new_worker(self) -> None:
        """Another worker goes on after the tokens so far."""
        if self._total and self._cached is None:
            # Later workers compute the prompt again for the caller's one answer: what they find does not count.
            self._cached = 0 if self._usage is None else self._usage.cached_tokens
        self._lost_tokens, self._usage = self._total, None

    def computed_elsewhere(self, cached_tokens: int | None) -> None:
        """Another worker has computed the prompt, of which so many tokens were cached there."""
        self._cached = cached_tokens or 0

    def taken(self, output: Output) -> Delta | None:
        """Turn an output into a delta; None if it has nothing for the caller yet.

        Raises:
            LLMError: the output breaks the engine contract.
        """
        ids, finish = output.token_ids, output.finish_reason
        if output.usage is not None:
            self._usage = output.usage
        own = output.text is not None or output.reasoning is not None or output.tool_calls is not None
        if own:
            self.engine_text = True
        if self._simple and not own and output.logprobs is None and not self._held_ids:  # Most outputs.
            made = self._made
            if finish is None:
                self._total += len(ids)
                text = (made or self._reader).push(ids)
                if text:
                    return Delta(text, ids)
                self._held_ids += ids
                return None
            if made is None and self._request.sampling.logprobs is None:
                return self._whole(ids, finish, output.stop_reason)
        return self._taken(output, own)

    def _whole(self, ids: list[int], finish: FinishReason, stop_reason: int | str | None) -> Delta:
        """The delta of an answer that is one output."""
        shown = ids
        if finish == "stop" and ids and ids[-1] in self._end_ids:
            shown = ids[:-1]
            if stop_reason is None and ids[-1] in self._request.stop_token_ids:
                stop_reason = ids[-1]
        self._total += len(ids)
        assert self._tokenizer is not None
        return Delta(self._tokenizer.text(shown), ids, None, finish, stop_reason, None, None, self._used())

    @property
    def _reader(self) -> TextReader:
        """Makes text of the tokens; it exists from its first use on."""
        reader = self._made
        if reader is None:
            request = self._request
            reader = self._made = TextReader(self._tokenizer, stop=request.stop, min_tokens=request.min_tokens)
        return reader

    def _taken(self, output: Output, own: bool) -> Delta | None:
        ids, finish, stop_reason = output.token_ids, output.finish_reason, output.stop_reason
        reader, shown = self._reader, ids
        if finish == "stop" and ids and ids[-1] in self._end_ids:
            shown = ids[:-1]
            if stop_reason is None and ids[-1] in self._request.stop_token_ids:
                stop_reason = ids[-1]
        if own:
            text = reader.push_text(output.text or "", len(ids))
        elif not shown:
            text = ""
        elif self._tokenizer is None:
            raise LLMError(f"the engine of {self._card.name!r} answers with token ids, and the model has no tokenizer")
        else:
            before = reader.tokens
            text = reader.push(shown)
            if reader.stopped_by is not None:  # The answer ends with the token that completed the stop text.
                ids = shown = shown[: reader.tokens - before]
        self._total += len(ids)
        if finish is not None:
            text += reader.finish()
        if reader.stopped_by is not None:
            finish, stop_reason = "stop", reader.stopped_by
        self._held_ids += ids
        if output.logprobs is not None:
            self._held_logprobs += map(self._resolved, output.logprobs[: len(shown)] if ids else output.logprobs)
        if not text and finish is None and output.reasoning is None and output.tool_calls is None:
            return None
        return self._delta(text, finish, stop_reason, output)

    def finished(self, reason: FinishReason) -> Delta:
        """The last delta of an answer whose tokens are complete, although its last output was lost."""
        delta = self._taken(Output(finish_reason=reason), False)
        assert delta is not None
        return delta

    def _delta(self, text: str, finish: FinishReason | None, stop_reason: int | str | None, output: Output) -> Delta:
        ids, self._held_ids = self._held_ids, []
        logprobs: list[TokenText] | None = None
        if self._request.sampling.logprobs is not None:
            logprobs, self._held_logprobs = self._held_logprobs, []
        usage = None if finish is None else self._used()
        return Delta(text, ids, logprobs, finish, stop_reason, output.reasoning, output.tool_calls, usage)

    def _used(self) -> Usage:
        """The usage of the whole answer."""
        told = self._usage
        completion = self._total
        # An engine that knows no stop texts also counts the tokens that it made after one.
        made = self._made
        exact = made is not None and made.stopped_by is not None and not self.engine_text
        if told is not None and told.completion_tokens and not exact:
            completion = max(completion, self._lost_tokens + told.completion_tokens)
        prompt = self._prompt_tokens or (told.prompt_tokens if told is not None else 0)
        cached = self._cached
        if cached is None:
            cached = 0 if told is None else told.cached_tokens
        return Usage(prompt, completion, cached)

    def _resolved(self, logprob: TokenLogprob) -> TokenText:
        return self._named(logprob, [self._named(each, []) for each in logprob.top])

    def _named(self, given: TokenLogprob | Candidate, top: list[TokenText]) -> TokenText:
        if given.text is not None:
            text, content = given.text, given.text.encode(errors="replace")
        elif self._tokenizer is not None and given.token_id >= 0:
            text, content = self._tokenizer.token_text(given.token_id), self._tokenizer.token_bytes(given.token_id)
        else:
            text, content = "", b""
        return TokenText(given.token_id, text, content, given.logprob, top)

"""The prompts of a model: templates and tokenizing, short texts at once and long ones in threads."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import msgspec

from triton_distributed.config import set_default
from triton_distributed.errors import Overloaded
from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.contract.model import ModelCard
from triton_distributed.llm.contract.request import packed
from triton_distributed.llm.tokens.template import ChatTemplate, TemplateTimeout
from triton_distributed.llm.tokens.tokenizer import Tokenizer, load_tokenizer

T = TypeVar("T")

_INLINE_CHARACTERS = 4_000
"""A shorter text is tokenized on the loop: 0.3 ms. A hop to a thread costs more than most of them."""

_INLINE_PASS = 16_000
"""Characters that are tokenized on the loop in one pass of it: 1.2 ms. Requests with many inputs have more."""

_INLINE_LIMIT_S = 0.01
"""The CPU time of a template on the loop. One that needs more is rendered again in a thread."""

_THREAD_LIMIT_S = 1.0
"""The CPU time of a template in a thread."""

_SLOW = 3
"""A template that needed more so often in a row is rendered in threads from then on. A single time proves nothing: a
pass of the garbage collector counts, too."""


LONGEST_WAIT_S = 10.0
"""Seconds that a long prompt may have to wait for a thread. Its text is in memory meanwhile."""


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt in the form that the model's engine takes.

    Attributes:
        ids: packed token ids, as in `Request.prompt`; empty if the prompt has another form.
        text: for a model without a tokenizer; None if the prompt has another form.
        messages: for a model with neither tokenizer nor template; None if the prompt has another form.
        tokens: their number; 0 if it is not known.
    """

    ids: bytes = b""
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tokens: int = 0


class TokenizerThreads:
    """The threads that make long prompts, shared by all models of a program. They start with the first long prompt.

    Args:
        longest_wait_s: seconds that a prompt may have to wait for a thread; one that would wait longer is refused.
    """

    def __init__(self, longest_wait_s: float = LONGEST_WAIT_S) -> None:
        self._longest_wait_s = longest_wait_s
        self._pool: ThreadPoolExecutor | None = None
        self._size = _threads()
        self._prompts: set[Future[Any]] = set()  # that wait or are made, whether their callers have left or not
        self._pace_s = 0.0  # what a prompt took of late, in its thread
        self._closed = False
        self._inline = 0  # characters in this pass of the loop

    def inline(self, characters: int) -> bool:
        """Whether a text of this length may be tokenized on the loop now. If so, it is counted."""
        if characters >= _INLINE_CHARACTERS or self._inline + characters > _INLINE_PASS:
            return False
        if not self._inline:
            asyncio.get_running_loop().call_soon(self._next_pass)
        self._inline += characters or 1
        return True

    def _next_pass(self) -> None:
        self._inline = 0

    async def prompt(self, model: str, make: Callable[[], T]) -> T:
        """Make a prompt in a thread. If the caller is cancelled before it begins, it does not begin.

        Args:
            model: the name of the model, for the error.
            make: makes the prompt.

        Raises:
            Overloaded: the prompts that wait already would need more than `longest_wait_s`.
            RuntimeError: the threads are closed.
        """
        wait_s = len(self._prompts) // self._size * self._pace_s
        if wait_s > self._longest_wait_s:
            reason = f"long prompts wait for a thread: {len(self._prompts)}"
            raise Overloaded(f"the prompts of model {model}", 0, reason, retry_after_s=wait_s)

        def timed() -> T:
            begin = time.perf_counter()
            try:
                return make()
            finally:
                self._pace_s += (time.perf_counter() - begin - self._pace_s) / 8

        future = self._begin(timed)
        self._prompts.add(future)
        future.add_done_callback(self._prompts.discard)
        return await asyncio.wrap_future(future)

    async def run(self, work: Callable[[], T]) -> T:
        """Run work in a thread. If the caller is cancelled before it begins, it does not begin.

        Raises:
            RuntimeError: the threads are closed.
        """
        return await asyncio.wrap_future(self._begin(work))

    def _begin(self, work: Callable[[], T]) -> Future[T]:
        if self._closed:
            raise RuntimeError("the threads of the tokenizer are closed")
        if self._pool is None:
            # By default fastokens works at each text with a thread for each processor: none is left to the loop.
            set_default("FASTOKENS_BPE_THREADS", "1")
            self._pool = ThreadPoolExecutor(self._size, "trd-tokenizer")
        return self._pool.submit(work)

    def close(self) -> None:
        """End the threads, after the work that they have begun. Work that waits is cancelled."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _threads() -> int:
    """How many threads: a processor stays free for the event loop, if there are several."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, usable - 1))


class Prompts:
    """Makes the prompts of one model.

    Args:
        card: the model's.
        tokenizer: of the model; None if its engine takes text.
        template: of the model; None if it has none.
        threads: for long prompts.

    Attributes:
        tokenizer: as given.
    """

    def __init__(
        self, card: ModelCard, tokenizer: Tokenizer | None, template: ChatTemplate | None, threads: TokenizerThreads
    ) -> None:
        self.tokenizer = tokenizer
        self._card, self._template, self._threads = card, template, threads
        self._slow = 0  # How often in a row the template needed too much time on the loop.

    @classmethod
    async def load(
        cls,
        card: ModelCard,
        tokenizer: bytes | Literal["bytes"] | None,
        template: str | None,
        threads: TokenizerThreads,
    ) -> Prompts:
        """Load tokenizer and template in a thread.

        Args:
            card: the model's.
            tokenizer, template: their contents, as in `Model`.
            threads: for loading, and for long prompts.

        Raises:
            LLMError: one of the contents is invalid.
            ImportError: a library is missing.
        """

        def loaded() -> Prompts:
            return cls(
                card,
                None if tokenizer is None else load_tokenizer(tokenizer),
                None if template is None else ChatTemplate(template, card.template_values),
                threads,
            )

        return await threads.run(loaded)

    async def chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        template_values: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """Make the prompt of a chat.

        Args:
            messages: as the OpenAI API defines them.
            tools: as the OpenAI API defines them; None for no tools.
            template_values: further variables of the template.
            add_generation_prompt: end with the beginning of the assistant's message.

        Raises:
            InvalidParameter: the messages are invalid, the template refuses them, or the prompt leaves no room for an
                answer in the model's context: then `code` is `context_length_exceeded`.
            Overloaded: too many long prompts wait to be tokenized.
        """
        if not messages:
            raise InvalidParameter("messages", "there is no message")
        template = self._template
        if template is None:
            if self.tokenizer is not None:
                raise InvalidParameter("messages", f"the model {self._card.name!r} has no chat template")
            return Prompt(messages=messages)

        if self._slow < _SLOW and _characters_left((messages, tools, template_values), _INLINE_CHARACTERS) > 0:
            try:
                text = template.render(
                    messages,
                    tools=tools,
                    values=template_values,
                    add_generation_prompt=add_generation_prompt,
                    limit_s=_INLINE_LIMIT_S,
                )
            except TemplateTimeout:
                self._slow += 1
            else:
                self._slow = 0
                if self.tokenizer is None or self._threads.inline(len(text)):
                    return self._made("messages", text, add_special_tokens=False)
                return await self._threads.prompt(
                    self._card.name, lambda: self._made("messages", text, add_special_tokens=False)
                )

        def made() -> Prompt:
            text = template.render(
                messages,
                tools=tools,
                values=template_values,
                add_generation_prompt=add_generation_prompt,
                limit_s=_THREAD_LIMIT_S,
            )
            return self._made("messages", text, add_special_tokens=False)

        return await self._threads.prompt(self._card.name, made)

    async def text(self, text: str, *, param: str = "prompt") -> Prompt:
        """Make the prompt of a text.

        Args:
            text: the text.
            param: the field of the request that it comes from, for errors.

        Raises:
            InvalidParameter: it is not valid Unicode, or leaves no room in the context.
            Overloaded: too many long prompts wait to be tokenized.
        """
        return await self._tokenized(param, text, add_special_tokens=True)

    def ids(self, token_ids: Sequence[int], *, param: str = "prompt") -> Prompt:
        """Make the prompt of token ids.

        Args:
            token_ids: the ids.
            param: the field of the request that they come from, for errors.

        Raises:
            InvalidParameter: the model takes text, an id is not one of its vocabulary, or they leave no room in the
                context.
        """
        if self.tokenizer is None:
            raise InvalidParameter(param, f"the model {self._card.name!r} takes text, not token ids")
        self._check_length(param, len(token_ids))  # First: the rest takes time for each id.
        vocabulary = self.tokenizer.vocabulary
        try:
            ids = packed(token_ids)
        except (OverflowError, TypeError):
            raise InvalidParameter(param, "a token id is not a whole number from 0 to 4294967295") from None
        if vocabulary and ids and (most := max(token_ids)) >= vocabulary:
            raise InvalidParameter(param, f"token id {most} is not in the vocabulary, which has {vocabulary} tokens")
        return Prompt(ids=ids, tokens=len(token_ids))

    async def _tokenized(self, param: str, text: str, *, add_special_tokens: bool) -> Prompt:
        if self.tokenizer is None or self._threads.inline(len(text)):
            return self._made(param, text, add_special_tokens=add_special_tokens)
        return await self._threads.prompt(
            self._card.name, lambda: self._made(param, text, add_special_tokens=add_special_tokens)
        )

    def _made(self, param: str, text: str, *, add_special_tokens: bool) -> Prompt:
        try:
            if self.tokenizer is None:
                text.encode()
                return Prompt(text=text)  # It may be empty: how the engine takes that is not known here.
            ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except UnicodeEncodeError as error:
            reason = f"character {error.start} is half of a surrogate pair"
            raise InvalidParameter(param, reason) from None
        self._check_length(param, len(ids) // 4)
        return Prompt(ids=ids, tokens=len(ids) // 4)

    def _check_length(self, param: str, tokens: int) -> None:
        if not tokens:
            raise InvalidParameter(param, "the prompt has no tokens")
        context = self._card.context_tokens
        if context and tokens >= context:
            raise InvalidParameter(
                param,
                f"the prompt has {tokens} tokens, and the model's context of {context} tokens has to hold the "
                "answer too",
                "context_length_exceeded",
            )


def _characters_left(value: Any, left: int) -> int:
    """What is left of a number of characters after those of a value; 0 or less if it is larger."""
    if isinstance(value, str):
        return left - len(value)
    left -= 8
    if not isinstance(value, (list, tuple)):
        if not isinstance(value, (dict, Mapping)):
            return left
        value = (*value, *value.values())
    for each in value:
        if type(each) is str:
            left -= len(each)
        elif each:
            left = _characters_left(each, left)
        elif each is not None:
            left -= 8
        if left <= 0:
            break
    return left

"""Answers as server-sent events: deltas to the bytes of chunks. Pure.

A stream of the OpenAI API has, for each choice, a first chunk with the role (in chats), chunks with text, and one with
the reason of the end and nothing else. Then follow a chunk with the usage, if it was asked for, and `[DONE]`.
"""

from __future__ import annotations

from typing import Any

from triton_distributed.llm.contract.output import Usage
from triton_distributed.llm.http.pieces import chat_logprobs, completion_logprobs, to_json, usage_json
from triton_distributed.llm.models.delta import Delta

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def failed(error_json: bytes) -> bytes:
    """Return the chunk that clients raise on."""
    return b"data: %s\n\n" % error_json


class Chunks:
    """The chunks of one request; subclasses know the two kinds.

    Args:
        head: the fields of every chunk, from `{` to the comma after the last one.
        choices: how many choices the answer has.
        include_usage: whether the last chunk has the usage; all others then have null.
        running_usage: whether every chunk has the usage so far.
        token_ids: whether the chunks have the tokens' ids.
        prompt_tokens: of the prompts.
        echoes: the text of each choice's prompt, which comes first; None if it is not asked for. Only completions have
            it.
    """

    def __init__(
        self,
        head: bytes,
        *,
        choices: int = 1,
        include_usage: bool = False,
        running_usage: bool = False,
        token_ids: bool = False,
        logprobs: bool = False,
        prompt_tokens: int = 0,
        echoes: list[str] | None = None,
    ) -> None:
        self._start = b"data: " + head + b'"choices":['
        self._end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._include_usage = include_usage
        self._running = Usage(prompt_tokens=prompt_tokens) if running_usage else None
        self._token_ids, self._logprobs = token_ids, logprobs
        self._choices = choices
        self._plain = not (running_usage or token_ids or logprobs)
        self._echoes = echoes
        self._offsets = [len(each) for each in echoes] if echoes else [0] * choices
        # What stands around the text of a plain chunk, for each choice.
        self._around: list[tuple[bytes, bytes]] = [self._frame(index) for index in range(choices)]

    def opening(self) -> bytes:
        """Return what comes before the first delta."""
        return b""

    def delta(self, index: int, delta: Delta) -> bytes:
        """Return the chunks of a delta: none, one or two."""
        if self._plain and delta.finish_reason is None and delta.reasoning is None and delta.tool_calls is None:
            if not delta.text:
                return b""
            before, after = self._around[index]
            return before + to_json(delta.text) + after
        if self._running is not None:
            self._count(delta)
        found = b""
        if self._shows(delta):
            found = self._text(index, delta)
        if delta.finish_reason is not None:
            found += self._finish(index, delta)
        return found

    def closing(self, usage: Usage) -> bytes:
        """Return what comes after the last delta."""
        if not self._include_usage:
            return DONE
        return b'%s],"usage":%s}\n\n%s' % (self._start, usage_json(usage), DONE)

    def _shows(self, delta: Delta) -> bool:
        return bool(delta.text or (self._logprobs and delta.logprobs) or (self._token_ids and delta.token_ids))

    def _count(self, delta: Delta) -> None:
        running = self._running
        assert running is not None
        self._running = Usage(
            prompt_tokens=running.prompt_tokens,
            completion_tokens=running.completion_tokens + len(delta.token_ids),
            cached_tokens=running.cached_tokens,
        )
        self._end = b'],"usage":%s}\n\n' % usage_json(self._running)

    def _ids(self, delta: Delta) -> bytes:
        return b',"token_ids":' + to_json(delta.token_ids) if self._token_ids else b""

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        raise NotImplementedError

    def _text(self, index: int, delta: Delta) -> bytes:
        raise NotImplementedError

    def _finish(self, index: int, delta: Delta) -> bytes:
        raise NotImplementedError


class ChatChunks(Chunks):
    """The chunks of a chat."""

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        after = b'},"logprobs":null,"finish_reason":null}' + self._end
        return b'%s{"index":%d,"delta":{"content":' % (self._start, index), after

    def opening(self) -> bytes:
        """Return the chunks with the role, in the order of the choices."""
        return b"".join(
            b'%s{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}%s'
            % (self._start, index, self._end)
            for index in range(self._choices)
        )

    def _shows(self, delta: Delta) -> bool:
        return bool(delta.reasoning or delta.tool_calls) or super()._shows(delta)

    def _text(self, index: int, delta: Delta) -> bytes:
        if delta.reasoning or delta.tool_calls:
            content = to_json(chat_delta(delta))
        else:
            content = b'{"content":%s}' % to_json(delta.text)
        logprobs = b"null"
        if self._logprobs and delta.logprobs:
            logprobs = to_json({"content": chat_logprobs(delta.logprobs), "refusal": None})
        return b'%s{"index":%d,"delta":%s,"logprobs":%s,"finish_reason":null%s}%s' % (
            self._start,
            index,
            content,
            logprobs,
            self._ids(delta),
            self._end,
        )

    def _finish(self, index: int, delta: Delta) -> bytes:
        return b'%s{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%s","stop_reason":%s}%s' % (
            self._start,
            index,
            str(delta.finish_reason).encode(),
            to_json(delta.stop_reason),
            self._end,
        )


def chat_delta(delta: Delta) -> dict[str, Any]:
    """Return the `delta` of a chunk of a chat. Reasoning has both of its names, since clients read either."""
    found: dict[str, Any] = {}
    if delta.text:
        found["content"] = delta.text
    if delta.reasoning:
        found["reasoning"] = found["reasoning_content"] = delta.reasoning
    if delta.tool_calls:
        found["tool_calls"] = delta.tool_calls
    return found


class CompletionChunks(Chunks):
    """The chunks of a completion."""

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        return b'%s{"index":%d,"text":' % (self._start, index), b',"logprobs":null,"finish_reason":null}' + self._end

    def opening(self) -> bytes:
        """Return the chunks with the prompts."""
        return b"".join(self._chunk(index, text) for index, text in enumerate(self._echoes or ()))

    def _text(self, index: int, delta: Delta) -> bytes:
        logprobs = b"null"
        if self._logprobs and delta.logprobs:
            found, self._offsets[index] = completion_logprobs(delta.logprobs, self._offsets[index])
            logprobs = to_json(found)
        return self._chunk(index, delta.text, logprobs, self._ids(delta))

    def _chunk(self, index: int, text: str, logprobs: bytes = b"null", ids: bytes = b"") -> bytes:
        return b'%s{"index":%d,"text":%s,"logprobs":%s,"finish_reason":null%s}%s' % (
            self._start,
            index,
            to_json(text),
            logprobs,
            ids,
            self._end,
        )

    def _finish(self, index: int, delta: Delta) -> bytes:
        return b'%s{"index":%d,"text":"","logprobs":null,"finish_reason":"%s","stop_reason":%s}%s' % (
            self._start,
            index,
            str(delta.finish_reason).encode(),
            to_json(delta.stop_reason),
            self._end,
        )

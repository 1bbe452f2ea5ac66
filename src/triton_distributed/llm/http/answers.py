"""Answers as a whole: deltas are folded to the body of an answer that is not streamed. Pure."""

from __future__ import annotations

from typing import Any

from triton_distributed.llm.contract.output import Usage
from triton_distributed.llm.http.pieces import chat_logprobs, completion_logprobs, to_json, usage_json
from triton_distributed.llm.models.delta import Delta, TokenText


class Folded:
    """One choice, made of its deltas.

    Args:
        logprobs: whether the answer has log-probabilities.
        token_ids: whether it has the tokens' ids.
        echo: the text that comes before it.
    """

    def __init__(self, logprobs: bool = False, token_ids: bool = False, echo: str = "") -> None:
        self._echo = echo
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._logprobs: list[TokenText] | None = [] if logprobs else None
        self._token_ids: list[int] | None = [] if token_ids else None
        self._tool_calls: dict[int, dict[str, Any]] = {}
        self._finish_reason: str | None = None
        self._stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        """Take the next delta."""
        if delta.text:
            self._texts.append(delta.text)
        if delta.reasoning:
            self._reasoning.append(delta.reasoning)
        if self._logprobs is not None and delta.logprobs:
            self._logprobs += delta.logprobs
        if self._token_ids is not None:
            self._token_ids += delta.token_ids
        for part in delta.tool_calls or ():
            _merge(self._tool_calls.setdefault(part.get("index", 0), {}), part)
        if delta.finish_reason is not None:
            self._finish_reason, self._stop_reason = delta.finish_reason, delta.stop_reason

    def chat(self, index: int) -> bytes:
        """Return the choice of a chat."""
        text = "".join(self._texts)
        calls = self._tool_calls
        if self._logprobs is None and not calls and not self._reasoning:
            message = b'{"role":"assistant","content":%s,"refusal":null}' % to_json(text)
            logprobs = b"null"
        else:
            found: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
            if self._reasoning:
                found["reasoning"] = found["reasoning_content"] = "".join(self._reasoning)
            if calls:
                found["tool_calls"] = [
                    {key: value for key, value in calls[number].items() if key != "index"} for number in sorted(calls)
                ]
            message, logprobs = to_json(found), b"null"
            if self._logprobs is not None:
                logprobs = to_json({"content": chat_logprobs(self._logprobs), "refusal": None})
        return b'{"index":%d,"message":%s,"logprobs":%s,%s}' % (index, message, logprobs, self._end())

    def completion(self, index: int) -> bytes:
        """Return the choice of a completion."""
        logprobs = b"null"
        if self._logprobs is not None:
            logprobs = to_json(completion_logprobs(self._logprobs, len(self._echo))[0])
        text = self._echo + "".join(self._texts)
        return b'{"index":%d,"text":%s,"logprobs":%s,%s}' % (index, to_json(text), logprobs, self._end())

    def _end(self) -> bytes:
        end = b'"finish_reason":"%s","stop_reason":%s' % (
            str(self._finish_reason).encode(),
            to_json(self._stop_reason),
        )
        return end if self._token_ids is None else end + b',"token_ids":' + to_json(self._token_ids)


def body(head: bytes, choices: list[bytes], usage: Usage) -> bytes:
    """Return the body of an answer.

    Args:
        head: the fields before the choices, from `{` to the comma after the last one.
    """
    return b'%s"choices":[%s],"usage":%s}' % (head, b",".join(choices), usage_json(usage))


def _merge(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Add a part of a tool call, as clients do: texts are joined, except for those that name something."""
    for key, value in part.items():
        old = whole.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            _merge(old, value)
        elif isinstance(value, str) and isinstance(old, str) and key not in ("id", "type"):
            whole[key] = old + value
        elif value is not None:
            whole[key] = dict(value) if isinstance(value, dict) else value

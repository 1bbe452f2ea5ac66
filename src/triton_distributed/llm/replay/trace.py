"""Request traces in the format of Mooncake: arrival times, lengths, and which blocks of the prompts are equal. Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from triton_distributed.llm.contract.errors import InvalidParameter

BLOCK_TOKENS = 512
"""Tokens in a block of Mooncake's own traces."""

_DIGITS = 8
"""Hexadecimal digits of a block's number in its tokens; a block has at least as many tokens."""


class _Line(msgspec.Struct, frozen=True):
    """A line of the file."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


class TraceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request of a trace.

    Attributes:
        at_s: seconds from the beginning of the trace to its arrival.
        prompt_tokens, answer_tokens: the lengths; at least 1 each.
        blocks: a number for each block of the prompt, the last incomplete one included. An equal number at the same
            place means that both prompts are equal up to the end of that block.
    """

    at_s: float
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...]


class Trace:
    """Requests in the order of their arrival.

    Args:
        requests: in any order.
        block_tokens: tokens in a block of `TraceRequest.blocks`.
        name: for reports.

    Attributes:
        requests: in the order of arrival.
        block_tokens, name: as given.

    Raises:
        InvalidParameter: there is no request, or the blocks are too small.
    """

    def __init__(self, requests: Iterable[TraceRequest], *, block_tokens: int = BLOCK_TOKENS, name: str = "") -> None:
        self.requests = sorted(requests, key=lambda each: each.at_s)
        self.block_tokens, self.name = block_tokens, name
        if block_tokens < _DIGITS:
            raise InvalidParameter("block_tokens", f"expected at least {_DIGITS}, got {block_tokens}")
        if not self.requests:
            raise InvalidParameter("trace", f"there is no request in {name or 'it'}")

    def keys(self, request: TraceRequest, block_tokens: int) -> list[int]:
        """The keys of the whole blocks of a request's prompt, in an engine with blocks of `block_tokens`.

        `block_tokens` divides the trace's own.
        """
        parts = self.block_tokens // block_tokens
        found: list[int] = []
        for block in request.blocks:
            found += range(block * parts, (block + 1) * parts)
        del found[request.prompt_tokens // block_tokens :]
        return found

    def prompt(self, request: TraceRequest) -> bytes:
        """Token ids from 64 to 79 for a request's prompt, 4 bytes each, equal to another's as far as the trace says."""
        times, size = self.block_tokens // _DIGITS + 1, 4 * self.block_tokens
        blocks = []
        for block in request.blocks:
            digits = struct.pack(f"<{_DIGITS}I", *(64 + ((block >> 4 * place) & 15) for place in range(_DIGITS)))
            blocks.append((digits * times)[:size])
        return b"".join(blocks)[: 4 * request.prompt_tokens]


def read_trace(path: str | Path, *, block_tokens: int = BLOCK_TOKENS) -> Trace:
    """Read a trace: a JSON object a line, with `timestamp` (ms), `input_length`, `output_length` and `hash_ids`.

    Args:
        path: of the file.
        block_tokens: tokens for which one hash id stands.

    Raises:
        InvalidParameter: a line is invalid (the text has its number), or the file has no line.
        OSError: the file cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        return Trace(_requests(file, str(path), block_tokens), block_tokens=block_tokens, name=path.stem)


def _requests(lines: Iterable[bytes], name: str, block_tokens: int) -> Iterator[TraceRequest]:
    decoder = msgspec.json.Decoder(_Line)
    # The number of a block follows from all ids up to it: an engine shares only beginnings of prompts.
    numbers: dict[tuple[int, int], int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = decoder.decode(line)
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
            raise InvalidParameter("trace", f"{name}, line {number}: {error}") from None
        problem = _problem(found, block_tokens)
        if problem:
            raise InvalidParameter("trace", f"{name}, line {number}: {problem}")
        blocks, before = [], -1
        for each in found.hash_ids:
            before = numbers.setdefault((before, each), len(numbers))
            blocks.append(before)
        yield TraceRequest(
            at_s=found.timestamp / 1000,
            prompt_tokens=found.input_length,
            answer_tokens=max(1, found.output_length),
            blocks=tuple(blocks),
        )


def _problem(line: _Line, block_tokens: int) -> str:
    """What is wrong with a line; empty for nothing."""
    if not 0 <= line.timestamp < 1e15:
        return f"timestamp: expected milliseconds from 0 on, got {line.timestamp:g}"
    if line.input_length < 1:
        return f"input_length: expected at least 1, got {line.input_length}"
    if line.output_length < 0:
        return f"output_length: expected at least 0, got {line.output_length}"
    blocks = -(-line.input_length // block_tokens)
    if len(line.hash_ids) != blocks:
        return (
            f"hash_ids: {line.input_length} tokens have {blocks} blocks of {block_tokens}, "
            f"and there are {len(line.hash_ids)} ids"
        )
    return ""

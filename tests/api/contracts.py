"""The contracts of these tests, and a handler for each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec

import triton_distributed as trd


@dataclass
class Texts:
    """A request."""

    texts: list[str]
    scale: float = 1.0


class Lengths(msgspec.Struct):
    """An answer."""

    lengths: list[int]


MEASURE = trd.Unary[Texts, Lengths]("test.api.measure")
EACH = trd.Stream[Texts, Lengths]("test.api.each")
MAYBE = trd.Stream[int, int | None]("test.api.maybe")
TALK = trd.Bidirectional[Texts, Lengths]("test.api.talk")


@trd.serve(MEASURE)
async def measure(request: Texts) -> Lengths:
    """The lengths of the texts."""
    return Lengths([len(each) for each in request.texts])


@trd.serve(EACH)
async def each(request: Texts, context: trd.Context) -> AsyncIterator[Lengths]:
    """The length of each text."""
    for text in request.texts:
        yield Lengths([len(text)])


@trd.serve(MAYBE)
async def maybe(request: int) -> AsyncIterator[int | None]:
    """Numbers with None between them."""
    for number in range(request):
        yield number
        yield None


@trd.serve(TALK)
async def talk(request: AsyncIterator[Texts]) -> AsyncIterator[Lengths]:
    """The lengths of each request."""
    async for one in request:
        yield Lengths([len(each) for each in one.texts])

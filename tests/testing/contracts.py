"""Contracts and handlers of the tests of the fixtures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import triton_distributed as trd


@dataclass
class Text:
    text: str


UPPER = trd.Unary[Text, Text]("t.fixture.upper")
LETTERS = trd.Stream[Text, Text]("t.fixture.letters")
LENGTHS = trd.Bidirectional[Text, int]("t.fixture.lengths")
TWICE = trd.Unary[Text, Text]("t.fixture.twice")


@trd.serve(UPPER)
def upper(request: Text) -> Text:
    return Text(request.text.upper())


@trd.serve(LETTERS)
async def letters(request: Text) -> AsyncIterator[Text]:
    for each in request.text:
        yield Text(each)
        await asyncio.sleep(0)


@trd.serve(LENGTHS)
async def lengths(requests: AsyncIterator[Text]) -> AsyncIterator[int]:
    async for each in requests:
        yield len(each.text)


@trd.serve(TWICE)
async def twice(request: Text) -> Text:
    answer = await trd.call(UPPER, request)
    return Text(2 * answer.text)


def plain_letters(request: Text) -> Iterator[Text]:
    for each in request.text:
        yield Text(each)

"""Several answers of one request at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from triton_distributed.llm.http.several import Merged


class Slow:
    """An answer whose reader needs a while to end."""

    def __init__(self) -> None:
        self.closed = False
        self.reading, self.ends = asyncio.Event(), asyncio.Event()

    def __aiter__(self) -> Slow:
        return self

    async def __anext__(self) -> Any:
        self.reading.set()
        try:
            await asyncio.Event().wait()
        finally:
            await self.ends.wait()

    async def aclose(self) -> None:
        self.closed = True


async def test_all_answers_are_closed_although_their_closing_is_cancelled():
    answers = [Slow(), Slow()]
    merged = Merged(answers)  # type: ignore[arg-type]
    for each in answers:
        await each.reading.wait()
    closing = asyncio.create_task(merged.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    for each in answers:
        each.ends.set()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert all(each.closed for each in answers)

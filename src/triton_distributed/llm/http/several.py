"""Several answers of one request at once, merged in the order in which their deltas come."""

from __future__ import annotations

import asyncio

from triton_distributed.llm.models.answer import Answer
from triton_distributed.llm.models.delta import Delta


class Merged:
    """An asynchronous iterator of the deltas of several answers.

    Each answer has a task. The queue between them and the reader holds one delta for each answer, so that a slow reader
    holds back all of them. The first failure is raised, and `aclose` then ends the others.

    Attributes:
        index: which answer the last delta belongs to.
        answers: the answers.
    """

    def __init__(self, answers: list[Answer]) -> None:
        self._queue: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue(len(answers))
        self._open = len(answers)
        self.index = 0
        self.answers = answers
        self._tasks = [
            asyncio.create_task(self._read(index, each), name=f"trd-answer-{index}")
            for index, each in enumerate(answers)
        ]

    def __aiter__(self) -> Merged:
        return self

    async def __anext__(self) -> Delta:
        while self._open:
            delta = self._taken(*await self._queue.get())
            if delta is not None:
                return delta
        raise StopAsyncIteration

    async def more(self) -> Delta | None:
        """Return the next delta if it is there already, and None if it has to be waited for."""
        while not self._queue.empty():
            delta = self._taken(*self._queue.get_nowait())
            if delta is not None:
                return delta
        return None

    def _taken(self, index: int, found: Delta | BaseException | None) -> Delta | None:
        if isinstance(found, BaseException):
            raise found
        if found is None:
            self._open -= 1
        self.index = index
        return found

    async def aclose(self) -> None:
        """End all answers."""
        for task in self._tasks:
            task.cancel()
        try:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            for answer in self.answers:  # A task that was cancelled before its first step has closed nothing.
                await answer.aclose()

    async def _read(self, index: int, answer: Answer) -> None:
        last: BaseException | None = None
        try:
            async for delta in answer:
                await self._queue.put((index, delta))
            await answer.aclose()
        except Exception as error:
            last = error
        await self._queue.put((index, last))

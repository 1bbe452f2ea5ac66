"""The mock engine with a clock: it notes the time between its steps."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from benchmarks.llm.steps import Gaps
from triton_distributed.llm import Output, Request
from triton_distributed.llm.engines.mock.engine import MockEngine
from triton_distributed.llm.engines.mock.scheduler import Scheduler, Sequence, Step

gaps = Gaps()


class Timed(MockEngine):
    """The mock engine, which writes the gaps to a file when it is closed."""

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """As the mock engine does."""
        if self._driver is not None:
            self._driver.scheduler.__class__ = TimedScheduler
        async for output in super().generate(request):
            yield output

    async def close(self) -> None:
        """Write the gaps, and stop."""
        gaps.write()
        await super().close()


class TimedScheduler(Scheduler):
    """The mock engine's scheduler, which notes its steps."""

    def complete(self, step: Step) -> list[Sequence]:
        """As the scheduler does."""
        gaps.note()
        return super().complete(step)

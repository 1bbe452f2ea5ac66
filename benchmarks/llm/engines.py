"""The mock engine with a clock: it notes the time between the outputs of each request."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from benchmarks.llm.steps import Gaps
from triton_distributed.llm import Output, Request
from triton_distributed.llm.engines.mock.engine import MockEngine

gaps = Gaps()


class Timed(MockEngine):
    """The mock engine, which writes the gaps to a file when it is closed."""

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """As the mock engine does."""
        last = 0.0
        async for output in super().generate(request):
            last = gaps.note(last)
            yield output

    async def close(self) -> None:
        """Write the gaps, and stop."""
        gaps.write()
        await super().close()

"""A handler written with plain `def`, on a loop without threads, such as one with virtual time.

The handler runs on the loop, and the loop waits for it. A generator makes one item each time the caller takes one.
"""

from __future__ import annotations

from collections.abc import Generator

from triton_distributed.serving.plain import PlainHandler, Ready


class InlineHandler(PlainHandler):
    """One request at a plain handler that runs on the loop; see `PlainHandler` for its arguments."""

    async def begin(self) -> bool:
        self._begun = True
        self.run()
        return self.returned is None

    async def __anext__(self) -> Ready:
        if not self._ready:
            if not self._begun:
                await self.begin()
            if not self._ready and self._error is None:
                self.run()
            if not self._ready:
                self._end()
        return self._ready

    def _compute(self) -> None:
        """Call the function, or afterwards make one item."""
        if self._function is not None:
            super()._compute()
            return
        try:
            item = next(self._iterator)
        except StopIteration:
            return
        try:
            self._add(item)
        except BaseException:  # The caller gets it, as from an async generator.
            self._end_iterator()
            raise

    def _iterate(self) -> None:
        """Keep the iterator: `_compute` takes its items."""

    def _end_iterator(self) -> None:
        iterator, self._iterator = self._iterator, iter(())
        if isinstance(iterator, Generator):
            self._close(iterator)

    async def aclose(self) -> None:
        self._stopping = True
        self._ready.clear()
        self._variables.run(self._end_iterator)
        self._raise_error_of_close()

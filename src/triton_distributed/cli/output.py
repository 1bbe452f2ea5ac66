"""Standard output of a command that writes over a long time."""

from __future__ import annotations

import asyncio
import os
import select
import stat
import sys


class Output:
    """Standard output. If its reader closes the pipe, the task that entered this context is cancelled.

    Raises (from the end of the block, and from `write`):
        BrokenPipeError: the reader has closed the pipe.
    """

    def __init__(self) -> None:
        self._gone = False
        self._pipe = -1

    def __enter__(self) -> Output:
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        fd = sys.stdout.fileno()
        if stat.S_ISFIFO(os.fstat(fd).st_mode) and hasattr(select, "poll"):
            self._pipe = fd
            self._loop.add_reader(fd, self._look)  # The write end is reported as ready when the read end is closed.
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._pipe >= 0:
            self._loop.remove_reader(self._pipe)
        if self._gone and isinstance(error, asyncio.CancelledError):
            assert self._task is not None
            self._task.uncancel()
            raise BrokenPipeError from error

    def _look(self) -> None:
        poll = select.poll()
        poll.register(self._pipe, 0)
        self._loop.remove_reader(self._pipe)
        if poll.poll(0) and self._task is not None:
            self._gone = True
            self._task.cancel()

    def write(self, line: bytes) -> None:
        """Write one line and flush it."""
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()

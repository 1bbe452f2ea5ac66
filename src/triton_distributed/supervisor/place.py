"""One place of a supervisor: a replica's number, the process that has it now, and what became of the earlier ones."""

from __future__ import annotations

import random

from triton_distributed.supervisor.process import Process
from triton_distributed.supervisor.restarts import Restarts


class Place:
    """The state of one replica. The supervisor changes it; see `Supervisor`.

    Args:
        index: the replica's number.

    Attributes:
        process: the process that serves, or will; None while the place waits for its next start.
        successor: a process that replaces it as soon as it can be called.
        replaced: the processes that had the place before; some of them may still drain.
        begun_at: when `process` was started last, on the loop's clock.
        asked: the supervisor has asked the process to end, so that a new one takes its place.
        settled: the last start has come to an end: the process was ready, or it has ended before.
        due: the next start must not wait any longer.
        over: the replica has ended with its program.
        ends: number of processes that ended without being asked to.
        last_end: how the last process ended that was not asked to, in words; "" if none did.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.process: Process | None = None
        self.successor: Process | None = None
        self.replaced: tuple[Process, ...] = ()
        self.restarts = Restarts(random.random)
        self.begun_at = 0.0
        self.asked = self.settled = self.due = self.over = False
        self.ends = 0
        self.last_end = ""

    @property
    def field(self) -> dict[str, int]:
        """The field of the log entries about this replica."""
        return {"replica": self.index}

    @property
    def is_ready(self) -> bool:
        """Whether the replica can be called."""
        return self.process is not None and self.process.is_ready and not self.process.is_draining

    @property
    def is_worn(self) -> bool:
        """Whether the process has served as many requests as it should."""
        return self.is_ready and self.process is not None and self.process.worn

    @property
    def state(self) -> str:
        """`starting`, `ready`, `draining` or `stuck`; without a process `waiting`, `failing` or `ended`.

        Any thread may ask.
        """
        process = self.process
        if process is None and self.over:
            return "ended"
        if process is None:
            return "failing" if self.restarts.failing else "waiting" if self.ends else "starting"
        if process.is_draining:
            return "draining" if process.stuck_at is None else "stuck"
        return "ready" if process.is_ready else "starting"

    @property
    def status_url(self) -> str:
        """Where the status port of its process is; "" if it has none. Any thread may ask."""
        process = self.process
        return "" if process is None else process.status_url

    def has_ended(self, words: str) -> None:
        """Note the end of a process that was not asked to end."""
        self.ends += 1
        self.last_end = words

    def has_changed(self, process: Process) -> bool:
        """Whether a process of this place has ended, or another has its place."""
        return self.process is not process or process.is_over

    def take(self, process: Process) -> None:
        """Let a process have the place."""
        before = self.replaced if self.process is None else (*self.replaced, self.process)
        self.replaced = tuple(each for each in before if not each.is_over)
        self.process, self.successor = process, None
        self.begun_at = process.started_at
        self.asked = self.due = False
        self.settled = process.is_ready

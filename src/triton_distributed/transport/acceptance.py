"""Handlers that wait until the peer can know that they begin: accept → announce → written → begin.

After admission a request is accepted: its handler waits here. The ids of the waiting requests leave in one ACCEPT, and
once the kernel has it, the handlers begin. So when a session is lost, the peer knows for each of its requests whether a
handler can have begun.
"""

from __future__ import annotations

from collections.abc import Callable

from triton_distributed.transport.stream import Stream


class Acceptance:
    """The handlers of one session that have not begun: at most one for each open stream.

    The session calls `announce` when the kernel accepts output, and `begin` when the kernel has the ACCEPT.

    Attributes:
        accepted: handlers that are not announced to the peer yet, by stream.
        announced: handlers whose ACCEPT is not yet in the kernel, by stream.
    """

    __slots__ = ("accepted", "announced")

    def __init__(self) -> None:
        self.accepted: dict[Stream, Callable[[], None]] = {}
        self.announced: dict[Stream, Callable[[], None]] = {}

    def __len__(self) -> int:
        return len(self.accepted) + len(self.announced)

    def announce(self) -> list[int]:
        """Mark all accepted handlers as announced; returns their ids, for the next ACCEPT."""
        accepted, self.accepted = self.accepted, {}
        for stream in accepted:
            stream.accepted = True
        self.announced.update(accepted)
        return [stream.id for stream in accepted]

    def begin(self) -> None:
        """Begin the announced handlers, because the kernel has their ACCEPT."""
        announced, self.announced = self.announced, {}
        for begin in announced.values():
            begin()

    def withdraw(self, stream: Stream) -> None:
        """Drop a handler that has not begun: `stream` was closed early."""
        self.accepted.pop(stream, None)
        self.announced.pop(stream, None)

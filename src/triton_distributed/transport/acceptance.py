"""Handlers that may begin, until the peer can know that they do: accept → announce → written → begin.

A request that was let in is accepted: its handler waits here. The ids of the waiting ones leave in one ACCEPT, and once
the kernel has taken it, the handlers begin. So when a session is lost the peer knows, for each of its requests, whether
a handler can have begun.
"""

from __future__ import annotations

from collections.abc import Callable

from triton_distributed.transport.stream import Stream


class Acceptance:
    """The handlers of one session that have not begun: at most one an open stream.

    The session decides when: it announces where the kernel takes output, and begins where it has taken the ACCEPT.

    Attributes:
        accepted: handlers that were not announced to the peer yet, by stream.
        announced: handlers whose ACCEPT is on its way to the kernel, by stream.
    """

    __slots__ = ("accepted", "announced")

    def __init__(self) -> None:
        self.accepted: dict[Stream, Callable[[], None]] = {}
        self.announced: dict[Stream, Callable[[], None]] = {}

    def __len__(self) -> int:
        return len(self.accepted) + len(self.announced)

    def announce(self) -> list[int]:
        """The ids for the next ACCEPT."""
        accepted, self.accepted = self.accepted, {}
        for stream in accepted:
            stream.accepted = True
        self.announced.update(accepted)
        return [stream.id for stream in accepted]

    def begin(self) -> None:
        """The kernel has the ACCEPT: begin what it announced."""
        announced, self.announced = self.announced, {}
        for begin in announced.values():
            begin()

    def withdraw(self, stream: Stream) -> None:
        """`stream` was closed early: its handler does not begin any more."""
        self.accepted.pop(stream, None)
        self.announced.pop(stream, None)

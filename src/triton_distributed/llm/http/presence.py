"""Clients that leave: the tasks of their requests are cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from triton_distributed.integrations.http.request import CLIENT_LEFT
from triton_distributed.llm.http.exchange import ClientLeft, Receive
from triton_distributed.llm.http.facts import Facts

GONE = "client_left"
"""The error of a request whose client has left, before its task is cancelled."""

LOOK_S = 0.005
"""After this time, and at most twice this time, a request is watched."""


class Presences:
    """The requests of one app whose clients may leave.

    ASGI tells of a client that leaves only to a task that waits for it. Such a task costs a short request much of its
    time, so a request gets one only when it has run for a while. One timer serves all.
    """

    def __init__(self) -> None:
        self.new: set[Presence] = set()
        self._older: set[Presence] = set()
        self._timer: asyncio.TimerHandle | None = None

    def of(self, receive: Receive, facts: Facts) -> Presence:
        """Watches the client of a request whose body was read."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)
        return Presence(receive, facts, self.new)

    def _look(self) -> None:
        for each in self._older:
            each.watch()
        self._older, self.new = {each for each in self.new if each.open}, set()
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look) if self._older else None


class Presence:
    """Cancels the task of a request when its client leaves.

    `with` turns this cancellation into `ClientLeft`, and lets those of others through.

    Attributes:
        open: whether the block runs.
    """

    __slots__ = ("_facts", "_left", "_new", "_receive", "_task", "_watcher", "open")

    def __init__(self, receive: Receive, facts: Facts, new: set[Presence]) -> None:
        self._receive, self._facts, self._new = receive, facts, new
        self._left = self.open = False
        self._task: asyncio.Task[Any] | None = None
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self.open = True
        self._new.add(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.open = False
        self._new.discard(self)
        if self._watcher is None:
            return
        self._watcher.cancel()
        assert self._task is not None
        # The task waited when it was cancelled, so the cancellation has arrived.
        if self._left and self._task.uncancel() == 0:
            raise ClientLeft from None

    def watch(self) -> None:
        """Wait for the client to leave."""
        if self.open:
            self._watcher = asyncio.create_task(self._watch(), name="trd-client-presence")

    async def _watch(self) -> None:
        with contextlib.suppress(Exception):  # A server that cannot tell has lost the client.
            while (await self._receive())["type"] != "http.disconnect":
                pass
        if self._facts.status != CLIENT_LEFT:
            return  # The answer is complete: servers then say that the client has left, too.
        self._left, self._facts.error = True, GONE
        assert self._task is not None
        self._task.cancel("the client has left")

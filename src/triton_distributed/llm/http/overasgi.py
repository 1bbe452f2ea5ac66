"""An exchange over ASGI, in any server. ASGI tells of a client that leaves only to a task that waits for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from triton_distributed.integrations.http.request import CLIENT_LEFT
from triton_distributed.llm.http.errors import Refused
from triton_distributed.llm.http.exchange import COPIES, JSON, STREAM_HEADERS, ClientLeft, Exchange, Held
from triton_distributed.llm.http.facts import GONE, Facts
from triton_distributed.llm.http.head import Head, read_head

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOOK_S = 0.005
"""After this time, and at most twice this time, a request is watched."""


async def read_body(receive: Receive, limit: int, held: Held, facts: Facts) -> bytes:
    """As `Exchange.body`.

    Args:
        receive: of ASGI.
        limit, held: as there.
        facts: of the request.
    """
    message = await receive()
    parts: list[bytes] = []
    size = 0
    while message["type"] == "http.request":
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise Refused(413, f"The body has more than {limit:,} bytes.", "request_too_large")
        held.take(facts, COPIES * len(part))
        parts.append(part)
        if not message.get("more_body"):
            body = b"".join(parts)  # Without a copy if it is one.
            held.take_values(facts, body)
            return body
        message = await receive()
    raise ClientLeft


class Presences:
    """The requests of one app whose clients may leave.

    A task that waits for it costs a short request much of its time, so a request gets one only when it has run for a
    while. One timer serves all.
    """

    def __init__(self) -> None:
        self.new: set[AsgiExchange] = set()
        self._older: set[AsgiExchange] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, exchange: AsgiExchange) -> None:
        """A request begins whose body was read."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)
        self.new.add(exchange)

    def _look(self) -> None:
        for each in self._older:
            each.look()
        self._older, self.new = {each for each in self.new if each.open}, set()
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look) if self._older else None


class AsgiExchange(Exchange):
    """See the module.

    Args:
        scope, receive, send: of ASGI.
        facts: as in `Exchange`.
        presences: of the app.
        head: as in `Exchange`, if it was read.

    Attributes:
        open: whether the task of the request is to be cancelled if the client leaves.
    """

    __slots__ = ("_left", "_presences", "_receive", "_send", "_task", "_watcher", "open")

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        facts: Facts,
        presences: Presences,
        head: Head | None = None,
    ) -> None:
        path: str = scope["path"]
        if root := scope.get("root_path"):
            path = path.removeprefix(root)
        super().__init__(scope["method"], path, head or read_head(scope["headers"]), facts)
        self._receive, self._send, self._presences = receive, send, presences
        self._left = self.open = False
        self._task: asyncio.Task[Any] | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def body(self, limit: int, held: Held) -> bytes:
        """See `Exchange`."""
        return await read_body(self._receive, limit, held, self.facts)

    async def answer(
        self, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...] = (), kind: bytes = JSON
    ) -> None:
        """See `Exchange`."""
        self.facts.begun = True
        length = (b"content-length", b"%d" % len(body))
        found = [(b"content-type", kind), length, *headers, *self.facts.headers]
        await self._send({"type": "http.response.start", "status": status, "headers": found})
        await self._send({"type": "http.response.body", "body": body})
        self.facts.status = status

    async def send(self, events: bytes, more: bool) -> None:
        """See `Exchange`."""
        if not self.facts.begun:
            self.facts.begun = True
            headers = [*STREAM_HEADERS, *self.facts.headers]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": events, "more_body": more})
        if not more:
            self.facts.status = 200

    def watch(self) -> None:
        """See `Exchange`."""
        self._task = asyncio.current_task()
        self.open = True
        self._presences.add(self)

    def ended(self) -> bool:
        """See `Exchange`."""
        self.open = False
        self._presences.new.discard(self)
        if self._watcher is None:
            return False
        self._watcher.cancel()
        assert self._task is not None
        # The task waited when it was cancelled, so the cancellation has arrived.
        return self._left and self._task.uncancel() == 0

    def look(self) -> None:
        """Wait for the client to leave."""
        if self.open:
            self._watcher = asyncio.create_task(self._watch(), name="trd-client-presence")

    async def _watch(self) -> None:
        with contextlib.suppress(Exception):  # A server that cannot tell has lost the client.
            while (await self._receive())["type"] != "http.disconnect":
                pass
        if self.facts.status != CLIENT_LEFT:
            return  # The answer is complete: servers then say that the client has left, too.
        self._left, self.facts.error = True, GONE
        assert self._task is not None
        self._task.cancel("the client has left")

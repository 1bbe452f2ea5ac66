"""An exchange in our own server, without ASGI between. It is what uvicorn's protocol calls a cycle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from triton_distributed.llm.http.errors import Refused
from triton_distributed.llm.http.exchange import COPIES, JSON, STREAM_HEADERS, ClientLeft, Exchange, Held
from triton_distributed.llm.http.facts import GONE, Facts
from triton_distributed.llm.http.head import Head

logger = logging.getLogger("triton_distributed.llm.http")

MOST_BYTES = 64 * 1024
"""The largest body of such a request. A larger one needs a limit to what is read ahead, which ASGI's way has."""


class Flow(Protocol):
    """Tells whether a client takes what is sent to it."""

    write_paused: bool

    async def drain(self) -> None:
        """Wait until it does."""


class Shared:
    """What all requests of a server have in common.

    Args:
        status_lines: the first line of a response, for each status.
    """

    def __init__(self, status_lines: dict[int, bytes]) -> None:
        self.status_lines = status_lines
        self._pairs: list[tuple[bytes, bytes]] = []
        self._lines = b""

    def default(self, pairs: list[tuple[bytes, bytes]]) -> bytes:
        """The lines of the headers that each response has. Uvicorn makes a new list each second, for the date."""
        if pairs is not self._pairs:
            self._pairs, self._lines = pairs, lines(pairs)
        return self._lines


def lines(pairs: Any) -> bytes:
    """Headers as they are sent."""
    return b"".join([b"%b: %b\r\n" % each for each in pairs])


class Direct(Exchange):
    """See the module.

    Args:
        path: of the request.
        head: what its headers say.
        transport, flow: of the connection.
        answered: called when the response is complete.
        shared: of the server.
        default: the headers that each response has, as uvicorn gives them.
        keep_alive: whether the connection stays after the response.

    Attributes, by uvicorn's names:
        keep_alive: as given, until the response begins.
        response_started, response_complete: as they say.
    """

    __slots__ = (
        "_answered", "_arrival", "_body", "_default", "_flow", "_left", "_lost", "_shared", "_task", "_transport",
        "_whole", "keep_alive", "response_complete", "response_started",
    )  # fmt: skip

    def __init__(
        self,
        path: str,
        head: Head,
        transport: Any,
        flow: Flow,
        answered: Callable[[], None],
        shared: Shared,
        default: list[tuple[bytes, bytes]],
        keep_alive: bool,
    ) -> None:
        super().__init__("POST", path, head, _NO_FACTS)
        self._transport, self._flow, self._answered = transport, flow, answered
        self._shared, self._default, self.keep_alive = shared, default, keep_alive
        self._body, self._whole = b"", False
        self._arrival: asyncio.Future[None] | None = None
        self._task: asyncio.Task[Any] | None = None
        self._left = self._lost = False
        self.response_started = self.response_complete = False

    # What the connection tells.

    def arrived(self, part: bytes) -> None:
        """A part of the body has come."""
        if not self.response_complete:  # Else the request was refused, and nothing reads the rest.
            self._body = self._body + part if self._body else part

    def complete(self) -> None:
        """The body is complete."""
        self._whole = True
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def lose(self) -> None:
        """The client has left."""
        self._lost = True
        if self._task is not None and not self.response_complete:
            self._left, self.facts.error = True, GONE
            self._task.cancel("the client has left")

    async def run(self, answer: Callable[[Exchange], Any]) -> None:
        """Answer the request, in a task of its own."""
        failure: BaseException | None = None
        try:
            await answer(self)
        except BaseException as error:
            failure = error
        if failure is not None or not (self.response_complete or self._lost):
            logger.error("a request was not answered because of a defect of the front end", exc_info=failure)
            failure = None
            if self.response_started:
                self._transport.close()
            else:
                self.keep_alive = False
                await self.answer(500, b"Internal Server Error", (), b"text/plain; charset=utf-8")

    # What the app asks and says.

    async def body(self, limit: int, held: Held) -> bytes:
        """See `Exchange`."""
        if self._lost:
            raise ClientLeft
        self.watch()
        if not self._whole:
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        body, self._body = self._body, b""
        if len(body) > limit:
            raise Refused(413, f"The body has more than {limit:,} bytes.", "request_too_large")
        held.take(self.facts, COPIES * len(body))
        held.take_values(self.facts, body)
        return body

    async def answer(
        self, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...] = (), kind: bytes = JSON
    ) -> None:
        """See `Exchange`."""
        facts = self.facts
        facts.begun = self.response_started = True
        if self._flow.write_paused and not self._lost:
            await self._flow.drain()
        if not self._lost:
            begin = self._shared.status_lines[status], self._shared.default(self._default)
            length = b"content-type: %b\r\ncontent-length: %d\r\n" % (kind, len(body))
            self._transport.write(b"".join([*begin, length, self._last(headers), body]))
            self._complete()
        facts.status = status

    async def send(self, events: bytes, more: bool) -> None:
        """See `Exchange`."""
        facts = self.facts
        if self._flow.write_paused and not self._lost:
            await self._flow.drain()
        begin = b""
        if not facts.begun:
            facts.begun = self.response_started = True
            begin = b"%b%b%b%b" % (
                self._shared.status_lines[200], self._shared.default(self._default), _STREAM_LINES, self._last(()),
            )  # fmt: skip
        if not self._lost:
            self._transport.write(b"%b%x\r\n%b%b" % (begin, len(events), events, b"\r\n" if more else _END))
        if not more:
            if not self._lost:
                self._complete()
            facts.status = 200

    def watch(self) -> None:
        """See `Exchange`."""
        if self._task is None:
            self._task = asyncio.current_task()

    def ended(self) -> bool:
        """See `Exchange`."""
        task, self._task = self._task, None
        # The task waited when it was cancelled, so the cancellation has arrived.
        return self._left and task is not None and task.uncancel() == 0

    def _last(self, headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
        """The last headers of a response, and the empty line after them."""
        end = b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n"
        return lines(headers + self.facts.headers) + end

    def _complete(self) -> None:
        self.response_complete = True
        if not self.keep_alive:
            self._transport.close()
        self._answered()


_NO_FACTS = Facts()  # Until the front end notes the request.
_STREAM_LINES = lines((*STREAM_HEADERS, (b"transfer-encoding", b"chunked")))
_END = b"\r\n0\r\n\r\n"

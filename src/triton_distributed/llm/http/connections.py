"""A connection of a client: limits of its bytes and of its silence, and an end that resets no request.

A server that closes an idle connection at the moment in which the client sends the next request loses this request. So
a server that ends first tells its clients: each answer that begins then says `Connection: close`. It closes only
connections on which nothing has happened for `QUIET_S`.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from triton_distributed.llm.http.direct import MOST_BYTES, Direct, Shared, lines
from triton_distributed.llm.http.head import Reader, read_head
from triton_distributed.llm.http.limits import MAX_HEAD_BYTES

QUIET_S = 0.5
"""Seconds without a request after which a connection is not in use, and a server gets no more requests. A client that
sends one request after the other pauses for less."""

PATHS = {each.encode(): each for each in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")}
"""Those whose requests are answered without ASGI between."""

UNSENT_S = 60.0
"""Seconds that a client has for a head, and for each next part of a body. nginx has the same limit for both."""


class Activity:
    """What the connections of one server share.

    Attributes:
        last: when the last request came, on the loop's clock.
        ending: whether the server ends.
        shared: parts of their responses.
    """

    def __init__(self) -> None:
        self.last = 0.0
        self.ending = False
        self.shared = Shared(STATUS_LINE)


class Protocol(HttpToolsProtocol):
    """A connection. See the module.

    Args:
        activity: shared by the connections of the server.
        options: as uvicorn gives them.
    """

    cycle: Any  # The last request: one of uvicorn's, or a `Direct`; None before the first.

    def __init__(self, activity: Activity, **options: Any) -> None:
        super().__init__(**options)
        self._activity = activity
        self._api = getattr(self.app, "direct", None)  # Answers requests without ASGI between.
        self._direct: Direct | None = None  # The last request that is so answered.
        self._beside_bytes = 0  # since the last part of a body: of a head, of trailers or of a chunk's extensions
        self._in_head, self._begun = True, False  # The latter: whether a part of a request has come, and not all.
        self._awaited_since = math.inf  # When the client's turn began; infinite while it is the server's turn.
        self._idle_since = math.inf  # When the last request was answered; infinite as soon as something comes.
        self._upgrades = False  # The request asks for another protocol.
        self._reader = Reader(self.on_message_begin, self.on_headers_complete, self.on_body, self.on_message_complete)
        self._begin_parser()

    def _begin_parser(self) -> None:
        self.parser = httptools.HttpRequestParser(self._reader)
        if hasattr(self.parser, "set_dangerous_leniencies"):  # As uvicorn does: a client may pipeline after `close`.
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The client has connected."""
        super().connection_made(transport)
        self._awaited_since = self.loop.time()
        if self._activity.ending:
            self.end()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        if self._direct is not None:
            self._direct.lose()
            if self.cycle is self._direct:
                self.cycle = None
            self._direct = None
        super().connection_lost(exc)
        del self._reader  # It has methods of this object.
        self._unset_keepalive_if_required()  # uvicorn leaves it after a reset; it would keep the connection in memory.

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head = self._begun = True
        self._awaited_since = self.loop.time()

    def on_headers_complete(self) -> None:
        """Its head is complete."""
        self._upgrades = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if self._upgrades:
            return  # `data_received` begins with it again.
        self._in_head, self._beside_bytes = False, 0
        self._activity.last = self._awaited_since = self.loop.time()
        if not self._goes_direct():
            super().on_message_begin()  # It makes what ASGI needs.
            self.url = self._reader.url
            for name, value in self._reader.headers:
                super().on_header(name, value)
            super().on_headers_complete()
        if self._activity.ending:
            self.cycle.keep_alive = False

    def _goes_direct(self) -> bool:
        """Begin to answer the request without ASGI, if it is one of the usual kind."""
        path = PATHS.get(self._reader.url)
        parser = self.parser
        if path is None or self._api is None or self._running:
            return False
        if parser.get_method() != b"POST" or parser.get_http_version() != "1.1":
            return False
        head = read_head(self._reader.headers)
        if head.expects or not 0 < head.length <= MOST_BYTES:
            return False
        direct = Direct(
            path,
            head,
            self.transport,
            self.flow,
            self.on_response_complete,
            self._activity.shared,
            self.server_state.default_headers,
            parser.should_keep_alive(),
        )
        self.cycle = self._direct = direct
        task = self.loop.create_task(direct.run(self._api.answer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return True

    def on_body(self, body: bytes) -> None:
        """A part of its body has come."""
        self._beside_bytes, self._awaited_since = 0, self.loop.time()
        if (direct := self._direct) is not None and self.cycle is direct:
            direct.arrived(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """It is complete."""
        if self._upgrades:
            return
        self._beside_bytes, self._awaited_since, self._begun = 0, math.inf, False
        if (direct := self._direct) is not None and self.cycle is direct:
            direct.complete()
        else:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """A request is answered."""
        if self._activity.ending or self.pipeline or self.transport.is_closing():
            super().on_response_complete()
        else:  # Without uvicorn's timer for each request: `look` closes the connection.
            self.server_state.total_requests += 1
            self.flow.resume_reading()
        now = self.loop.time()
        if self._awaited_since == math.inf:
            self._idle_since = now
        else:  # A part of the next request is there, and the server read nothing meanwhile.
            self._awaited_since = now

    def data_received(self, data: bytes) -> None:
        """The client has sent something."""
        self._beside_bytes += len(data)
        self._idle_since = math.inf
        self._unset_keepalive_if_required()
        rest: bytes | memoryview = data
        try:
            while rest:
                try:
                    self.parser.feed_data(rest)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    if not self._upgrades:
                        break  # CONNECT: what follows is nothing for this server.
                    rest = memoryview(rest)[upgrade.args[0] :]
                    self._go_on_without_upgrade()
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")
            return
        if self._beside_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            if self._in_head:
                self.send_400_response("The headers are too large.")
            else:
                self.transport.close()  # The answer may have begun, so there is no place for another one.
        elif (
            self._awaited_since == self._idle_since == math.inf
            and not self._running
            and self.timeout_keep_alive_task is None
        ):
            self._awaited_since = self.loop.time()  # An empty line before a head has ended the time of keep-alive.

    def _go_on_without_upgrade(self) -> None:
        """Read the head of a request again, without its wish for another protocol: httptools would skip the body.

        Clients in Java ask for HTTP/2 like this in each first request.
        """
        line = self.parser.get_method(), self._reader.url, self.parser.get_http_version().encode()
        others = [each for each in self._reader.headers if each[0] != b"upgrade"]
        self._begin_parser()
        self.parser.feed_data(b"%b %b HTTP/%b\r\n%b\r\n" % (*line, lines(others)))

    @property
    def _running(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def look(self) -> None:
        """Close the connection if the client's turn has lasted for `UNSENT_S`, or if it is idle for too long."""
        if self.loop.time() - self._idle_since >= self.timeout_keep_alive:
            self.timeout_keep_alive_handler()
            return
        if self.loop.time() - self._awaited_since < UNSENT_S or self.transport.is_closing():
            return
        running = self._running
        if running and (self._in_head or self.pipeline or self.flow.read_paused):
            return  # An answer runs, or the app does not read: the client is not late.
        if self._begun and (self._in_head or not self.cycle.response_started):
            self.transport.write(_TOO_LATE)
        self.transport.close()

    def end(self) -> None:
        """Close the connection after the present request, or when it has been idle for `QUIET_S`."""
        cycle = self.cycle
        running = self._running
        idle_s = 0.0 if self._idle_since == math.inf else self.loop.time() - self._idle_since
        self.timeout_keep_alive = QUIET_S  # type: ignore[assignment]
        if not running:
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                max(0.0, QUIET_S - idle_s), self.timeout_keep_alive_handler
            )
        elif not cycle.response_started and not self.pipeline:
            cycle.keep_alive = False  # An answer that has begun has not said so, and its client may go on.

    def shutdown(self) -> None:
        """The server accepts no more connections. `end` was called before."""


_TOO_LATE = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
    b"content-length: 29\r\n\r\nThe request came too slowly.\n"
)

"""Ties calls to the HTTP request in which they are made: its id, its trace, and its end if the client leaves."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Callable, Iterable
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triton_distributed.api.connection import Connection
from triton_distributed.context import AttachedCall, Context, current
from triton_distributed.observe.traceparent import drop_invalid

REQUEST_ID = b"x-request-id"
_VALID = {
    REQUEST_ID: re.compile(rb"[\x21-\x7e]{1,128}"),
    b"traceparent": re.compile(rb"[\x21-\x7e]{55,256}"),
    b"tracestate": re.compile(rb"[\x20-\x7e]{1,512}"),  # W3C Trace Context asks for at least 512 characters.
    b"baggage": re.compile(rb"[\x20-\x7e]{1,8192}"),  # The limit of W3C Baggage.
}
NO_RESPONSE = "No response returned."
"""The text of the RuntimeError of Starlette's BaseHTTPMiddleware if the app below it was cancelled."""

CLIENT_LEFT = 499
"""The status that nginx logs if a client has closed its connection. Nothing sends it."""

_INSIDE = "triton_distributed.http"


class HttpContext(Context):
    """The context of an HTTP request. Calls that are made while it is handled inherit it, as calls in a handler do.

    Args:
        id: the id of the request.
        travelling: the values that all its calls carry.
        show_errors: the client may see the text of an error that a worker's handler raised.
    """

    before_call: Callable[[], None] | None = None

    def __init__(self, id: str, travelling: dict[str, str], show_errors: bool) -> None:
        super().__init__(id, travelling=travelling)
        self.show_errors = show_errors
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    def attach(self, call: AttachedCall) -> None:
        if threading.get_ident() == self._thread:
            self._begin_call()
        else:  # The synchronous client, in a thread.
            self._loop.call_soon_threadsafe(self._begin_call)
        super().attach(call)

    def _begin_call(self) -> None:
        if self.before_call is not None:
            self.before_call()


class HttpRequest:
    """One HTTP request: what passes between the server and the app.

    Once a call is made, this reads ahead by one message, so that it notices when the client leaves.
    """

    def __init__(self, context: HttpContext, receive: Receive, send: Send) -> None:
        self.context = context
        self.left = False  # The client has left before the response was complete.
        self.started = False  # The response has begun.
        self._answered = False  # The response is complete, so that the client may leave.
        self._receive = receive
        self._send = send
        self._reading = self._watching = False
        self._ahead: asyncio.Future[Message] | None = None

    def watch(self) -> None:
        """Notice from now on when the client leaves."""
        self._watching = not (self._answered or self.context.over)
        if self._watching and self._ahead is None and not self._reading:
            self._ahead = asyncio.ensure_future(self._receive())
            self._ahead.add_done_callback(self._received)

    def _received(self, ahead: asyncio.Future[Message]) -> None:
        if not ahead.cancelled() and ahead.exception() is None:
            self._look_at(ahead.result())

    def _look_at(self, message: Message) -> None:
        if message["type"] == "http.disconnect" and not self._answered and not self.left:
            self.left = True
            self.context.kill()

    async def receive(self) -> Message:
        """The app's `receive`."""
        if self._ahead is not None:
            message = await asyncio.shield(self._ahead)
            if message["type"] != "http.disconnect":  # The disconnect stays, for all later reads.
                self._ahead = None
                self.watch()
            return message
        self._reading = True
        try:
            message = await self._receive()
            self._look_at(message)
        finally:
            self._reading = False
            if self._watching and not self.left:  # A call was made meanwhile.
                self.watch()
        return message

    async def send(self, message: Message) -> None:
        """The app's `send`."""
        kind = message["type"]
        if kind in ("http.response.start", "websocket.accept"):
            self.started = True
            others = [pair for pair in message.get("headers", ()) if pair[0].lower() != REQUEST_ID]
            message = {**message, "headers": [*others, (REQUEST_ID, self.context.id().encode())]}
        elif kind == "http.response.pathsend" or (kind == "http.response.body" and not message.get("more_body", False)):
            self._answered = True
        await self._send(message)

    async def close(self) -> None:
        """Stop reading ahead."""
        self.context.over = True
        self.context.before_call = None
        if self._ahead is not None and not self._ahead.done():
            self._ahead.cancel()
            await asyncio.wait([self._ahead])


class RequestMiddleware:
    """Handles each HTTP request and each WebSocket in a context of its own; `install` adds it to an app."""

    def __init__(self, app: ASGIApp, answer: Callable[[Exception], ASGIApp], show_errors: bool) -> None:
        self._app = app
        self._answer = answer
        self._show_errors = show_errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or _INSIDE in scope:
            await self._app(scope, receive, send)
            return
        scope[_INSIDE] = True
        id, travelling = read_headers(scope["headers"])
        context = HttpContext(id, travelling, self._show_errors)
        request = HttpRequest(context, receive, send)
        if scope["type"] == "http":
            context.before_call = request.watch
        connection = getattr(scope["app"].state, "trd", None)
        token = current.set(context)
        try:
            if isinstance(connection, Connection):
                with connection.as_here():
                    await self._handle(request, scope)
            else:
                await self._handle(request, scope)
        finally:
            current.reset(token)
            await request.close()

    async def _handle(self, request: HttpRequest, scope: Scope) -> None:
        try:
            await self._app(scope, request.receive, request.send)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not request.left or (task is not None and task.cancelling()):
                raise
            await self._end(request, scope)
        except Exception as error:
            if request.left and str(error) == NO_RESPONSE:
                await self._end(request, scope)
                return
            if not request.started and scope["type"] == "http" and not _has_own_answer(scope["app"]):
                await self._answer(error)(scope, request.receive, request.send)
            raise  # The server logs it.

    async def _end(self, request: HttpRequest, scope: Scope) -> None:
        """End a request whose client has left, so that its calls were cancelled."""
        if not request.started:  # A middleware around this one may insist on a response, which the server drops.
            await Response(status_code=CLIENT_LEFT)(scope, request.receive, request.send)


def _has_own_answer(app: Any) -> bool:
    """Whether the app answers unexpected errors itself: with a traceback in debug mode, or by a handler."""
    return bool(app.debug) or Exception in app.exception_handlers or 500 in app.exception_handlers


def read_headers(headers: Iterable[tuple[bytes, bytes]]) -> tuple[str, dict[str, str]]:
    """The request id, or a random one; the trace context and the baggage. An invalid header counts as missing."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in _VALID:  # A header may come in several lines.
            found[name] = found[name] + b"," + value if name in found else value
    valid = {name.decode(): value.decode() for name, value in found.items() if _VALID[name].fullmatch(value)}
    id = valid.pop("x-request-id", None) or os.urandom(16).hex()
    drop_invalid(valid)
    return id, valid

"""Serves a front end over HTTP until a signal, and lets running requests finish."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from triton_distributed.llm.http.front import FrontEnd
from triton_distributed.llm.http.limits import MAX_HEAD_BYTES

BACKLOG = 2048
ECHO_S = 0.3
"""A terminal and a parent process may send one signal twice. Within this time it counts once."""


class _Protocol(HttpToolsProtocol):
    """Ends a connection whose request line and headers do not end."""

    _head_bytes = 0
    _in_head = True

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("The headers are too large.")


class _Server(uvicorn.Server):
    """Leaves the signals to `serve`, and says when it accepts connections."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """Open the socket of a server.

    Args:
        host: an address or a name.
        port: the port; 0 for a free one.

    Raises:
        OSError: the address cannot be bound.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address[:2], family=family, backlog=BACKLOG)


def url_of(listening: socket.socket) -> str:
    """The base URL of a server, as this machine reaches it."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    app: FrontEnd,
    listening: socket.socket,
    *,
    drain_timeout_s: float,
    ready: Callable[[str], Any] = print,
    at_once: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT. Then no connection is accepted, and running requests finish.

    A second signal ends the process at once, with the status 128 and the signal's number.

    Args:
        app: the front end.
        listening: the socket, which this closes.
        drain_timeout_s: seconds that running requests have; then they are cancelled.
        ready: called with the base URL when requests are answered.
        at_once: called before a second signal ends the process.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=max(1, round(drain_timeout_s)),
    )
    server = _Server(config, lambda: ready(url_of(listening)))
    loop = asyncio.get_running_loop()
    first: float | None = None

    def end(number: int) -> None:
        nonlocal first
        if first is None:
            first = loop.time()
            app.draining = server.should_exit = True
            if app.running:
                text = f"draining: {app.running} request(s) may run for at most {drain_timeout_s:g} s; "
                print(text + "a second signal ends them now", file=sys.stderr)
        elif loop.time() - first > ECHO_S:
            sys.stdout.flush()
            at_once()
            os._exit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    for each in numbers:
        loop.add_signal_handler(each, end, each)
    serving = asyncio.create_task(server.serve([listening]))
    try:
        await asyncio.shield(serving)
    finally:
        server.should_exit = True
        await asyncio.wait([serving])
        for each in numbers:
            loop.remove_signal_handler(each)
        listening.close()

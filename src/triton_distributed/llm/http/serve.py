"""Serves a front end over HTTP until a signal, and lets running requests finish."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from triton_distributed.llm.http.connections import QUIET_S, Activity, Protocol
from triton_distributed.llm.http.front import FrontEnd

BACKLOG = 2048
KEEP_ALIVE_S = 75
"""Seconds after which an idle connection is closed. Clients and proxies close theirs earlier (nginx: 60 s, httpx: 5 s),
so that they do not send a request at the moment of its end."""

CUT_S = 2.0
"""Seconds in which requests that are cancelled at the end of the drain tell their clients."""

LINGER_S = 5.0
"""Seconds in which a server that ends takes further requests, as long as they come."""

SWITCH_S = 0.0005
"""Seconds for which a thread has the interpreter while the loop waits for it."""

UNREAD_S = 60.0
"""Seconds after which a connection is closed whose client takes nothing of what is sent, or has vanished. A slot of an
engine waits for it meanwhile. nginx has the same limit."""

LOOK_TICKS = 20
"""Ticks of uvicorn's server, 0.1 s each, after which clients that are too slow are looked for."""

ECHO_S = 0.3
"""A terminal and a parent process may send one signal twice. Within this time it counts once."""


class _Server(uvicorn.Server):
    """Leaves the signals to `serve`, says when it accepts connections, and ends without a failed request."""

    def __init__(self, config: uvicorn.Config, activity: Activity, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._activity = activity
        self._ready = ready
        self._cutting: asyncio.TimerHandle | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        if counter % LOOK_TICKS == 0:
            for each in list(self.server_state.connections):
                each.look()  # type: ignore[union-attr]
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def drain(self, timeout_s: float) -> None:
        """Tell the clients, wait until no requests come any more, and let `serve` end.

        Args:
            timeout_s: seconds that running requests have from now.
        """
        clock = asyncio.get_running_loop().time
        began = clock()
        self._end_connections()
        latest = began + min(LINGER_S, timeout_s / 2)
        while True:
            left = min(self._activity.last + QUIET_S, latest) - clock()
            if left <= 0:
                break
            await asyncio.sleep(left)
        left = max(0.0, began + timeout_s - clock())
        self._cutting = asyncio.get_running_loop().call_later(left, self._cut)
        self.config.timeout_graceful_shutdown = math.ceil(left + CUT_S)
        self.should_exit = True

    def _cut(self) -> None:
        """Cancel the requests that still run. The front end answers them, or ends their streams with an error."""
        for each in list(self.server_state.tasks):
            each.cancel()

    def _end_connections(self) -> None:
        if not self._activity.ending:
            self._activity.ending = True
            for each in list(self.server_state.connections):
                each.end()  # type: ignore[union-attr]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listening sockets. What the kernel has accepted for them would be reset: it is served."""
        self._end_connections()
        accepted = [each for listening in sockets or () for each in _accepted(listening)]
        for server in self.servers:
            server.close()
        options = {"config": self.config, "server_state": self.server_state, "app_state": {}}
        loop = asyncio.get_running_loop()
        for each in accepted:
            with contextlib.suppress(OSError):
                await loop.connect_accepted_socket(lambda: Protocol(self._activity, **options), each)
        try:
            await super().shutdown(sockets)
        finally:
            if self._cutting is not None:
                self._cutting.cancel()


def _accepted(listening: socket.socket) -> Iterator[socket.socket]:
    listening.setblocking(False)
    with contextlib.suppress(OSError):
        for _ in range(BACKLOG):
            each, _ = listening.accept()
            each.setblocking(False)
            yield each


def listen(host: str, port: int) -> socket.socket:
    """Open the socket of a server.

    Args:
        host: an address or a name.
        port: the port; 0 for a free one.

    Raises:
        OSError: the address cannot be bound.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listening = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Of Linux. Its connections inherit it.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(UNREAD_S * 1000))
    return listening


def url_of(listening: socket.socket) -> str:
    """The base URL of a server, as this machine reaches it."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def _tuned_interpreter() -> Iterator[None]:
    """Leave what exists now out of garbage collections, and collect after 10,000 new objects instead of 700.

    A request makes some hundred objects and no cycle. With the defaults, collections take 8 to 11 % of the time, and
    the first full one stops the loop for 40 ms or more. A thread that renders a template gives the interpreter to the
    loop after 0.5 ms instead of 5.
    """
    before, interval_s = gc.get_threshold(), sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(interval_s)
        gc.set_threshold(*before)
        gc.unfreeze()


async def serve(
    app: FrontEnd,
    listening: socket.socket,
    *,
    drain_timeout_s: float,
    ready: Callable[[str], Any] = print,
    before_forced_exit: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT; then running requests finish.

    Requests that come after the signal are answered with `Connection: close`, until none has come for `QUIET_S` or
    `LINGER_S` are over. Then no connection is accepted.

    A second signal ends the process at once, with the status 128 and the signal's number. The process collects garbage
    less often meanwhile, see `_tuned_interpreter`.

    Args:
        app: the front end.
        listening: the socket, which this closes.
        drain_timeout_s: seconds that running requests have; then they are cancelled.
        ready: called with the base URL when requests are answered.
        before_forced_exit: called before a second signal ends the process.
    """
    activity = Activity()
    config = uvicorn.Config(
        app,
        http=lambda **options: Protocol(activity, **options),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # Nothing asks for the client's address.
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(drain_timeout_s)),
    )
    server = _Server(config, activity, lambda: ready(url_of(listening)))
    loop = asyncio.get_running_loop()
    first: float | None = None
    draining: asyncio.Task[None] | None = None

    def end(number: int) -> None:
        nonlocal first, draining
        if first is None:
            first = loop.time()
            app.draining = True
            draining = loop.create_task(server.drain(drain_timeout_s), name="trd-http-drain")
            if app.running:
                text = f"draining: {app.running} request(s) may run for at most {drain_timeout_s:g} s; "
                print(text + "a second signal ends them now", file=sys.stderr)
        elif loop.time() - first > ECHO_S:
            sys.stdout.flush()
            before_forced_exit()
            os._exit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    for each in numbers:
        loop.add_signal_handler(each, end, each)
    with _tuned_interpreter():
        serving = asyncio.create_task(server.serve([listening]))
        try:
            await asyncio.shield(serving)
        finally:
            server.should_exit = True
            await asyncio.wait([serving, *([draining] if draining is not None else [])])
            for each in numbers:
                loop.remove_signal_handler(each)
            listening.close()

"""The HTTP server of the status port: threads of its own, so that it answers whatever the rest of the process does.

One thread accepts connections and keeps time; each connection has a thread, so that a request that waits holds up no
other. All is bounded: the connections, the time for a request to arrive and for a response to leave, and their sizes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from triton_distributed.quiet import Quiet
from triton_distributed.status.http import (
    CONTINUE,
    HEAD_BYTES,
    BadRequest,
    Head,
    Request,
    Response,
    error_response,
    parse_head,
    written,
)
from triton_distributed.system.fork import no_fork, own
from triton_distributed.system.loop_thread import tell

logger = logging.getLogger("triton_distributed.status")

State = Literal["waits", "answers", "sends"]

MOST_CONNECTIONS = 32
"""Probes, scrapers and a few people need less. When all places are taken, the connection whose client has let the
server wait longest gives up its place."""

MOST_ANSWERS = 24
"""Requests that are answered at once. The other places are left to `PROBES`, so that code of the program that hangs in
a route, a check or a collector does not make a live process look dead."""

PROBES = ("/live", "/ready")
"""The pages that an orchestrator asks. No code of the program makes them."""

IDLE_S = 75.0
"""Seconds for which a connection may wait for its next request: longer than the usual minute between two scrapes."""

TRANSFER_S = 10.0
"""Seconds in which a request must arrive after its first byte, and in which a response must leave."""

TICK_S = 1.0
"""Seconds between two calls of the server's tick."""

FINISH_S = 0.5
"""Seconds that the end of the server leaves for responses under way."""

QUIET_S = 10.0
"""Seconds between two log entries for errors of one type."""


class HttpServer:
    """Answers HTTP requests in threads.

    Args:
        host: the address to listen on: an IP address, or a name that resolves to one.
        port: the port; 0 for any free one.
        answer: makes the response to a request. It is called in the thread of the request's connection.
        tick: called once in `TICK_S` in the thread that accepts. After it has returned False, the server ends.

    Attributes:
        url: where it listens, e.g. `http://127.0.0.1:9090`.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(
        self,
        host: str,
        port: int,
        answer: Callable[[Request], Response],
        tick: Callable[[], bool],
    ) -> None:
        self._answer, self._tick = answer, tick
        with no_fork:
            self._listener = _listen(host, port)
            self._wakes, self._waker = socket.socketpair()
            for each in (self._listener, self._wakes, self._waker):
                each.setblocking(False)
                own(each)
        bound = self._listener.getsockname()
        self.url = f"http://{f'[{bound[0]}]' if ':' in bound[0] else bound[0]}:{bound[1]}"
        self._local_only = ipaddress.ip_address(bound[0]).is_loopback
        self._lock = threading.Lock()  # Guards the connections and their states.
        self._connections: dict[threading.Thread, Connection] = {}
        self._rejected: deque[socket.socket] = deque()  # Used in the thread that accepts.
        self._stopping = self._over = False
        self._then: Callable[[], object] | None = None
        self._quiet = Quiet(QUIET_S, time.monotonic)
        self._thread = threading.Thread(target=self._run, name="triton-status", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # The process may have no further thread.
            for each in (self._listener, self._wakes, self._waker):
                each.close()
            raise OSError(str(error)) from error

    def stop(self, then: Callable[[], object]) -> None:
        """Begin to end: take no more requests, and let responses under way leave within `FINISH_S`.

        Args:
            then: called at the end, in any thread.
        """
        with self._lock:
            self._stopping, self._then, over = True, then, self._over
        if over:
            then()
        with contextlib.suppress(OSError):  # It has ended already, or is about to wake up anyway.
            self._waker.send(b"\0")

    def join(self, timeout_s: float) -> None:
        """Wait until the thread that accepts has ended, at most for this number of seconds."""
        self._thread.join(timeout_s)

    async def close(self, cancel: Callable[[], object] = lambda: None) -> None:
        """End, at most within two and a half seconds. Responses under way get `FINISH_S` to leave.

        Args:
            cancel: called after `FINISH_S`, or earlier if the server has ended: ends what the responses wait for.
        """
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        self.stop(lambda: tell(loop, ended.set))
        waiting = loop.create_task(ended.wait())
        await asyncio.wait([waiting], timeout=FINISH_S)
        cancel()
        await asyncio.wait([waiting], timeout=2 * FINISH_S + 0.5)
        waiting.cancel()
        self.join(FINISH_S)

    # in the thread that accepts

    def _run(self) -> None:
        due = time.monotonic() + TICK_S
        try:
            with no_fork:
                selector = selectors.DefaultSelector()
                own(selector)
            with selector:
                selector.register(self._listener, selectors.EVENT_READ)
                selector.register(self._wakes, selectors.EVENT_READ)
                while not self._stopping:
                    for key, _ in selector.select(max(0.0, due - time.monotonic())):
                        if key.fileobj is self._listener:
                            self._accept()
                    if (now := time.monotonic()) >= due:
                        due = now + TICK_S
                        self._close_rejected()
                        if not self._tick():
                            break
        except Exception:  # A program must not lose its status port without a word.
            logger.exception("the status port has failed and ends")
        finally:
            self._end()

    def _accept(self) -> None:
        try:
            with no_fork:
                sock, _ = self._listener.accept()
                own(sock)
        except OSError as error:
            if not isinstance(error, BlockingIOError | ConnectionError):
                if self._quiet.due("accept") is not None:
                    logger.warning("the status port cannot accept a connection: %s", error)
                time.sleep(0.05)  # E.g. no descriptor is free: without this the thread would turn without a pause.
            return
        connection = Connection(sock, self)
        thread = threading.Thread(target=self._serve, args=(connection,), name="triton-status-request", daemon=True)
        with self._lock:
            if self._has_place():
                self._connections[thread] = connection
                try:
                    thread.start()
                    return
                except RuntimeError:  # The process may have no further thread.
                    del self._connections[thread]
        with contextlib.suppress(OSError):
            sock.settimeout(0.0)
            sock.send(written(error_response(503, "all connections of the status port are in use"), True, True))
            sock.shutdown(socket.SHUT_WR)
        if len(self._rejected) == MOST_CONNECTIONS:
            self._rejected.popleft().close()
        self._rejected.append(sock)

    def _close_rejected(self) -> None:
        """Close the rejected connections. Closing one at once, before its request has come, would lose the response."""
        while self._rejected:
            self._rejected.popleft().close()

    def _has_place(self) -> bool:
        """Whether one more connection may come; if necessary, cut the one whose client is slowest."""
        if len(self._connections) < MOST_CONNECTIONS:
            return True
        waiting = [each for each in self._connections.values() if each.state != "answers" and not each.was_cut]
        if waiting:
            min(waiting, key=lambda each: each.since).cut()  # Its thread ends in a moment.
        return bool(waiting)

    def _end(self) -> None:
        """Close the listener, then all connections: those that wait at once, the others when they are done."""
        self._stopping = True
        for each in (self._listener, self._wakes, self._waker):
            each.close()
        self._close_rejected()
        with self._lock:
            left = dict(self._connections)
            for connection in left.values():
                if connection.state == "waits":
                    connection.cut()
        end = time.monotonic() + FINISH_S
        for thread in left:
            thread.join(max(0.0, end - time.monotonic()))
        for connection in left.values():
            connection.cut()
        end = time.monotonic() + FINISH_S
        for thread in left:  # One that runs code of the program may go on; it is a daemon.
            thread.join(max(0.0, end - time.monotonic()))
        with self._lock:
            self._over, then = True, self._then
        if then is not None:
            then()

    # in the threads of connections

    def _serve(self, connection: Connection) -> None:
        try:
            connection.serve()
        except OSError:
            pass  # The client is gone or too slow, or the connection was cut.
        except Exception:
            logger.exception("a connection of the status port has failed")
        finally:
            with self._lock:
                self._connections.pop(threading.current_thread(), None)
                connection.sock.close()

    def switch(self, connection: Connection, state: State) -> None:
        """Record what a connection does from now on.

        Raises:
            ConnectionError: the server ends, or the connection was cut, so it must not go on.
        """
        with self._lock:
            if connection.was_cut or (state == "waits" and self._stopping):
                raise ConnectionAbortedError
            if connection.state != state:
                connection.state, connection.since = state, time.monotonic()

    def respond(self, request: Request) -> Response:
        """Make the response to a request; an error of the code that makes it is a response, too."""
        if (reason := self._refused(request)) is not None:
            return error_response(403, reason)
        if request.path.rstrip("/") not in PROBES:
            with self._lock:
                answered = sum(each.state == "answers" for each in self._connections.values())
            if answered > MOST_ANSWERS:
                return error_response(503, f"{MOST_ANSWERS} requests to the status port are being answered already")
        try:
            return self._answer(request)
        except Exception as error:
            if self._quiet.due(type(error).__qualname__) is not None:
                logger.exception("%s %s of the status port failed", request.method, request.path)
            return error_response(500, f"{type(error).__name__}: {error}")

    def _refused(self, request: Request) -> str | None:
        """Why a request is not answered: a page of another site has made a browser send it.

        A port on the loopback address is reached under that address. Another name in `Host` belongs to a page that had
        its own name resolved to this address (DNS rebinding).
        """
        host, origin = request.headers.get("host", ""), request.headers.get("origin", "")
        if self._local_only and host and not _names_this_host(host):
            return f"the Host {host!r} is not this machine: use {self.url}"
        if origin and request.method != "GET" and origin.partition("://")[2] != host:
            return f"a page of {origin!r} may not send {request.method} requests to this port"
        return None


class Connection:
    """One connection of a client.

    Attributes:
        sock: its socket.
        state: `waits` for a request or the rest of one, `answers` it, or `sends` the response.
        since: when that began, on the monotonic clock.
        was_cut: its socket was shut down.
    """

    def __init__(self, sock: socket.socket, server: HttpServer) -> None:
        self.sock, self.was_cut = sock, False
        self.state: State = "waits"
        self.since = time.monotonic()
        self._server = server
        self._received = bytearray()

    def cut(self) -> None:
        """End the connection, in any thread: its own thread then sees the end of the data."""
        self.was_cut = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def serve(self) -> None:
        """Answer requests until the client or the server ends the connection.

        Raises:
            OSError: the connection is lost, or the client is too slow.
        """
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            self._server.switch(self, "waits")
            try:
                if (head := self._head()) is None:
                    return
                request = head.request._replace(body=self._body(head))
            except BadRequest as error:
                self._send(written(error_response(error.status, error.reason), True, True))
                self._linger()
                return
            self._server.switch(self, "answers")
            response = self._server.respond(request)
            self._server.switch(self, "sends")
            self._send(written(response, head.wants_body, head.closes))
            if head.closes:
                return

    def _head(self) -> Head | None:
        """Receive the first line and the headers of a request; None at the end of the connection."""
        end = time.monotonic() + TRANSFER_S
        if not self._received:
            if not self._receive(IDLE_S):
                return None
            end = time.monotonic() + TRANSFER_S
        while (length := self._received.find(b"\r\n\r\n")) < 0:
            if len(self._received) > HEAD_BYTES:
                break
            if not self._receive(end - time.monotonic()):
                return None
        if not 0 <= length <= HEAD_BYTES:
            raise BadRequest(431, f"the headers have more than {HEAD_BYTES:,} bytes")
        data = bytes(self._received[:length])
        del self._received[: length + 4]
        return parse_head(data)

    def _body(self, head: Head) -> bytes:
        end = time.monotonic() + TRANSFER_S
        if head.expects and len(self._received) < head.length:
            self._send(CONTINUE)
        while len(self._received) < head.length:
            if not self._receive(end - time.monotonic()):
                raise ConnectionAbortedError
        data = bytes(self._received[: head.length])
        del self._received[: head.length]
        return data

    def _receive(self, timeout_s: float) -> bool:
        """Receive some bytes; False at the end of the connection."""
        self.sock.settimeout(max(0.001, timeout_s))
        data = self.sock.recv(64 * 1024)
        self._received += data
        return bool(data)

    def _send(self, data: bytes) -> None:
        self.sock.settimeout(TRANSFER_S)  # For all of the data.
        self.sock.sendall(data)

    def _linger(self) -> None:
        """Read on for a moment after a refused request: closing a socket with unread data would lose the response."""
        self.sock.shutdown(socket.SHUT_WR)
        end = time.monotonic() + 1.0
        while time.monotonic() < end and self._receive(end - time.monotonic()):
            self._received.clear()


def _listen(host: str, port: int) -> socket.socket:
    if host == "::" and socket.has_dualstack_ipv6():
        return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)
    flags = socket.AI_PASSIVE
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)[0]
    return socket.create_server(address[:2], family=family)


def _names_this_host(host: str) -> bool:
    """Whether a `Host` header names this machine by an IP address or as localhost."""
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

"""Our wire as an attacker uses it: plain sockets and prepared bytes, without the runtime's sessions."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterator

from triton_distributed.names import EndpointName
from triton_distributed.wire import frames as f
from triton_distributed.wire.hello import Hello, hello_frame

HELLO = hello_frame(Hello(window=256 * 1024))
WORKER = "hostile.worker"
FOREVER = float("inf")
READ = 1 << 18
PATIENCE_S = 2.0  # Seconds after which a connection that is neither accepted nor refused counts as refused.


def key(endpoint: str) -> int:
    """The key of one of the worker's endpoints in a request."""
    return EndpointName.parse(f"{WORKER}.{endpoint}").key


def request(
    stream: int, endpoint: int, body: bytes = b"\xc0", flags: int = f.END, window: int = 65536, metadata: bytes = b""
) -> bytes:
    """A REQUEST frame. The worker's discovery is static, so any instance id is valid."""
    prefix = f.REQUEST_PREFIX.pack(1, endpoint, FOREVER, window, len(metadata))
    return f.frame(f.REQUEST, stream, prefix + metadata + body, flags)


def connect(address: str, *said: bytes, receive_bytes: int = 0) -> socket.socket | None:
    """Return a non-blocking connection on which `said` was sent; None if the worker does not accept it.

    Args:
        address: `tcp://host:port` or `unix:///path`.
        receive_bytes: the size of the kernel's receive buffer; 0 for the kernel's default.
    """
    scheme, _, rest = address.partition("://")
    sock = socket.socket(socket.AF_UNIX if scheme == "unix" else socket.AF_INET)
    try:
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.settimeout(PATIENCE_S)
        host, _, port = rest.rpartition(":")
        sock.connect(rest if scheme == "unix" else (host, int(port)))
        sock.setblocking(False)
        for each in said:
            sock.sendall(each)
        return sock
    except OSError:
        sock.close()
        return None


def drop(sock: socket.socket) -> bool:
    """Read and drop what has arrived. False if the worker has closed the connection."""
    try:
        while data := sock.recv(READ):
            if len(data) < READ:
                return True
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def ended(sock: socket.socket) -> bool:
    """Whether the worker has closed a connection that is not read."""
    try:
        return sock.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def pour(sock: socket.socket, data: bytes, until: float, read: bool = True) -> bool:
    """Send all of `data`; if `read`, read and drop the answers meanwhile.

    Returns:
        whether all was sent; False if the worker has closed the connection, or the time is over.
    """
    view = memoryview(data)
    while view:
        if time.monotonic() > until:
            return False
        if read and not drop(sock):
            return False
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            select.select([sock] if read else [], [sock], [], 0.1)
        except OSError:
            return False
    return True


class Crowd:
    """Many connections that are opened again when the worker ends them.

    Args:
        number: the number of connections to keep.
        open: makes a connection; returns None if it is refused.

    Attributes:
        opened, closed, refused: how often each of these happened.
    """

    def __init__(self, number: int, open: Callable[[], socket.socket | None]) -> None:
        self.number, self._open = number, open
        self.socks: list[socket.socket] = []
        self.opened = self.closed = self.refused = 0

    def fill(self, until: float) -> None:
        """Open the missing connections."""
        while len(self.socks) < self.number and time.monotonic() < until:
            sock = self._open()
            if sock is None:
                self.refused += 1
                return
            self.socks.append(sock)
            self.opened += 1

    def sweep(self, gone: Callable[[socket.socket], bool] = lambda sock: not drop(sock)) -> None:
        """Drop the connections that the worker has closed."""
        left = []
        for sock in self.socks:
            if gone(sock):
                sock.close()
                self.closed += 1
            else:
                left.append(sock)
        self.socks = left

    def close(self) -> None:
        for sock in self.socks:
            sock.close()
        self.socks = []


@contextlib.contextmanager
def crowd(number: int, open: Callable[[], socket.socket | None]) -> Iterator[Crowd]:
    """Yield a crowd, and close it when the block is left."""
    made = Crowd(number, open)
    try:
        yield made
    finally:
        made.close()

"""Accepts connections from a listening socket, a few in each turn, on any event loop.

The loops' own servers accept until the kernel has no more, up to 4,096 in one turn, so peers that connect as fast as
they can would occupy the loop. And if descriptors run out, asyncio logs a traceback for each attempt, and uvloop may
close the listening socket for good.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import sys
from collections.abc import Callable
from typing import Any, cast

from triton_distributed.quiet import Quiet
from triton_distributed.system.fork import own
from triton_distributed.system.protocol import StreamProtocol

logger = logging.getLogger("triton_distributed.transport")

# A turn of the loop accepts at most this many connections. Each costs about 0.1 ms in all.
MOST_A_TURN = 2
# Accepting pauses for this many seconds after descriptors or memory ran out.
PAUSE_S = 0.1
# Two log lines about such a pause are at least this many seconds apart.
EVERY_S = 10.0
# This many descriptors stay reserved for the runtime itself when peers use all others: discovery files, etcd, NATS.
DESCRIPTORS_KEPT = 64
_RAN_OUT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def most_descriptors() -> int:
    """Return this process' current limit of descriptors (`ulimit -n`)."""
    if sys.platform == "win32":
        return sys.maxsize
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


class Acceptor:
    """A listening socket that passes its connections to protocols.

    Args:
        loop: the running loop.
        sock: the socket, bound and listening; `close` closes it.
        factory: makes the protocol of a connection. Its argument is True if few descriptors are left.
        ran_out: called when there is no descriptor for a connection, to free some.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        factory: Callable[[bool], StreamProtocol],
        ran_out: Callable[[], None],
    ) -> None:
        self._loop, self._factory, self._ran_out = loop, factory, ran_out
        self._joining: set[asyncio.Task[Any]] = set()  # at most `MOST_A_TURN` a turn, and each lasts two
        self._pause: asyncio.TimerHandle | None = None
        self._ran_out_of = Quiet(EVERY_S, loop.time)
        own(sock)
        self.sock = sock
        sock.setblocking(False)
        loop.add_reader(sock.fileno(), self._readable)

    def _readable(self) -> None:
        for _ in range(MOST_A_TURN):
            try:
                sock, _ = self.sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _RAN_OUT:
                    self._wait(error)
                    return
                continue  # that connection failed before it was accepted
            sock.setblocking(False)
            few = sock.fileno() >= most_descriptors() - DESCRIPTORS_KEPT  # the kernel gives the lowest free number
            task = self._loop.create_task(self._join(sock, few))
            self._joining.add(task)
            task.add_done_callback(self._joining.discard)

    async def _join(self, sock: socket.socket, few: bool) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: cast(asyncio.Protocol, self._factory(few)), sock)
        except OSError as error:  # the connection is gone already
            logger.debug("a connection was lost while being accepted: %s", error)
            sock.close()

    def _wait(self, error: OSError) -> None:
        if self._ran_out_of.due() is not None:
            logger.warning("cannot accept connections: %s; see `ulimit -n` and TRD_MAX_SESSIONS", error)
        self._loop.remove_reader(self.sock.fileno())
        self._pause = self._loop.call_later(PAUSE_S, self._go_on)
        self._ran_out()

    def _go_on(self) -> None:
        self._pause = None
        self._loop.add_reader(self.sock.fileno(), self._readable)

    def close(self) -> None:
        """Stop accepting; connections that were already accepted still get their sessions."""
        if self._pause is not None:
            self._pause.cancel()
        if self.sock.fileno() >= 0:
            self._loop.remove_reader(self.sock.fileno())
            self.sock.close()

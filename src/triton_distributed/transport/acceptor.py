"""Takes connections off a listening socket, some a turn, whatever the loop is.

The loops' own servers accept until the kernel has none left, up to 4,096 in one turn, so that whoever connects as fast
as he can keeps the loop. And where descriptors run out asyncio logs a traceback for each, and uvloop may close the
listening socket for good.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

from triton_distributed.quiet import Quiet
from triton_distributed.system.fork import own

logger = logging.getLogger("triton_distributed.transport")

# One takes some 0.1 ms in all. So a crowd has a tenth of the loop, and gets in where turns are long, too: its clients'
# patience is a few seconds.
EVERY_ACCEPT_S = 0.001
MOST_A_TURN = 8
PAUSE_S = 0.1  # where descriptors or memory ran out
EVERY_S = 10.0  # seconds between two lines that say so
# What the runtime itself may need while peers have taken all that they may: files of discovery, etcd, NATS.
DESCRIPTORS_KEPT = 64
_RAN_OUT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def most_descriptors() -> int:
    """The number below which this process' descriptors are, as it is now (`ulimit -n`)."""
    if sys.platform == "win32":
        return sys.maxsize
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


class Acceptor:
    """A listening socket and what becomes of its connections.

    Args:
        loop: the running loop.
        sock: bound and listening; it is closed here.
        factory: makes the protocol of a connection. Its argument says that few descriptors are left.
        ran_out: called when there were none for a connection, to free some.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        factory: Callable[[bool], asyncio.BaseProtocol],
        ran_out: Callable[[], None],
    ) -> None:
        self._loop, self._factory, self._ran_out = loop, factory, ran_out
        self._joining: set[asyncio.Task[Any]] = set()  # at most `MOST_A_TURN` a turn, and each lasts two
        self._looked = perf_counter()
        self._pause: asyncio.TimerHandle | None = None
        self._ran_out_of = Quiet(EVERY_S, loop.time)
        own(sock)
        self.sock = sock
        sock.setblocking(False)
        loop.add_reader(sock.fileno(), self._readable)

    def _readable(self) -> None:
        before, self._looked = self._looked, perf_counter()
        for _ in range(min(MOST_A_TURN, 1 + int((self._looked - before) / EVERY_ACCEPT_S))):
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
            few = sock.fileno() >= most_descriptors() - DESCRIPTORS_KEPT  # the kernel gives the lowest that is free
            task = self._loop.create_task(self._join(sock, few))
            self._joining.add(task)
            task.add_done_callback(self._joining.discard)

    async def _join(self, sock: socket.socket, few: bool) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: self._factory(few), sock)
        except OSError as error:  # it is gone already
            logger.debug("a connection was lost while it was accepted: %s", error)
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
        """Accept nothing more; what was accepted is joined still."""
        if self._pause is not None:
            self._pause.cancel()
        if self.sock.fileno() >= 0:
            self._loop.remove_reader(self.sock.fileno())
            self.sock.close()

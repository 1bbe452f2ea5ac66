"""The Unix sockets of a listener, kept where clients look for them.

A socket whose file is deleted, moved or replaced listens on, but nobody can connect to it any more. So the files are
looked at all the time, which costs some 4 µs a look, and a socket that is not in place is made again under its name.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from triton_distributed.errors import TritonError
from triton_distributed.system import unix_sockets
from triton_distributed.transport.acceptor import Acceptor

logger = logging.getLogger("triton_distributed.transport")

# With the next two, the socket of a worker is back before its record is: see `SETTLE_S` of `discovery.file.backend`.
CHECK_S = 0.25
RETRY_S = 5.0  # between two attempts where a socket cannot be made again
SETTLE_S = 0.3  # after which whoever removes a folder with all its files has done it: a new file would make it fail


@dataclass(slots=True)
class _Kept:
    """One address.

    Attributes:
        missing: the last look found no socket in its place.
        lost: why nobody can connect to it, where it could not be made again; else empty.
    """

    path: Path
    make_folder: Callable[[], object]
    inode: int
    acceptor: Acceptor
    missing: bool = False
    lost: str = ""
    retry_at: float = 0.0

    def found(self) -> None:
        self.missing, self.lost, self.retry_at = False, "", 0.0


class KeptSockets:
    """Listens on Unix sockets, and again on those whose files were removed.

    Args:
        loop: the running loop.
        take: makes the acceptor of a listening socket.
        looked: called after each look.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, take: Callable[[socket.socket], Acceptor], looked: Callable[[], None]
    ) -> None:
        self._loop, self._take, self._looked = loop, take, looked
        self._kept: list[_Kept] = []  # one an address
        # Replaced at the last look. Clients that had connected by then are accepted until the next one.
        self._replaced: list[Acceptor] = []
        self._timer: asyncio.TimerHandle | None = None

    def add(self, path: Path, make_folder: Callable[[], object] | None) -> None:
        """Listen on one more path.

        Args:
            make_folder: makes the folder of the path, or checks it, whenever the socket has to be made again; None to
                make it as it is now.

        Raises:
            OSError: the path cannot be bound, or a living worker listens there.
        """
        make_folder = make_folder or _as_it_is(path.parent)
        sock, inode = unix_sockets.claim(path)
        self._kept.append(_Kept(path, make_folder, inode, self._take(sock)))
        if self._timer is None:
            self._timer = self._loop.call_later(CHECK_S, self._look)

    def reached(self, addresses: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the worker's addresses under which it can be reached now.

        A Unix address that is not listened on is another name of one that is, see `TRD_ADVERTISE`.
        """
        lost = {f"unix://{each.path}" for each in self._kept if each.lost}
        if not lost:
            return addresses
        none_left = len(lost) == len(self._kept)
        return tuple(each for each in addresses if not (each.startswith("unix:") and (none_left or each in lost)))

    def _look(self) -> None:
        for acceptor in self._replaced:
            acceptor.close()
        self._replaced.clear()
        next_look_s = CHECK_S
        try:
            for each in self._kept:
                if unix_sockets.in_place(each.path, each.inode):
                    each.found()
                elif not each.missing:
                    each.missing, next_look_s = True, SETTLE_S
                elif self._loop.time() >= each.retry_at:
                    self._restore(each)
        finally:
            self._timer = self._loop.call_later(next_look_s, self._look)
        self._looked()

    def _restore(self, kept: _Kept) -> None:
        try:
            kept.make_folder()
            if unix_sockets.in_place(kept.path, kept.inode):  # its folder could not be entered, and can be again
                kept.found()
                return
            sock, inode = unix_sockets.claim(kept.path, clean=False)
        except (OSError, TritonError) as error:
            kept.retry_at = self._loop.time() + RETRY_S
            if kept.lost != str(error):
                kept.lost = str(error)
                words = "nobody can connect to unix://%s, its file is gone and cannot be made again yet: %s"
                logger.warning(words, kept.path, error)
            return
        self._replaced.append(kept.acceptor)
        kept.acceptor, kept.inode = self._take(sock), inode
        kept.found()
        logger.info("socket %s was removed and is made again", kept.path)

    def close(self) -> None:
        """Listen no more, and remove the files."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for acceptor in (*self._replaced, *(each.acceptor for each in self._kept)):
            acceptor.close()
        for each in self._kept:
            unix_sockets.remove(each.path, each.inode)
        self._replaced.clear()
        self._kept.clear()


def _as_it_is(folder: Path) -> Callable[[], None]:
    """Makes a folder again with the mode that it has now; one of another user in its place is refused."""
    before = folder.stat()

    def make() -> None:
        try:
            folder.mkdir(parents=True)
            folder.chmod(stat.S_IMODE(before.st_mode))
        except FileExistsError:
            pass
        owner = folder.stat().st_uid
        if owner not in (before.st_uid, os.geteuid()):
            raise PermissionError(errno.EPERM, f"{folder} belongs to uid {owner} now, it was uid {before.st_uid}'s")

    return make

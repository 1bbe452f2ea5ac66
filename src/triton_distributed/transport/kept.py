"""The Unix sockets of a listener, kept at their paths.

A socket whose file is deleted, moved or replaced goes on listening, but no client can connect to it any more. So the
files are checked regularly, at about 4 µs a check, and a socket that is not in place is made again at its path.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec

from triton_distributed.errors import TritonError
from triton_distributed.system import unix_sockets
from triton_distributed.transport.acceptor import Acceptor

logger = logging.getLogger("triton_distributed.transport")

# Seconds between checks of the files. Together with `SETTLE_S` this restores a worker's socket before its record: see
# `SETTLE_S` of `discovery.file.backend`.
CHECK_S = 0.25
# Seconds until the next attempt if a socket cannot be made again.
RETRY_S = 5.0
# Seconds between the check that finds that a socket is gone and its recreation. A file created during an `rm -r` of its
# folder would make the `rm` fail.
SETTLE_S = 0.3


class _Kept(msgspec.Struct):
    """One address.

    Attributes:
        missing: the last check found no socket at its path.
        lost: why the socket could not be made again; empty if clients can connect.
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
    """Listens on Unix sockets, and recreates those whose files were removed.

    Args:
        loop: the running loop.
        take: makes the acceptor of a listening socket.
        looked: called after each check.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, take: Callable[[socket.socket], Acceptor], looked: Callable[[], None]
    ) -> None:
        self._loop, self._take, self._looked = loop, take, looked
        self._kept: list[_Kept] = []  # one for each address
        # Replaced at the last check. Clients that had connected by then are accepted until the next check.
        self._replaced: list[Acceptor] = []
        self._timer: asyncio.TimerHandle | None = None

    def add(self, path: Path, make_folder: Callable[[], object] | None) -> None:
        """Listen on one more path.

        Args:
            make_folder: makes or checks the folder of the path whenever the socket must be made again; None to make it
                as it is now.

        Raises:
            OSError: the path cannot be bound, or a live worker listens there.
        """
        make_folder = make_folder or _as_it_is(path.parent)
        sock, inode = unix_sockets.claim(path)
        self._kept.append(_Kept(path, make_folder, inode, self._take(sock)))
        if self._timer is None:
            self._timer = self._loop.call_later(CHECK_S, self._look)

    def reached(self, addresses: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of the worker's addresses at which clients can reach it now.

        A published Unix address without a socket here is an alias of one that has a socket, see `TRD_ADVERTISE`.
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
            if unix_sockets.in_place(kept.path, kept.inode):  # its folder was inaccessible for a while
                kept.found()
                return
            sock, inode = unix_sockets.claim(kept.path, clean=False)
        except (OSError, TritonError) as error:
            kept.retry_at = self._loop.time() + RETRY_S
            if kept.lost != str(error):
                kept.lost = str(error)
                words = "no client can connect to unix://%s: its file is gone and cannot be made again yet: %s"
                logger.warning(words, kept.path, error)
            return
        self._replaced.append(kept.acceptor)
        kept.acceptor, kept.inode = self._take(sock), inode
        kept.found()
        logger.info("socket %s was removed and is made again", kept.path)

    def remove_files(self) -> None:
        """Remove the files, because the process ends at once. Any thread may call this, at any point."""
        for each in list(self._kept):
            unix_sockets.remove(each.path, each.inode)

    def close(self) -> None:
        """Stop listening, and remove the files."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for acceptor in (*self._replaced, *(each.acceptor for each in self._kept)):
            acceptor.close()
        self.remove_files()
        self._replaced.clear()
        self._kept.clear()


def _as_it_is(folder: Path) -> Callable[[], None]:
    """Return a function that makes a folder again with its present mode; it refuses a folder of another user."""
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

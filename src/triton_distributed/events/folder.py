"""The processes that listen on this machine: a folder with a socket for each process and a mark for each subscription.

    0123456789abcdef.sock                      the socket on which the process listens
    <32 hex digits>.0123456789abcdef.mark      the process has subscribed to the subject with this hash; the file
                                               contains the subject

A publisher checks the folder's time of change before each event, and reads the folder again only if it differs. So it
sees each subscription that was live before it published, at the cost of one system call.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

_SOCKET = re.compile(r"([0-9a-f]{16})\.sock")
_MARK = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{16})\.mark")
# Nanoseconds after which a folder's time of change is trusted, on file systems with fine and coarse times. Two changes
# within one tick of the kernel's clock leave the same time: 10 ms at worst on Linux, two seconds on file systems that
# count whole seconds.
TICK_NS = 50_000_000
COARSE_TICK_NS = 2_500_000_000


@functools.lru_cache(maxsize=4096)  # Cached because a hash costs 2 µs. A program has few subjects.
def subject_hash(subject: str) -> str:
    """The hash of a subject, used in file names, which have at most 255 bytes."""
    from blake3 import blake3  # Imported late, as in `names`.

    digest: str = blake3(subject.encode()).hexdigest()
    return digest[:32]


class SubscriberFolder:
    """Reads and writes the folder. It uses no sockets and no event loop.

    Args:
        check: called if another folder is found under the path; it raises if that folder must not be used.
    """

    def __init__(self, path: Path, check: Callable[[], object] = lambda: None) -> None:
        self.path = path
        self._name = str(path)
        self._check = check
        self._seen = -1  # The folder's time of change at the last read; -1 if it cannot be trusted.
        self._number = -1  # The folder's inode.
        self._interested: dict[str, tuple[str, ...]] = {}
        self._complete = (-1, -1)  # Inode and time of change of the folder when all own marks were last found.
        self.listening: set[str] = set()  # The processes that had a socket at the last read.
        self.reads = 0  # Number of reads of the folder.

    def interested(self, subject: str) -> tuple[str, ...]:
        """The ids of the processes that have subscribed to a subject.

        Raises:
            OSError: the folder is gone, or cannot be read.
        """
        found = os.stat(self._name)
        if found.st_mtime_ns != self._seen or found.st_ino != self._number:
            self._read()
        return self._interested.get(subject_hash(subject), ())

    def _read(self) -> None:
        self.reads += 1
        now = time.time_ns()
        folder = os.stat(self._name)
        if folder.st_ino != self._number:
            self._check()
            self._number = folder.st_ino
        changed = folder.st_mtime_ns
        found: dict[str, list[str]] = {}
        listening = set()
        for name in os.listdir(self._name):
            if mark := _MARK.fullmatch(name):
                found.setdefault(mark[1], []).append(mark[2])
            elif socket := _SOCKET.fullmatch(name):
                listening.add(socket[1])
        self.listening = listening
        self._interested = {subject: tuple(sorted(ids)) for subject, ids in found.items()}
        self._seen = changed if _is_sure(changed, now) else -1

    def socket(self, id: str) -> Path:
        """The path of a process's socket."""
        return self.path / f"{id}.sock"

    def _mark(self, id: str, subject: str) -> Path:
        return self.path / f"{subject_hash(subject)}.{id}.mark"

    def add(self, id: str, subject: str) -> None:
        """Make the mark of a subscription.

        Raises:
            OSError: the mark cannot be made.
        """
        fd = os.open(self._mark(id, subject), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, subject.encode())
        finally:
            os.close(fd)

    def missing(self, id: str, subjects: Iterable[str]) -> list[str]:
        """The subjects of a process that have no mark. It reads the folder only if the folder may have changed.

        Raises:
            OSError: the folder is gone, or cannot be read.
        """
        now = time.time_ns()
        folder = os.stat(self._name)
        if (folder.st_ino, folder.st_mtime_ns) == self._complete:
            return []
        names = set(os.listdir(self._name))
        lacking = [each for each in subjects if self._mark(id, each).name not in names]
        if not lacking and _is_sure(folder.st_mtime_ns, now):
            self._complete = (folder.st_ino, folder.st_mtime_ns)
        return lacking

    def is_private(self) -> bool:
        """Whether the folder still has the mode with which it was made; publishers refuse any other mode.

        Raises:
            OSError: the folder is gone.
        """
        return os.stat(self._name).st_mode & 0o777 == 0o700

    def remove(self, id: str, subject: str) -> None:
        """Remove the mark of a subscription."""
        with contextlib.suppress(OSError):
            self._mark(id, subject).unlink()

    def forget(self, id: str) -> None:
        """Remove all files of a dead process, its socket last: without it, no process would check the marks again."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self._name):
                if (mark := _MARK.fullmatch(name)) and mark[2] == id:
                    with contextlib.suppress(OSError):
                        (self.path / name).unlink()
            self.socket(id).unlink()

    def orphans(self) -> set[str]:
        """The ids that have marks but no socket: their processes are dead and their sockets were removed."""
        names = set(os.listdir(self._name))
        return {mark[2] for name in names if (mark := _MARK.fullmatch(name)) and f"{mark[2]}.sock" not in names}


def _is_sure(changed_ns: int, now_ns: int) -> bool:
    """Whether a later change of a folder that is read now will give it another time of change."""
    return changed_ns < now_ns - (TICK_NS if changed_ns % 1_000_000_000 else COARSE_TICK_NS)

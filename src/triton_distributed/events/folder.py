"""Which processes listen on this machine: a folder with a socket for each one and a mark for each subscription.

    0123456789abcdef.sock                      the process listens here
    <32 hex digits>.0123456789abcdef.mark      it has subscribed to what has this hash; the file names it

A publisher looks at the folder's time of change before each event and reads the folder again only if it differs, so
it sees each subscription that was live before it published, at the cost of one system call.
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
# Two changes within one tick of the kernel's clock leave the same time: 10 ms at worst on Linux, two seconds on file
# systems that count whole seconds. A time is only trusted when it is older than that.
TICK_NS = 50_000_000
COARSE_TICK_NS = 2_500_000_000


@functools.lru_cache(maxsize=4096)  # subjects of one program; finding a hash again costs 2 µs
def subject_hash(subject: str) -> str:
    """What a subject is called in the folder, where names have at most 255 bytes."""
    from blake3 import blake3  # as in `names`

    digest: str = blake3(subject.encode()).hexdigest()
    return digest[:32]


class SubscriberFolder:
    """Reads and writes the folder. No sockets, no loop.

    Args:
        check: called where another folder is found under the path than before; it raises where that is not to be used.
    """

    def __init__(self, path: Path, check: Callable[[], object] = lambda: None) -> None:
        self.path = path
        self._name = str(path)
        self._check = check
        self._seen = -1  # the time of change that `_interested` belongs to, -1 while it cannot be trusted
        self._number = -1  # the folder's inode
        self._interested: dict[str, tuple[str, ...]] = {}
        self._complete = (-1, -1)  # inode and time of change of the folder in which every mark of ours was found
        self.listening: set[str] = set()  # the processes that had a socket when the folder was read last
        self.reads = 0  # how often that was

    def interested(self, subject: str) -> tuple[str, ...]:
        """The ids of the processes that have subscribed.

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
        """Where a process listens."""
        return self.path / f"{id}.sock"

    def _mark(self, id: str, subject: str) -> Path:
        return self.path / f"{subject_hash(subject)}.{id}.mark"

    def add(self, id: str, subject: str) -> None:
        """Publish a subscription.

        Raises:
            OSError: the file cannot be made.
        """
        fd = os.open(self._mark(id, subject), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, subject.encode())
        finally:
            os.close(fd)

    def missing(self, id: str, subjects: Iterable[str]) -> list[str]:
        """Those subjects of a process that have no mark. Reads the folder only where it may have changed.

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
        """Whether its mode is what it was made with: publishers refuse it otherwise.

        Raises:
            OSError: the folder is gone.
        """
        return os.stat(self._name).st_mode & 0o777 == 0o700

    def remove(self, id: str, subject: str) -> None:
        """Take a subscription back."""
        with contextlib.suppress(OSError):
            self._mark(id, subject).unlink()

    def forget(self, id: str) -> None:
        """Remove all files of a dead process, its socket last: without it, no process would check the others again."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self._name):
                if (mark := _MARK.fullmatch(name)) and mark[2] == id:
                    with contextlib.suppress(OSError):
                        (self.path / name).unlink()
            self.socket(id).unlink()

    def orphans(self) -> set[str]:
        """Ids that have marks and no socket: their sockets were swept, so they are dead."""
        names = set(os.listdir(self._name))
        return {mark[2] for name in names if (mark := _MARK.fullmatch(name)) and f"{mark[2]}.sock" not in names}


def _is_sure(changed_ns: int, now_ns: int) -> bool:
    """Whether a folder that was read now and changes later gets another time of change than this one."""
    return changed_ns < now_ns - (TICK_NS if changed_ns % 1_000_000_000 else COARSE_TICK_NS)

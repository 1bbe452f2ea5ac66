"""The records that this process has registered: files that it holds open for writing and locked.

The kernel drops the lock and closes the file however the process ends, which is all that others need to see it dead;
a process that is only stopped keeps both.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import weakref

from triton_distributed.discovery import record
from triton_distributed.names import Instance

_numbers = itertools.count()


class HeldRecord:
    """One record of ours.

    Args:
        folder: where records lie; it exists.
        instance: what is registered.

    Raises:
        OSError: it cannot be written; nothing is left behind.
        BadRecord: the instance cannot be written down.
    """

    __slots__ = ("__weakref__", "_fd", "_inode", "instance", "key", "path")

    def __init__(self, folder: str, instance: Instance) -> None:
        data = record.encode(instance, os.getpid())
        self.instance = instance
        self.key = record.key(instance.endpoint, instance.id)
        self.path = os.path.join(folder, self.key)
        temporary = os.path.join(folder, f".{instance.id:016x}-{os.getpid()}-{next(_numbers)}.tmp")
        self._fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            # Locked before it has its name: nobody ever sees a living worker's record unlocked.
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            while data:
                data = data[os.write(self._fd, data) :]
            self._inode = os.fstat(self._fd).st_ino
            os.rename(temporary, self.path)
        except BaseException:
            os.close(self._fd)
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _held.add(self)

    @property
    def in_place(self) -> bool:
        """Whether the file under our name is still ours."""
        try:
            return os.lstat(self.path).st_ino == self._inode
        except OSError:
            return False

    def release(self) -> None:
        """Close the file: to everybody else the record is now dead."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def remove(self) -> None:
        """Delete the file, unless somebody has put another in its place, and close it."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                if self.in_place:
                    os.unlink(self.path)
        self.release()


# A forked child inherits the open files, and the lock lasts as long as any copy: a killed parent would look alive for
# as long as its child lives. Hooks cannot be taken back, so there is one, and it finds what is held.
_held: weakref.WeakSet[HeldRecord] = weakref.WeakSet()


def release_in_child() -> None:
    """Close every inherited record; the parent's lock stays."""
    for each in list(_held):
        each.release()


os.register_at_fork(after_in_child=release_in_child)

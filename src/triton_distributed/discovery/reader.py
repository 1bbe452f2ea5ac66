"""Other processes' records: read with suspicion, and judged alive or dead by their locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time

from triton_distributed.discovery import record
from triton_distributed.names import Instance

_log = logging.getLogger("triton_distributed.discovery")

STALE_TEMPORARY_S = 60.0  # a record is written in microseconds; one unfinished for that long has lost its writer
MOST_WARNED = 1024  # bad records remembered, so that each is warned about once


class RecordReader:
    """Reads the records of one folder.

    Args:
        folder: where they lie.
        where: the discovery, for warnings.
    """

    def __init__(self, folder: str, where: str) -> None:
        self._folder = folder
        self._where = where
        self._warned: dict[str, tuple[int, int]] = {}  # key: inode and time of the bad record

    def read(self, key: str) -> Instance | None:
        """The living instance under this key; None where there is none.

        A dead one's record is deleted. One that is foreign, or cannot be read, is left where it is, with one warning.
        """
        path = os.path.join(self._folder, key)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            self._warned.pop(key, None)
            return None
        except OSError as error:
            link = error.errno in (errno.ELOOP, errno.EMLINK)
            self._warn(key, (0, 0), "it is a symbolic link" if link else f"it cannot be opened: {error.strerror}")
            return None
        try:
            return self._judge(key, path, fd)
        finally:
            os.close(fd)

    def _judge(self, key: str, path: str, fd: int) -> Instance | None:
        found = os.fstat(fd)
        stamp = (found.st_ino, found.st_mtime_ns)
        if not stat.S_ISREG(found.st_mode):
            self._warn(key, stamp, "it is not a regular file")
            return None
        if found.st_uid != os.getuid():
            self._warn(key, stamp, f"it belongs to uid {found.st_uid}, not to uid {os.getuid()}")
            return None
        try:
            instance = record.decode(os.read(fd, record.MAX_RECORD_BYTES + 1))
            if record.key(instance.endpoint, instance.id) != key:
                raise record.BadRecord("its content does not belong to its name")
        except record.BadRecord as error:
            self._warn(key, stamp, str(error))
            return None
        except OSError as error:
            self._warn(key, stamp, f"it cannot be read: {error.strerror}")
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:  # its owner holds the lock
            return instance
        with contextlib.suppress(OSError):
            if os.lstat(path).st_ino == found.st_ino:  # not a new one that took the dead one's place meanwhile
                os.unlink(path)
        return None

    def remove_temporary(self, name: str) -> None:
        """Delete what a writer left that was killed in the middle."""
        path = os.path.join(self._folder, name)
        with contextlib.suppress(OSError):
            if time.time() - os.lstat(path).st_mtime > STALE_TEMPORARY_S:
                os.unlink(path)

    def _warn(self, key: str, stamp: tuple[int, int], reason: str) -> None:
        if self._warned.get(key) == stamp:
            return
        if len(self._warned) >= MOST_WARNED:
            self._warned.pop(next(iter(self._warned)))
        self._warned[key] = stamp
        _log.warning("%s: record %s is skipped: %s", self._where, key, reason)

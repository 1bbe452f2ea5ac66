"""Notifications from the kernel about the names in one folder that have changed.

This works on Linux only. On other systems `Inotify()` raises OSError.
"""

from __future__ import annotations

import errno
import os
import struct
import sys

from triton_distributed.system.fork import no_fork, own

IN_CLOSE_WRITE = 0x0008
IN_MOVED_FROM = 0x0040
IN_MOVED_TO = 0x0080
IN_DELETE = 0x0200
IN_DELETE_SELF = 0x0400
IN_MOVE_SELF = 0x0800
IN_Q_OVERFLOW = 0x4000
IN_IGNORED = 0x8000
IN_ONLYDIR = 0x01000000

# There is no IN_CREATE, because a file that is being written does not count until it is renamed. There is no
# IN_CLOSE_NOWRITE, because every reader's close would wake every reader.
FOLDER_MASK = (
    IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_DELETE | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR
)  # fmt: skip

_HEADER = struct.Struct("iIII")  # Fields: watch, mask, cookie, bytes of the name.

_READ_BYTES = 16 * 1024
"""Bytes read at a time: about 200 events, or 3 ms of looking at files. Other callbacks run before the next read."""


class Inotify:
    """One inotify instance that watches one folder at a time. A user may have 128 instances by default.

    Raises:
        OSError: this system has no inotify (ENOSYS), or no instance is left (EMFILE: `fs.inotify.max_user_instances`).
    """

    def __init__(self) -> None:
        with no_fork:
            import ctypes  # Its import takes a millisecond, and a runtime that watches no folder needs none.

        self._ctypes = ctypes
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._watch = -1
        self.fd = -1
        if not sys.platform.startswith("linux") or not hasattr(self._libc, "inotify_init1"):
            raise OSError(errno.ENOSYS, "this system has no inotify")
        with no_fork:
            self.fd = self._check(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
            own(self)

    def fileno(self) -> int:
        """The descriptor; -1 when it is closed."""
        return self.fd

    def watch_folder(self, path: str) -> None:
        """Watch this folder instead of the previous one.

        Raises:
            OSError: the path does not exist or is not a folder, or no watch is left (ENOSPC:
                `fs.inotify.max_user_watches`).
        """
        mask = self._ctypes.c_uint32(FOLDER_MASK)
        found = self._check(self._libc.inotify_add_watch(self.fd, os.fsencode(path), mask))
        if self._watch not in (-1, found):
            self._libc.inotify_rm_watch(self.fd, self._watch)  # It fails harmlessly if the old folder is gone.
        self._watch = found

    def read(self) -> tuple[dict[str, int], int]:
        """Return the events since the last read. This never waits.

        Returns:
            The changed names, each with its masks combined, and the masks of the folder or the queue.
        """
        try:
            data = os.read(self.fd, _READ_BYTES)
        except BlockingIOError:
            return {}, 0
        names: dict[str, int] = {}
        folder = offset = 0
        while offset < len(data):
            watch, mask, _, length = _HEADER.unpack_from(data, offset)
            offset += _HEADER.size + length
            if watch not in (self._watch, -1):  # A folder watched earlier; -1 means overflow.
                continue
            if length:
                name = os.fsdecode(data[offset - length : offset].rstrip(b"\0"))
                names[name] = names.get(name, 0) | mask
            else:
                folder |= mask
        return names, folder

    def close(self) -> None:
        """Close the instance. Closing twice is harmless."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _check(self, result: int) -> int:
        if result < 0:
            number = self._ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

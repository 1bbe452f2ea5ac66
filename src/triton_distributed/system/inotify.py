"""The kernel's word about one folder: which of its names have changed.

Linux only; elsewhere `Inotify()` raises OSError.
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

# No IN_CREATE: a file that is being written does not count until it is renamed. No IN_CLOSE_NOWRITE: every
# reader's close would wake every reader.
FOLDER_MASK = (
    IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_DELETE | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR
)  # fmt: skip

_HEADER = struct.Struct("iIII")  # watch, mask, cookie, bytes of name

_READ_BYTES = 16 * 1024
"""Bytes read at a time: some 200 events, 3 ms of looking at files. Other callbacks run before the rest is read."""


class Inotify:
    """One inotify instance that watches one folder at a time. A user has 128 of them by default.

    Raises:
        OSError: there is no inotify here (ENOSYS), or none is left (EMFILE: `fs.inotify.max_user_instances`).
    """

    def __init__(self) -> None:
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
        """Watch this folder, and no other any more.

        Raises:
            OSError: it is not there, not a folder, or no watch is left (ENOSPC: `fs.inotify.max_user_watches`).
        """
        mask = self._ctypes.c_uint32(FOLDER_MASK)
        found = self._check(self._libc.inotify_add_watch(self.fd, os.fsencode(path), mask))
        if self._watch not in (-1, found):
            self._libc.inotify_rm_watch(self.fd, self._watch)  # fails where the old folder is gone: as good
        self._watch = found

    def read(self) -> tuple[dict[str, int], int]:
        """What has happened since the last read. Never waits.

        Returns:
            The names concerned, each with its masks together, and the masks that concern the folder or the queue.
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
            if watch not in (self._watch, -1):  # a folder watched earlier; -1 is the overflow
                continue
            if length:
                name = os.fsdecode(data[offset - length : offset].rstrip(b"\0"))
                names[name] = names.get(name, 0) | mask
            else:
                folder |= mask
        return names, folder

    def close(self) -> None:
        """Give the instance back. Closing twice is harmless."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _check(self, result: int) -> int:
        if result < 0:
            number = self._ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

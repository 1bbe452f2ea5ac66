"""Shared memory of one host without names: memory files (`memfd_create`) that other processes of the user open.

The kernel frees a memory file with its last descriptor and mapping, so nothing is left whichever process is killed. Its
size is sealed before another process maps it, and all its pages exist then: no access can fail (SIGBUS), whatever the
other process does. The limit of /dev/shm does not apply.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import mmap
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triton_distributed.system import fork

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SUPPORTED = sys.platform == "linux" and hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")
COOKIE_BYTES = 16
STEP = 1024 * 1024
"""A new segment grows by this many bytes at once: 0.3 ms, since the kernel clears each page."""

UNTRACKED: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
"""Arguments of a mapping that needs no descriptor of its own. Before 3.13 each has one."""

_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group
_PREFIX = "trd-"
_WRITE = 1 << 30  # One write takes at most 2 GiB.
_ids = itertools.count(1)


def mappings() -> Any:
    """Return the module `system.mapping`, which loads ctypes: only programs that use shared memory pay for that."""
    with fork.no_fork:
        return importlib.import_module("triton_distributed.system.mapping")


def peer_process(sock: Any) -> int:
    """Return the process at the other end of a Unix socket if it is of this user and visible here; else 0."""
    if not SUPPORTED or sock is None or sock.family != socket.AF_UNIX:
        return 0
    try:
        process, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    except OSError:
        return 0
    return process if user == os.geteuid() else 0


def available_bytes() -> int:
    """Return the memory that this process can still get, without swapping: the host's, or less in its container."""
    found = [sys.maxsize]
    with contextlib.suppress(OSError, ValueError, IndexError):
        line = next(each for each in Path("/proc/meminfo").read_text().splitlines() if each.startswith("MemAvailable"))
        found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        for line in _OWN_GROUPS.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                found += _left(_GROUPS, group, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):  # version 1
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                found += _left(_GROUPS / "memory", group, *names)
    return max(0, min(found))


def _left(root: Path, group: str, limit: str, used: str, cache: str) -> Iterator[int]:
    """Yield what the limits of a control group and of those above it leave. The kernel frees file pages on demand.

    A container may see its own group as the root, although its path says otherwise.
    """
    folder = root / group.strip("/")
    for each in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError):  # "max" is not a number: no limit.
            left = int((each / limit).read_text()) - int((each / used).read_text())
            stat = dict(line.split(" ", 1) for line in (each / "memory.stat").read_text().splitlines())
            yield left + int(stat.get(cache, 0))
        if each == root:
            return


class Segment:
    """Shared memory that this process has made and can write.

    Args:
        size: bytes; at first none of them exist, see `make`.

    Attributes:
        id: a number that no other segment of this process has.
        cookie: random bytes; a process that opens the segment compares them.
        memory: a writable view of all bytes, after `make`.

    Raises:
        OSError: the system has no descriptors left.
    """

    def __init__(self, size: int) -> None:
        self.id, self.size = next(_ids), size
        self.cookie = os.urandom(COOKIE_BYTES)
        self.memory = memoryview(b"")
        with fork.no_fork:
            self._descriptor = os.memfd_create(_PREFIX + self.cookie.hex(), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            fork.own(self)
            fork.watch_forks(self)

    def fileno(self) -> int:
        """The descriptor, or -1 after `close`."""
        return self._descriptor

    def make(self) -> Iterator[None]:
        """Make the memory: yields after each `STEP` bytes, then seals the size and maps the memory.

        Raises:
            OSError: there is no memory, or it cannot be mapped.
        """
        for at in range(0, self.size, STEP):
            os.posix_fallocate(self._descriptor, at, min(STEP, self.size - at))
            yield
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.memory = memoryview(mmap.mmap(self._descriptor, self.size, **UNTRACKED))

    def fill(self, data: memoryview) -> None:
        """Make the memory with this content, in place of `make`; no process can write it afterwards.

        Raises:
            OSError: there is no memory.
        """
        at = 0
        while at < self.size:
            at += os.pwrite(self._descriptor, data[at : at + _WRITE], at)
        sealed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, sealed)

    def close(self) -> None:
        """Give up the memory; it stays for the processes that have mapped it."""
        self._unmap()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def forked(self) -> None:
        """Give up the memory in a child of this process, which would keep it."""
        with contextlib.suppress(BufferError):  # The parent was writing.
            self.close()

    def _unmap(self) -> None:
        mapping = self.memory.obj
        self.memory.release()
        self.memory = memoryview(b"")
        if isinstance(mapping, mmap.mmap):
            mapping.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # `__init__` has failed.
            self.close()


class Refused(Exception):
    """Another process's segment cannot be used here."""


def open_segment(process: int, descriptor: int, size: int, cookie: bytes) -> int:
    """Open another process's segment for reading, and return the descriptor.

    Raises:
        Refused: it is not a sealed memory file with this size and cookie.
        OSError: it cannot be opened.
    """
    with fork.no_fork:  # The descriptors are open only here.
        # O_PATH opens nothing yet: an open of a pipe would wait, and one of a device may act on it.
        path = os.open(f"/proc/{process}/fd/{descriptor}", os.O_PATH | os.O_CLOEXEC)
        try:
            mine = f"/proc/self/fd/{path}"
            if os.readlink(mine) != f"/memfd:{_PREFIX}{cookie.hex()} (deleted)":
                raise Refused("it is another file")
            opened = os.open(mine, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(path)
    try:
        found = os.fstat(opened)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            raise Refused("it has another size")
        sealed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        if fcntl.fcntl(opened, fcntl.F_GET_SEALS) & sealed != sealed:
            raise Refused("its size is not sealed")
    except BaseException:
        os.close(opened)
        raise
    return opened

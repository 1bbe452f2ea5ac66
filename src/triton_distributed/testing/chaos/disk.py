"""A small file system that can be filled: a tmpfs in a mount namespace of its own."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import threading
from pathlib import Path

from triton_distributed.errors import ConfigError

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000  # unshare(2)
MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 0x4000, 0x40000, 2, 4  # mount(2)
SMALL_BYTES = 8 * 1024 * 1024  # records and sockets of a run take some kB; a larger disk would take longer to fill
FILLER = "filler"

_private = False  # whether this process has mounts of its own: only then may it mount anything


def private_mounts() -> None:
    """Give this process, and those that it starts, mounts of their own; needed for `FaultKind.DISK_FULL`.

    As root, or as any user where the kernel lets users have namespaces. Call it before any thread is started.

    Raises:
        ConfigError: the system has no such thing, or does not let this user; or there are threads already, which
            would keep the old mounts.
    """
    global _private
    if sys.platform != "linux":
        raise ConfigError("disk full", sys.platform, "only Linux has private mounts: leave that kind out")
    if threading.active_count() > 1:
        raise ConfigError("disk full", threading.active_count(), "threads run already: call private_mounts() first")
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", CLONE_NEWNS if uid == 0 else CLONE_NEWNS | CLONE_NEWUSER)
    if uid != 0:
        Path("/proc/self/setgroups").write_text("deny")  # see user_namespaces(7)
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    _private = True


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise ConfigError("disk full", name, f"{os.strerror(code)}: leave that kind out, or run as root")


class SmallDisk:
    """A folder on a file system of its own, with `SMALL_BYTES` at most.

    Args:
        folder: an empty one; what is mounted there is private to this process, see `private_mounts`.

    Raises:
        ConfigError: nothing can be mounted.
    """

    def __init__(self, folder: Path) -> None:
        if not _private:
            raise ConfigError("disk full", str(folder), "call private_mounts() first, before any thread is started")
        self._folder = folder
        options = f"size={SMALL_BYTES},mode=0700".encode()
        _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", MS_NOSUID | MS_NODEV, options)

    def fill(self) -> None:
        """Leave no byte free: every write gets ENOSPC."""
        with (self._folder / FILLER).open("ab", buffering=0) as filler:
            for size in (64 * 1024, 4096, 1):
                try:
                    while filler.write(b"\0" * size):
                        pass
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def free(self) -> None:
        """Give the space back."""
        with contextlib.suppress(FileNotFoundError):
            (self._folder / FILLER).unlink()

    def unmount(self) -> None:
        """Take the file system away, with all that is on it."""
        _call("umount2", os.fsencode(self._folder), 2)  # MNT_DETACH: a process that is ending may still use it

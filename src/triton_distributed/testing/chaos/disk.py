"""A small file system that can be filled: a tmpfs in a private mount namespace."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import threading
from pathlib import Path

from triton_distributed.errors import ConfigError

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000  # See unshare(2).
MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 0x4000, 0x40000, 2, 4  # See mount(2).
SMALL_BYTES = 8 * 1024 * 1024  # Records and sockets of a run need a few kB; a larger disk would take longer to fill.
FILLER = "filler"

_private = False  # This process has private mounts. Only then may it mount file systems.


def private_mounts() -> None:
    """Give this process and its future child processes private mounts, which `FaultKind.DISK_FULL` needs.

    It works for root, and for any user if the kernel allows user namespaces. Call it before any thread is started.

    Raises:
        ConfigError: the system has no private mounts, or does not allow them for this user; or threads run already,
            which would keep the old mounts.
    """
    global _private
    if sys.platform != "linux":
        raise ConfigError("disk full", sys.platform, "only Linux has private mounts: leave this kind out")
    if threading.active_count() > 1:
        raise ConfigError("disk full", threading.active_count(), "threads run already: call private_mounts() first")
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", CLONE_NEWNS if uid == 0 else CLONE_NEWNS | CLONE_NEWUSER)
    if uid != 0:
        Path("/proc/self/setgroups").write_text("deny")  # See user_namespaces(7).
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    _private = True


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise ConfigError("disk full", name, f"{os.strerror(code)}: leave this kind out, or run as root")


class SmallDisk:
    """A folder on its own file system, which holds at most `SMALL_BYTES`.

    Args:
        folder: an empty folder; the mount is private to this process, see `private_mounts`.

    Raises:
        ConfigError: the file system cannot be mounted.
    """

    def __init__(self, folder: Path) -> None:
        if not _private:
            raise ConfigError("disk full", str(folder), "call private_mounts() first, before any thread is started")
        self._folder = folder
        options = f"size={SMALL_BYTES},mode=0700".encode()
        _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", MS_NOSUID | MS_NODEV, options)

    def fill(self) -> None:
        """Fill the file system completely, so that every write fails with ENOSPC."""
        with (self._folder / FILLER).open("ab", buffering=0) as filler:
            for size in (64 * 1024, 4096, 1):
                try:
                    while filler.write(b"\0" * size):
                        pass
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def free(self) -> None:
        """Free the space that `fill` used."""
        with contextlib.suppress(FileNotFoundError):
            (self._folder / FILLER).unlink()

    def unmount(self) -> None:
        """Unmount the file system, which discards its files."""
        _call("umount2", os.fsencode(self._folder), 2)  # MNT_DETACH, because a process that is ending may still use it.

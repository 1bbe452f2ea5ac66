"""Checks of the machine: versions, limits of the process, the private folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from triton_distributed import __version__
from triton_distributed.cli.checks.finding import Finding, error, ok, warning
from triton_distributed.config import Config
from triton_distributed.errors import DiscoveryError
from triton_distributed.serving.addresses import SOCKETS
from triton_distributed.system import shared_memory as shared
from triton_distributed.system import unix_sockets
from triton_distributed.system.private_folder import private_folder

FEW_FILES = 4096
"""Open files below which a busy worker or client can run out: a session needs one, and so does each watched folder."""

FREE_INSTANCES = 8
"""inotify instances that should be free: each process of the user that watches files takes one or two."""

HELD_SHARE = 0.75
"""The share of a container's memory that clients' data may take; the rest is the program's."""

NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "fuse.sshfs", "9p", "lustre", "ceph", "glusterfs")


class Limits(NamedTuple):
    """Limits of this process and its user.

    Attributes:
        files: the soft and the hard limit of open files.
        inotify: the user's inotify instances: the limit, and those in use; None if unknown.
        cores: the processors that the process may use, and those that its group may use in time; None for no quota.
        memory: the bytes of memory that its group may use; None for no limit.
    """

    files: tuple[int, int]
    inotify: tuple[int, int] | None
    cores: tuple[int, float | None]
    memory: int | None = None


def versions() -> Iterator[Finding]:
    """Check the interpreter and the packages."""
    build = f"{platform.python_implementation()} {platform.python_version()}"
    yield ok("versions", f"triton-distributed {__version__}, {build}, msgspec {importlib.metadata.version('msgspec')}")
    if importlib.util.find_spec("uvloop") is None:
        yield warning("versions", "uvloop is not installed: asyncio's own event loop is slower", "pip install uvloop")


def read_limits() -> Limits:
    """Read the limits of this process. Works on Linux; elsewhere only the open files are known."""
    import resource  # not on Windows

    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Limits(files, _inotify(), (len(_affinity()), _quota()), _memory())


def limits(found: Limits, config: Config) -> Iterator[Finding]:
    """Check the limits of this process and its user.

    Args:
        found: the limits.
        config: the settings, which decide what is needed.
    """
    soft, hard = found.files
    if 0 <= soft < FEW_FILES:
        more = f"ulimit -n {FEW_FILES if hard < 0 or hard >= FEW_FILES else hard}"
        yield warning(
            "limits",
            f"at most {soft:,} open files: a worker can have a few sessions less than that",
            f"{more}, LimitNOFILE= in systemd, or --ulimit nofile= in Docker",
        )
    else:
        yield ok("limits", "open files: " + (f"{soft:,}" if soft >= 0 else "no limit"))
    if found.inotify is not None and config.discovery == "file":
        most, used = found.inotify
        if most - used < FREE_INSTANCES:
            yield warning(
                "limits",
                f"{used} of {most} inotify instances of this user are in use: file discovery then polls, and sees "
                "changes later",
                f"sysctl fs.inotify.max_user_instances={max(512, 2 * most)}",
            )
    cores, quota = found.cores
    if quota is not None and quota < cores and config.threads > 4 * max(1, round(quota)) + 4:
        yield warning(
            "limits",
            f"the container may use {quota:g} of {cores} cores, and {config.threads} plain handlers run at once",
            f"TRD_THREADS={max(1, round(quota)) + 4}",
        )

    if found.memory is not None and config.max_held_bytes > HELD_SHARE * found.memory:
        half = found.memory // 2
        yield warning(
            "limits",
            f"the container may use {found.memory:,} bytes of memory, and clients' data may take "
            f"{config.max_held_bytes:,}: the kernel would kill it",
            f"TRD_MAX_HELD_BYTES={half}, TRD_MAX_MESSAGE_BYTES={min(config.max_message_bytes, half)}, or more memory",
        )


def shared_memory(config: Config) -> Iterator[Finding]:
    """Check that memory can be shared with other processes of this host, if the settings ask for it."""
    if not config.shared_memory_bytes or not shared.SUPPORTED:
        return
    try:
        os.close(os.memfd_create("trd-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    except OSError as failed:
        words = f"this system gives no shared memory ({failed.strerror or failed}): large arrays are copied instead"
        advice = "sysctl vm.memfd_noexec=1 or 0; or TRD_SHARED_MEMORY_BYTES=0 if this is intended"
        yield warning("limits", words, advice)


def _inotify() -> tuple[int, int] | None:
    try:
        most = int(Path("/proc/sys/fs/inotify/max_user_instances").read_text())
    except (OSError, ValueError):
        return None
    used = 0
    for process in Path("/proc").glob("[0-9]*/fd"):
        try:
            if process.stat().st_uid == os.geteuid():
                used += sum(os.readlink(each) == "anon_inode:inotify" for each in process.iterdir())
        except OSError:
            continue  # it has ended, or belongs to another user
    return most, used


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _quota() -> float | None:
    """The cores that the control group may use in time (cgroup v2: `cpu.max`)."""
    try:
        most, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if most == "max" else int(most) / int(period)
    except (OSError, ValueError):
        return None


def _memory() -> int | None:
    """The bytes that the control group may use (cgroup v2: `memory.max`)."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return None if text == "max" else int(text)
    except (OSError, ValueError):
        return None


def folder(config: Config) -> list[Finding]:
    """Check the private folder: its owner, its rights, its file system, and whether a socket can be made in it."""
    path = Path(config.directory).absolute()
    if config.backend.reach == "process" or not unix_sockets.SUPPORTED:
        return []
    advice = "set TRD_DIR to a folder of this user on a local file system"
    try:
        private_folder(str(path), f"file://{path}")
        private_folder(str(path / SOCKETS), f"file://{path}")
    except DiscoveryError as failed:
        words = str(failed)
        return [error("folder", words, f"chmod 700 {path}" if "chmod 700" in words else advice)]
    if (kind := file_system(path)).startswith(NETWORK_FILE_SYSTEMS):
        return [warning("folder", f"{path} is on {kind}: locks and changes are seen late there", advice)]
    socket_path = path / SOCKETS / f"doctor-{os.getpid()}.sock"
    try:
        claimed, inode = unix_sockets.claim(socket_path)
    except (OSError, ValueError) as failed:
        return [error("folder", f"no Unix socket can be made in {path}: {failed}", "set TRD_DIR to a shorter path")]
    claimed.close()
    unix_sockets.remove(socket_path, inode)
    return [ok("folder", f"{path}: private, and Unix sockets can be made in it")]


def file_system(path: Path) -> str:
    """The type of a path's file system, as in /proc/mounts; empty if unknown."""
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return ""
    best, kind = "", ""
    for line in lines:
        _, mount, name, *_ = line.split(" ")
        inside = str(path) == mount or str(path).startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, name
    return kind

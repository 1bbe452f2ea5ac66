"""A record on disk, from both ends: its owner holds it open and locked, all other processes probe it.

An instance lives as long as the lock. The kernel drops the lock with the owner's last descriptor, however the owner
ended. No clock is involved: a stopped process keeps its lock for as long as it is stopped.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from enum import Enum
from io import FileIO

import msgspec

from triton_distributed.discovery import record
from triton_distributed.names import Instance
from triton_distributed.system.fork import no_fork, own

# Suffix of a temporary file. Its name begins with a dot, so no watcher reads a record before it is complete and locked.
TEMPORARY = ".new"

# Seconds that an invalid, unlocked file is kept for a person to examine. It is not kept for ever, because a loss of
# power may leave empty files.
_ABANDONED_S = 3600.0

_ABANDONED_TEMPORARY_S = 60.0
"""Seconds after which a temporary file counts as abandoned. A record gets its final name within microseconds."""

_SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ENOLCK, errno.ESTALE)

_TRIES = 3
"""Attempts to read a record that is replaced meanwhile. One replacement is rare; three in a row are deliberate."""

Signature = tuple[int, int]  # Inode and time of change. If they differ, the content must be read again.


class HeldRecord:
    """A record that this process owns. It is locked, and open for writing, so that closing it causes an event.

    Raises:
        OSError: the record cannot be written; no part of it is left.
    """

    def __init__(self, folder: str, key: str, data: bytes) -> None:
        self.data = data
        self.path = os.path.join(folder, key)
        temporary = os.path.join(folder, f".{os.urandom(8).hex()}{TEMPORARY}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with no_fork:  # The lock lasts as long as any copy of the descriptor, even one in a child process.
            # A file object is closed, with a warning, if it is dropped. A bare descriptor would keep the instance
            # alive for ever.
            self._file = FileIO(os.open(temporary, flags, 0o600), "wb")
            own(self)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            view = memoryview(data)
            while view:  # A full disk may accept a part before it raises.
                view = view[self._file.write(view) :]
            found = os.fstat(self._file.fileno())
            self._identity = (found.st_dev, found.st_ino)
            os.rename(temporary, self.path)
        except BaseException:
            self._file.close()
            try:
                os.unlink(temporary)
            except OSError:
                pass
            raise

    def fileno(self) -> int:
        """The descriptor. A forked child must close it: otherwise a dead parent looks alive until its child ends."""
        return self._file.fileno()

    def in_place(self) -> bool | None:
        """True if the path leads to this record, False if no file exists there, None if another file does."""
        try:
            found = os.lstat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True if (found.st_dev, found.st_ino) == self._identity else None

    def touch(self) -> None:
        """Update the record's file time, so that cleaners of temporary folders do not remove it."""
        os.utime(self._file.fileno())

    def withdraw(self) -> None:
        """Remove the record, unless another process has replaced it, and close it. Harmless after `release`."""
        try:
            if not self._file.closed and self.in_place():
                os.unlink(self.path)
        except OSError:
            pass  # The record is dead without its lock, and the next process that sees it removes it.
        finally:
            self._file.close()

    def release(self) -> None:
        """Close without removing: the path leads to another record by now, or this process is not the owner."""
        self._file.close()


class State(Enum):
    MISSING = "the record does not exist"
    DEAD = "the owner is dead, and the record was removed"
    HELD = "the owner lives"
    BAD = "the file is not a valid record"
    UNKNOWN = "the record cannot be read now"


class Reading(msgspec.Struct, frozen=True):
    """The result of reading a key. `instance` is None if a held record is unchanged."""

    state: State
    instance: Instance | None = None
    signature: Signature = (0, 0)
    reason: str = ""


def read_record(folder: str, key: str, known: Signature | None = None) -> Reading:
    """Read a record now, and remove it if its owner is dead.

    The calling thread opens, locks and reads the file: about 10 µs on a local file system, less than a hand-over.

    Args:
        known: the signature of the last reading; a held record with the same signature is not read again.
    """
    for _ in range(_TRIES):
        reading = _read(os.path.join(folder, key), key, known)
        if reading is not None:
            return reading
    return Reading(State.UNKNOWN, reason="it is replaced repeatedly")


def _read(path: str, key: str, known: Signature | None) -> Reading | None:
    """Read once; None if a dead record was found and another record has replaced it meanwhile."""
    try:
        # O_NONBLOCK, because opening a FIFO of that name would block.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return Reading(State.MISSING)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return Reading(State.BAD, reason="it is a symbolic link")
        state = State.UNKNOWN if error.errno in _SHORTAGE else State.BAD
        return Reading(state, reason=f"it cannot be opened: {error.strerror}")
    try:
        return _read_open(fd, path, key, known)
    except OSError as error:
        return Reading(State.UNKNOWN, reason=f"it cannot be read: {error.strerror}")
    finally:
        os.close(fd)


def _read_open(fd: int, path: str, key: str, known: Signature | None) -> Reading | None:
    found = os.fstat(fd)
    signature = (found.st_ino, found.st_mtime_ns)
    if not stat.S_ISREG(found.st_mode):
        return Reading(State.BAD, None, signature, "it is not a regular file")
    if found.st_uid != os.geteuid():
        return Reading(State.BAD, None, signature, f"it belongs to uid {found.st_uid}, not to uid {os.geteuid()}")
    held = _held(fd)
    if held and signature == known:
        return Reading(State.HELD, None, signature)
    try:
        if found.st_size > record.MAX_RECORD_BYTES:
            raise record.BadRecord(f"it has {found.st_size:,} bytes, above the limit of {record.MAX_RECORD_BYTES:,}")
        instance = record.decode(os.read(fd, record.MAX_RECORD_BYTES + 1))
        if record.key(instance.endpoint, instance.id) != key:
            raise record.BadRecord(f"it describes {instance.endpoint} id {instance.id}, but its name does not")
    except record.BadRecord as error:
        if held or time.time() - found.st_mtime < _ABANDONED_S:
            return Reading(State.BAD, None, signature, str(error))
        held = False
    if held:
        return Reading(State.HELD, instance, signature)
    # An owner that replaces its record renames the new one into place before it unlocks the old one, so if the path
    # still leads to this file, the record is dead. If another process takes the same key between these two calls, its
    # record is deleted, and it writes the record again.
    try:
        now = os.lstat(path)
        if (now.st_dev, now.st_ino) != (found.st_dev, found.st_ino):
            return None
        os.unlink(path)
    except OSError:
        pass  # Another reader was faster, or the file cannot be deleted. The record is dead in any case.
    return Reading(State.DEAD)


def _held(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # Shared, so that two readers do not look like owners.
    except BlockingIOError:
        return True
    return False


def sweep_temporary(path: str) -> None:
    """Remove the temporary file of a process that died while it wrote a record."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return
    try:
        found = os.fstat(fd)
        ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        if ours and time.time() - found.st_mtime > _ABANDONED_TEMPORARY_S and not _held(fd):
            os.unlink(path)
    except OSError:
        pass
    finally:
        os.close(fd)

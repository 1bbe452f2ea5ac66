"""A record on disk, from both ends: held open and locked by its owner, probed by all other processes.

The lock is the instance's life. The kernel drops it with the owner's last descriptor, however the owner ended, and no
clock is asked: a stopped process keeps its lock for as long as it is stopped.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from dataclasses import dataclass
from enum import Enum
from io import FileIO

from triton_distributed.discovery import record
from triton_distributed.names import Instance
from triton_distributed.system.fork import no_fork, own

# After a leading dot: no watcher takes a file for a record before it is complete, locked and renamed.
TEMPORARY = ".new"

# A file without a holder that cannot be read as a record is left for a person to look at, but not for ever: a
# machine that loses power may leave empty ones.
_ABANDONED_S = 3600.0

_ABANDONED_TEMPORARY_S = 60.0
"""Seconds after which a temporary file is abandoned. A record gets its name within microseconds."""

_SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ENOLCK, errno.ESTALE)

_TRIES = 3
"""Readings of a record that is replaced meanwhile. That is a rare accident; three in a row are deliberate."""

Signature = tuple[int, int]  # inode and time of change, which say whether the content must be read again


class HeldRecord:
    """A record that this process owns: open for writing, which makes its close an event, and locked.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """

    def __init__(self, folder: str, key: str, data: bytes) -> None:
        self.data = data
        self.path = os.path.join(folder, key)
        temporary = os.path.join(folder, f".{os.urandom(8).hex()}{TEMPORARY}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with no_fork:  # the lock lasts as long as any copy of the descriptor, also one in a child
            # A file object, so that one that is dropped unclosed is closed, and warns, instead of looking alive for
            # ever.
            self._file = FileIO(os.open(temporary, flags, 0o600), "wb")
            own(self)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            view = memoryview(data)
            while view:  # a full disk takes a part first and raises next
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
        """The descriptor, for a forked child to give up: a dead parent would look alive for as long as its child."""
        return self._file.fileno()

    def in_place(self) -> bool | None:
        """True while the path leads to this record, False if there is nothing, None if there is something else."""
        try:
            found = os.lstat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True if (found.st_dev, found.st_ino) == self._identity else None

    def touch(self) -> None:
        """Make the record young, whatever the age at which something cleans temporary folders."""
        os.utime(self._file.fileno())

    def withdraw(self) -> None:
        """Remove the record, unless another process has replaced it, and let it go. Harmless after `release`."""
        try:
            if not self._file.closed and self.in_place():
                os.unlink(self.path)
        except OSError:
            pass  # unlocked, it is dead, and the next process that sees it removes it
        finally:
            self._file.close()

    def release(self) -> None:
        """Close without removing: what the path leads to is not this record any more, or not this process's."""
        self._file.close()


class State(Enum):
    MISSING = "there is none"
    DEAD = "its owner is dead; it was removed"
    HELD = "its owner lives"
    BAD = "not a record that can be used"
    UNKNOWN = "could not be looked at now"


@dataclass(frozen=True, slots=True)
class Reading:
    """What was found under a key. `instance` is None where a held record is the one that is known already."""

    state: State
    instance: Instance | None = None
    signature: Signature = (0, 0)
    reason: str = ""


def read_record(folder: str, key: str, known: Signature | None = None) -> Reading:
    """Look at a record now, and remove it if its owner is dead.

    Opens, locks and reads on the calling thread: some 10 µs on a local file system, less than handing it to another.

    Args:
        known: the signature of the last reading; a held record that still has it is not read again.
    """
    for _ in range(_TRIES):
        reading = _read(os.path.join(folder, key), key, known)
        if reading is not None:
            return reading
    return Reading(State.UNKNOWN, reason="it is replaced all the time")


def _read(path: str, key: str, known: Signature | None) -> Reading | None:
    """Look once; None where a dead record was found and another took its place meanwhile."""
    try:
        # O_NONBLOCK: a FIFO of that name must not stop us
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
            raise record.BadRecord(f"it is about {instance.endpoint} id {instance.id}, which its name is not")
    except record.BadRecord as error:
        if held or time.time() - found.st_mtime < _ABANDONED_S:
            return Reading(State.BAD, None, signature, str(error))
        held = False
    if held:
        return Reading(State.HELD, instance, signature)
    # An owner that replaces its record renames the new one into place before it lets the old one go, so a path that
    # still leads here is dead. Should another process take the very same key between these two calls, it sees its
    # record deleted and writes it again.
    try:
        now = os.lstat(path)
        if (now.st_dev, now.st_ino) != (found.st_dev, found.st_ino):
            return None
        os.unlink(path)
    except OSError:
        pass  # another reader was faster, or nothing can be deleted here: dead it is all the same
    return Reading(State.DEAD)


def _held(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two readers do not take each other for the owner
    except BlockingIOError:
        return True
    return False


def sweep_temporary(path: str) -> None:
    """Remove what a process left that died while it wrote a record."""
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

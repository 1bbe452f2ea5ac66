"""Search for other folders of this user with live instances. The result is used only in error texts.

A worker and a client that use different folders never meet, and neither can see why. Linux lists all file locks, and a
record is locked as long as its owner lives, so all live records of the machine can be found in any folder. On other
systems only the default folders are searched.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from triton_distributed.config import usual_directories
from triton_distributed.discovery import record
from triton_distributed.discovery.file.lockfile import State, read_record
from triton_distributed.names import EndpointName

KEEP_S = 5.0
"""Seconds that an answer is kept, for a program that calls in a loop while no instance exists."""

RECORDS = "instances"

_MOST_FOLDERS = 3
"""Most folders named in an answer; more would not help."""

_MOST_PROCESSES = 200
"""Most processes examined. It takes about 1 ms for each 1,000 open files of these processes."""

_MOST_FILES = 20_000

# A path, and the only process that can reach it; 0 if this process can reach it too.
_Place = tuple[str, int]


class Elsewhere:
    """Looks for live instances outside one folder.

    Args:
        directory: the folder of this runtime's discovery, which is excluded; its records are in `instances`.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._looked = float("-inf")
        self._found: dict[_Place, set[str | None]] = {}  # Prefixes of the endpoints with live instances.

    def words(self, endpoint: EndpointName | None) -> str:
        """Text that names other folders with live instances of this endpoint, None for any: the end of a sentence.

        The text is empty if no other folder has live instances. It may be `KEEP_S` old.
        """
        now = time.monotonic()
        if now - self._looked >= KEEP_S:
            self._looked, self._found = now, self._look()
        wanted = None if endpoint is None else record.prefix(endpoint)
        found = sorted(each for each, prefixes in self._found.items() if wanted is None or wanted in prefixes)
        if reached := [folder for folder, owner in found if not owner][:_MOST_FOLDERS]:
            return f"; live instances are registered in {', '.join(reached)}: TRD_DIR={reached[0]} looks there"
        for folder, owner in found:
            own = f"process {owner}, which has another file system there (PrivateTmp=, a container)"
            return f"; live instances are registered in {folder} of {own}"
        return ""

    def _look(self) -> dict[_Place, set[str | None]]:
        found: dict[_Place, set[str | None]] = {}
        for path, owner in _live_records():
            records, key = os.path.split(path)
            folder, name = os.path.split(records)
            prefix = record.prefix_of(key)
            if name == RECORDS and prefix is not None and (owner or not _same(folder, self._directory)):
                found.setdefault((folder, owner), set()).add(prefix)
        return found


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _live_records() -> Iterator[_Place]:
    """Yield the locked files of this user that may be records."""
    try:
        with open("/proc/locks", encoding="ascii") as lines:
            owners = list(dict.fromkeys(owner for line in lines if (owner := _owner(line))))
    except OSError:  # The system is not Linux.
        yield from _usual_records()
        return
    left = _MOST_FILES
    for pid in owners[:_MOST_PROCESSES]:
        try:
            files = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue  # The process belongs to another user, or has ended.
        for each in files[: max(0, left)]:
            if found := _record_of(pid, each):
                yield found
        left -= len(files)


def _owner(line: str) -> str:
    """Return the process id in a line of /proc/locks, e.g. `1: FLOCK  ADVISORY  WRITE 2190 fe:00:27363 0 EOF`."""
    words = line.split()
    return words[4] if len(words) > 4 and words[1] == "FLOCK" else ""


def _record_of(pid: str, descriptor: str) -> _Place | None:
    """Return the place of a process's open file if it may be a record of this user and its path leads to it."""
    link = f"/proc/{pid}/fd/{descriptor}"
    try:
        path = os.readlink(link)
        if not path.endswith(record.SUFFIX):
            return None
        opened = os.stat(link)
    except OSError:
        return None
    if opened.st_uid != os.geteuid():
        return None
    if _is(opened, path):
        return path, 0
    return (path, int(pid)) if _is(opened, f"/proc/{pid}/root{path}") else None


def _is(opened: os.stat_result, path: str) -> bool:
    try:
        named = os.lstat(path)
    except OSError:
        return False
    return (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino)


def _usual_records() -> Iterator[_Place]:
    for directory in usual_directories():
        folder = os.path.join(directory, RECORDS)
        try:
            names = [each for each in os.listdir(folder) if record.prefix_of(each) is not None]
        except OSError:
            continue
        yield from ((os.path.join(folder, each), 0) for each in names if read_record(folder, each).state is State.HELD)

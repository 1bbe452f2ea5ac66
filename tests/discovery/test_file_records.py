"""Records that are none: each is skipped with one warning, and hurts nobody."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import pytest

from tests.discovery.conftest import NAME, Heard, Opens, Places, instance
from tests.leaks import descriptors
from tests.timing import MS, PATIENCE_S
from triton_distributed.discovery import Removed, Snapshot, record
from triton_distributed.discovery.file import lockfile
from triton_distributed.discovery.file.lockfile import HeldRecord, State, read_record, sweep_temporary
from triton_distributed.errors import DiscoveryError
from triton_distributed.names import EndpointName
from triton_distributed.testing import ChangeLog

GOOD = record.encode(instance(7))
STRANGER = 12345  # a uid that is not ours

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which files are open")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def half_written(path: Path) -> None:
    path.write_bytes(GOOD[: len(GOOD) // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def unparsable(path: Path) -> None:
    path.write_bytes(b"\xff\x00 certainly not")


def of_a_later_version(path: Path) -> None:
    path.write_bytes(GOOD.replace(b'"version":1', b'"version":2'))


def oversized(path: Path) -> None:
    path.write_bytes(GOOD.ljust(record.MAX_RECORD_BYTES + 1))


def about_somebody_else(path: Path) -> None:
    path.write_bytes(record.encode(instance(8, EndpointName("ns", "comp", "generate2"))))


def link_to_a_record(path: Path) -> None:
    target = path.parent.parent / "elsewhere"
    target.write_bytes(GOOD)
    path.symlink_to(target)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short, a record's name is not
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def foreign(path: Path) -> None:
    path.write_bytes(GOOD)
    os.chown(path, STRANGER, -1)


BAD = [
    (half_written, ""),
    (empty, ""),
    (unparsable, ""),
    (of_a_later_version, "version 2"),
    (oversized, "65,537 bytes"),
    (about_somebody_else, "generate2"),
    (link_to_a_record, "symbolic link"),
    (link_to_nothing, "symbolic link"),
    (fifo, "not a regular file"),
    (folder, "not a regular file"),
    (unix_socket, "cannot be opened"),
    pytest.param(foreign, f"belongs to uid {STRANGER}", marks=root_only),
]


@pytest.mark.parametrize(("make", "says"), BAD, ids=lambda each: getattr(each, "__name__", ""))
async def test_it_is_skipped_with_one_warning(
    opens: Opens, places: Places, heard: Heard, make: Callable[[Path], None], says: str
):
    discovery = opens(poll_s=5 * MS, check_s=5 * MS)  # looks again and again
    early, late = ChangeLog(), ChangeLog()
    await discovery.watch(NAME, early)
    path = places.path(7)
    make(path)
    await discovery.watch(NAME, late)
    other = HeldRecord(str(places.records), places.path(9).name, record.encode(instance(9)))
    for log in (early, late):
        await log.until_ids([9], PATIENCE_S)
        assert log.changes[0] == Snapshot(())
    for _ in range(3):
        await discovery.watch(NAME, ChangeLog())
    other.withdraw()
    (warning,) = heard.warnings
    assert str(path) in warning
    assert says in warning
    assert os.path.lexists(path)
    if stat.S_ISSOCK(path.lstat().st_mode):
        path.unlink()


async def test_one_that_changes_all_the_time_is_still_one_warning(opens: Opens, places: Places, heard: Heard):
    path = places.write(7, b"")
    discovery = opens()
    for length in range(0, len(GOOD), 10):
        path.write_bytes(GOOD[:length])
        await discovery.watch(NAME, ChangeLog())
    assert len(heard.warnings) == 1


async def test_it_is_warned_about_again_when_it_was_right_meanwhile(opens: Opens, places: Places, heard: Heard):
    discovery, other = opens(), opens()
    for _ in range(2):
        places.write(7, b"").stat()
        await discovery.watch(NAME, ChangeLog())
        await other.register(instance(7))
        await discovery.watch(NAME, ChangeLog())
        await other.withdraw(instance(7))
        await discovery.watch(NAME, ChangeLog())
    assert len(heard.warnings) == 2


async def test_a_file_of_another_name_is_warned_about_unless_it_is_hidden(opens: Opens, places: Places, heard: Heard):
    places.write(7, b"").unlink()
    (places.records / ".hidden").write_bytes(b"")
    (places.records / "notes.json").write_bytes(b"{}")
    discovery = opens()
    log = ChangeLog()
    await discovery.watch(None, log)
    await discovery.watch(None, log)
    assert log.ids == []
    assert [each.rpartition("/")[2] for each in heard.warnings] == ["notes.json is skipped: its name is not a record's"]


async def test_a_living_workers_record_that_was_written_into_is_mended(opens: Opens, places: Places, heard: Heard):
    discovery = opens(poll_s=5 * MS)
    await discovery.register(instance(7))
    places.path(7).write_bytes(b"scribble")
    await heard.until(lambda line: "written again" in line)
    log = ChangeLog()
    await opens().watch(NAME, log)
    assert log.ids == [7]


async def test_a_living_record_that_becomes_unreadable_is_not_listed(opens: Opens, places: Places, heard: Heard):
    log = ChangeLog()
    await opens(poll_s=5 * MS).watch(NAME, log)
    held = HeldRecord(str(places.records), places.path(7).name, GOOD)
    await log.until_ids([7], PATIENCE_S)
    places.path(7).write_bytes(b"scribble")
    await log.until_ids([], PATIENCE_S)
    assert log.changes[-1] == Removed(NAME, 7)
    assert len(heard.warnings) == 1
    held.withdraw()


# --- one record at a time --------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path) -> str:
    return str(tmp_path)


KEY = record.key(NAME, 7)


def test_what_a_look_finds(here: str):
    assert read_record(here, KEY).state is State.MISSING
    assert read_record(here + "/nowhere", KEY).state is State.MISSING
    held = HeldRecord(here, KEY, GOOD)
    first = read_record(here, KEY)
    assert (first.state, first.instance) == (State.HELD, instance(7))
    again = read_record(here, KEY, first.signature)
    assert (again.state, again.instance, again.signature) == (State.HELD, None, first.signature)
    held.release()
    assert read_record(here, KEY, first.signature).state is State.DEAD
    assert os.listdir(here) == []


def test_a_held_record_knows_whether_it_is_in_place(here: str):
    held = HeldRecord(here, KEY, GOOD)
    assert held.in_place() is True
    os.unlink(held.path)
    assert held.in_place() is False
    other = HeldRecord(here, KEY, GOOD)
    assert held.in_place() is None
    held.withdraw()
    assert other.in_place() is True
    other.release()
    other.withdraw()
    assert os.listdir(here) == [KEY], "one that was let go does not remove"


def test_a_touched_record_is_young(here: str):
    held = HeldRecord(here, KEY, GOOD)
    os.utime(held.path, (0, 0))
    held.touch()
    assert os.stat(held.path).st_mtime > 0
    held.withdraw()


def test_a_record_is_for_its_user_alone(here: str):
    held = HeldRecord(here, KEY, GOOD)
    assert stat.S_IMODE(os.stat(held.path).st_mode) == 0o600
    held.withdraw()


def test_garbage_that_nobody_holds_is_kept_for_an_hour(here: str):
    path = Path(here, KEY)
    for age_s, state in ((3500, State.BAD), (3700, State.DEAD)):
        path.write_bytes(b"garbage")
        os.utime(path, (time.time() - age_s,) * 2)
        assert read_record(here, KEY).state is state
    assert not path.exists()


def test_what_a_killed_writer_left_is_swept_when_it_is_old_and_nobody_holds_it(here: str):
    path = Path(here, ".0123" + lockfile.TEMPORARY)
    path.write_bytes(GOOD)
    sweep_temporary(str(path))
    assert path.exists()
    os.utime(path, (0, 0))
    with path.open("r+b") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        sweep_temporary(str(path))
        assert path.exists()
    os.utime(path, (0, 0))
    sweep_temporary(str(path))
    sweep_temporary(str(path))
    assert not path.exists()


def test_a_record_that_dies_while_another_takes_its_place_is_not_removed(here: str, monkeypatch: pytest.MonkeyPatch):
    dead = HeldRecord(here, KEY, GOOD)
    dead.release()
    later: list[HeldRecord] = []
    really = lockfile._held

    def held(fd: int) -> bool:
        found = really(fd)
        if not later:
            later.append(HeldRecord(here, KEY, GOOD))
        return found

    monkeypatch.setattr(lockfile, "_held", held)
    assert read_record(here, KEY).state is State.HELD
    assert later[0].in_place() is True
    later[0].withdraw()


def test_a_full_disk_leaves_nothing_behind(here: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lockfile, "FileIO", Full)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the error number says which
        HeldRecord(here, KEY, GOOD)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(here) == []


class Full(FileIO):
    """A disk that takes ten bytes and no more."""

    def write(self, data: object) -> int:
        if self.tell():
            raise OSError(errno.ENOSPC, "the disk is full")
        return super().write(memoryview(data)[:10])  # type: ignore[arg-type]


async def test_a_full_disk_is_named(opens: Opens, places: Places, monkeypatch: pytest.MonkeyPatch):
    discovery = opens()
    log = ChangeLog()
    await discovery.watch(NAME, log)
    with monkeypatch.context() as patch:
        patch.setattr(lockfile, "FileIO", Full)
        with pytest.raises(DiscoveryError, match=r"cannot write a record.*TRD_DIR") as caught:
            await discovery.register(instance(7))
    assert isinstance(caught.value.__cause__, OSError)
    assert str(places.records) in str(caught.value)
    assert list(places.records.iterdir()) == []
    await discovery.register(instance(7))
    await log.until_ids([7], PATIENCE_S)


# --- forks -----------------------------------------------------------------------------------------------------------


def child_holds(folder: str) -> bool:
    """Whether a forked child has a file of the folder open."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child only answers and is gone
        child = os.fork()
        if child == 0:
            answer = 2
            try:
                answer = int(any(folder in target for target in descriptors().values()))
            finally:
                os._exit(answer)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 1)
    return bool(status)


@linux
def test_a_forked_child_lets_go_and_its_parent_does_not(here: str):
    held = HeldRecord(here, KEY, GOOD)
    assert not child_holds(here)
    assert read_record(here, KEY).state is State.HELD
    held.withdraw()


@linux
def test_a_fork_on_another_thread_waits_for_a_record_that_is_being_opened(here: str, monkeypatch: pytest.MonkeyPatch):
    answers: list[bool] = []
    about_to_fork = threading.Event()

    def forks() -> None:
        about_to_fork.set()
        answers.append(child_holds(here))

    thread = threading.Thread(target=forks)

    class Slow(FileIO):
        """Opened already, and unknown to anybody, when the fork comes."""

        def __init__(self, descriptor: int, mode: str) -> None:
            thread.start()
            about_to_fork.wait(PATIENCE_S)
            super().__init__(descriptor, mode)

    monkeypatch.setattr(lockfile, "FileIO", Slow)
    held = HeldRecord(here, KEY, GOOD)
    thread.join(PATIENCE_S)
    assert answers == [False]
    held.withdraw()

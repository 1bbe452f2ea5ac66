"""The folder and what the kernel says about it: refused, deleted, too much, not at all."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.discovery.conftest import NAME, Heard, Opens, Places, instance
from tests.discovery.processes import worker
from tests.timing import MS, PATIENCE_S
from triton_distributed.discovery import Answering, record
from triton_distributed.discovery.file import backend as file_module
from triton_distributed.discovery.file import lockfile
from triton_distributed.discovery.file.backend import FileDiscovery
from triton_distributed.discovery.file.known import KnownInstances
from triton_distributed.errors import DiscoveryError
from triton_distributed.system import inotify
from triton_distributed.system.private_folder import private_folder
from triton_distributed.testing import ChangeLog

STRANGER = 12345  # a uid that is not ours

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has inotify")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


# --- whose it is -----------------------------------------------------------------------------------------------------


async def refusal(directory: Path) -> str:
    discovery = FileDiscovery(directory)
    texts = set()
    for attempt in (discovery.register(instance(7)), discovery.watch(NAME, ChangeLog())):
        with pytest.raises(DiscoveryError) as caught:
            await attempt
        texts.add(str(caught.value))
    await discovery.close()
    (text,) = texts
    assert text.startswith(f"file discovery at file://{directory}: ")
    return text


async def test_it_is_made_for_the_user_alone(trd_dir: Path):
    directory = trd_dir / "deep" / "down"
    discovery = FileDiscovery(directory)
    await discovery.register(instance(7))
    for each in (directory, directory / "instances"):
        assert stat.S_IMODE(each.stat().st_mode) == 0o700
    await discovery.close()


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o777])
@pytest.mark.parametrize("where", [".", "instances"])
async def test_one_that_others_may_enter_is_refused(trd_dir: Path, mode: int, where: str):
    (trd_dir / "instances").mkdir(mode=0o700)
    (trd_dir / where).chmod(mode)
    text = await refusal(trd_dir)
    assert f"mode {mode:04o}" in text
    assert f"chmod 700 {trd_dir / where}" in text.replace("/.`", "`")


@root_only
@pytest.mark.parametrize("where", [".", "instances"])
async def test_somebody_elses_is_refused(trd_dir: Path, where: str):
    (trd_dir / "instances").mkdir(mode=0o700)
    os.chown(trd_dir / where, STRANGER, -1)
    text = await refusal(trd_dir)
    words = f"belongs to uid {STRANGER}, not to uid 0: run as that user, or set TRD_DIR to a folder of your own"
    assert words in text  # it may be a live service's: no advice to remove it


@root_only
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o722])
async def test_one_in_another_users_folder_that_others_may_write_to_is_refused(trd_dir: Path, mode: int):
    shared = trd_dir / "shared"
    shared.mkdir()
    shared.chmod(mode)
    os.chown(shared, STRANGER, -1)
    text = await refusal(shared / "trd")
    assert f"is in {shared}, which belongs to uid {STRANGER} and which others may write to: set TRD_DIR" in text
    assert list(shared.iterdir()) == []


@root_only
@pytest.mark.parametrize(("owner", "mode"), [(0, 0o1777), (0, 0o777), (STRANGER, 0o755), (STRANGER, 0o700)])
async def test_one_in_a_folder_of_the_system_or_of_one_user_is_taken(trd_dir: Path, owner: int, mode: int):
    """A volume of a container is root's and often has mode 0777."""
    above = trd_dir / "above"
    above.mkdir()
    above.chmod(mode)
    os.chown(above, owner, -1)
    discovery = FileDiscovery(above / "trd")
    await discovery.register(instance(7))
    await discovery.close()


@root_only
async def test_somebody_elses_link_is_refused(trd_dir: Path):
    (trd_dir / "real").mkdir(mode=0o700)
    link = trd_dir / "link"
    link.symlink_to("real")
    os.lchown(link, STRANGER, -1)
    assert f"symbolic link that belongs to uid {STRANGER}" in await refusal(link)


async def test_the_users_own_link_is_followed(trd_dir: Path):
    (trd_dir / "real").mkdir(mode=0o700)
    (trd_dir / "link").symlink_to("real")
    discovery = FileDiscovery(trd_dir / "link")
    await discovery.register(instance(7))
    assert len(list((trd_dir / "real" / "instances").iterdir())) == 1
    await discovery.close()


async def test_a_file_in_its_place_is_refused(trd_dir: Path):
    (trd_dir / "file").write_bytes(b"")
    assert "; set TRD_DIR to a folder" in await refusal(trd_dir / "file")


async def test_one_that_opens_to_others_later_is_used_no_more_and_nothing_is_lost(
    opens: Opens, trd_dir: Path, heard: Heard
):
    discovery = opens(poll_s=5 * MS, check_s=5 * MS)
    log = ChangeLog()
    await discovery.watch(NAME, log)
    await discovery.register(instance(7))
    trd_dir.chmod(0o755)
    await heard.until(lambda line: "mode 0755" in line)
    assert [discovery.answers] == [False]
    with pytest.raises(DiscoveryError, match="0755"):
        await discovery.register(instance(8))
    trd_dir.chmod(0o700)
    await discovery.register(instance(8))
    await log.until_ids([7, 8], PATIENCE_S)
    assert len(heard.warnings) == 1
    answered_at = discovery.answered_at
    async with asyncio.timeout(PATIENCE_S):
        while [discovery.answers] == [False] or discovery.answered_at == answered_at:
            await asyncio.sleep(MS)
    assert isinstance(discovery, Answering)


# --- no descriptors left ---------------------------------------------------------------------------------------------


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_registering_says_that_no_descriptor_is_left(opens: Opens, places: Places):
    discovery = opens()
    log = ChangeLog()
    await discovery.watch(NAME, log)
    with no_descriptors_left(), pytest.raises(DiscoveryError, match="ulimit -n") as caught:
        await discovery.register(instance(7))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EMFILE
    await discovery.register(instance(7))
    await log.until_ids([7], PATIENCE_S)


@linux
async def test_what_is_known_stays_while_no_descriptor_is_left(opens: Opens, places: Places, heard: Heard):
    log = ChangeLog()
    await opens().watch(NAME, log)
    with worker("register", places.directory, 7) as victim:
        await log.until_ids([7], PATIENCE_S)
        with no_descriptors_left():
            victim.signal(signal.SIGKILL)
            await heard.until(lambda line: os.strerror(errno.EMFILE) in line)
            assert log.ids == [7]
        await log.until_ids([], PATIENCE_S)


# --- deleted by somebody ---------------------------------------------------------------------------------------------


@pytest.mark.any_loop
async def test_a_record_that_somebody_deletes_is_written_again(opens: Opens, places: Places, heard: Heard):
    owner, log = opens(poll_s=5 * MS), ChangeLog()
    await owner.register(instance(7, by="owner"))
    await opens(poll_s=5 * MS).watch(NAME, log)
    for _ in range(3):
        heard.records.clear()
        places.path(7).unlink()
        await heard.until(lambda line: "written again" in line)
        assert places.path(7).exists()
    await log.until_ids([7], PATIENCE_S)
    assert heard.warnings == []


def delete_records(places: Places) -> None:
    shutil.rmtree(places.records)


def delete_all(places: Places) -> None:
    shutil.rmtree(places.directory)


def move_away(places: Places) -> None:
    os.rename(places.records, places.directory / "old")


@pytest.mark.any_loop
@pytest.mark.parametrize("harm", [delete_records, delete_all, move_away])
async def test_a_folder_that_goes_comes_back_and_watching_goes_on(
    opens: Opens, places: Places, heard: Heard, harm: Callable[[Places], None]
):
    owner, watcher, log = opens(poll_s=5 * MS), opens(poll_s=5 * MS), ChangeLog()
    await owner.register(instance(7))
    await watcher.watch(NAME, log)
    harm(places)
    await heard.until(lambda line: "written again" in line)
    await opens().register(instance(8))
    await log.until_ids([7, 8], PATIENCE_S)
    late = ChangeLog()
    await opens().watch(NAME, late)
    assert late.ids == [7, 8]
    await owner.withdraw(instance(7))
    await log.until_ids([8], PATIENCE_S)
    assert heard.warnings == []


@linux
@pytest.mark.any_loop
async def test_a_new_folder_with_the_number_of_the_old_one_is_listened_to(
    opens: Opens, places: Places, monkeypatch: pytest.MonkeyPatch
):
    """File systems give the number of a deleted folder to the next one."""

    def same_number(path: str, where: str) -> tuple[int, int]:
        private_folder(path, where)
        return (1, 1)

    monkeypatch.setattr(file_module, "private_folder", same_number)
    log = ChangeLog()
    await opens().watch(NAME, log)
    shutil.rmtree(places.records)
    places.records.mkdir(mode=0o700)
    owner = opens()
    for last in range(7, 14):  # the first is found by the look at everything that the deletion brings
        await owner.register(instance(last))
        await log.until_ids([*range(7, last + 1)], PATIENCE_S)


@pytest.mark.parametrize("harm", [delete_records, delete_all, move_away])
async def test_who_only_watches_goes_on_too(opens: Opens, places: Places, harm: Callable[[Places], None]):
    log = ChangeLog()
    await opens(poll_s=5 * MS).watch(NAME, log)
    harm(places)
    await opens().register(instance(8))
    await log.until_ids([8], PATIENCE_S)


async def test_a_record_that_cannot_be_written_again_is_complained_of_once(
    opens: Opens, places: Places, heard: Heard, monkeypatch: pytest.MonkeyPatch
):
    owner = opens(poll_s=5 * MS, check_s=5 * MS)
    log = ChangeLog()
    await opens(poll_s=5 * MS).watch(NAME, log)
    await owner.register(instance(7))
    await log.until_ids([7], PATIENCE_S)
    tries, enough = [], asyncio.Event()

    def full(*_: object) -> None:
        tries.append(1)
        if len(tries) == 5:
            enough.set()
        raise OSError(errno.ENOSPC, "the disk is full", f"/some/temporary-{len(tries)}")

    with monkeypatch.context() as patch:
        patch.setattr(file_module, "HeldRecord", full)
        places.path(7).unlink()
        await asyncio.wait_for(enough.wait(), PATIENCE_S)
    await log.until_ids([7], PATIENCE_S)
    (warning,) = heard.warnings
    assert "the disk is full" in warning


# --- what the kernel does not say ------------------------------------------------------------------------------------


@linux
@pytest.mark.any_loop
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSPC, errno.ENOSYS])
async def test_without_inotify_it_polls(
    opens: Opens, places: Places, heard: Heard, monkeypatch: pytest.MonkeyPatch, number: int
):
    log = ChangeLog()
    discovery = opens(poll_s=5 * MS)
    with monkeypatch.context() as patch:
        patch.setattr(inotify, "Inotify", Refusing)
        patch.setattr(Refusing, "number", number)
        await discovery.watch(NAME, log)
        assert "polling" in repr(discovery)
        with worker("register", places.directory, 7) as victim:
            await log.until_ids([7], PATIENCE_S)
            victim.signal(signal.SIGKILL)
            await log.until_ids([], PATIENCE_S)
    if number == errno.ENOSYS:
        assert heard.warnings == []
    else:
        (warning,) = heard.warnings
        assert "fs.inotify.max_user_instances" in warning


class Refusing:
    """There is none for us."""

    number = 0

    def __init__(self) -> None:
        raise OSError(self.number, os.strerror(self.number))


@linux
@pytest.mark.any_loop
async def test_it_listens_as_soon_as_inotify_is_there(opens: Opens, monkeypatch: pytest.MonkeyPatch):
    log = ChangeLog()
    discovery = opens(poll_s=5 * MS)
    with monkeypatch.context() as patch:
        patch.setattr(inotify, "Inotify", Refusing)
        patch.setattr(Refusing, "number", errno.EMFILE)
        await discovery.watch(NAME, log)
    listens = asyncio.Event()

    class Telling(inotify.Inotify):
        def watch_folder(self, path: str) -> None:
            super().watch_folder(path)
            listens.set()

    monkeypatch.setattr(inotify, "Inotify", Telling)
    await asyncio.wait_for(listens.wait(), PATIENCE_S)
    assert "inotify" in repr(discovery)
    monkeypatch.setattr(discovery, "_poll_s", 3600.0)
    await opens().register(instance(7))
    await log.until_ids([7], PATIENCE_S)


@linux
@pytest.mark.any_loop
async def test_inotify_that_fails_later_is_done_without(opens: Opens, heard: Heard, monkeypatch: pytest.MonkeyPatch):
    log = ChangeLog()
    discovery = opens(poll_s=5 * MS)
    await discovery.watch(NAME, log)

    def fails(_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(inotify.Inotify, "read", fails)
        await opens().register(instance(7))
        await log.until_ids([7], PATIENCE_S)
        await heard.until(lambda line: "inotify failed" in line)
    await opens().register(instance(8))
    await log.until_ids([7, 8], PATIENCE_S)


@linux
async def test_a_queue_that_overflows_has_everything_looked_at(opens: Opens, places: Places):
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 100_000:
        pytest.skip(f"{limit} events fit into the queue here")
    log = ChangeLog()
    await opens().watch(NAME, log)
    await opens().register(instance(7))
    await log.until_ids([7], PATIENCE_S)
    noise = [os.fsencode(places.records / name) for name in (".one", ".other")]
    for number in range(limit + 10):  # two in turn: the kernel drops what is said twice in a row
        os.close(os.open(noise[number % 2], os.O_WRONLY | os.O_CREAT))
    lost = lockfile.HeldRecord(str(places.records), places.path(8).name, record.encode(instance(8)))
    await log.until_ids([7, 8], PATIENCE_S)
    lost.withdraw()
    await log.until_ids([7], PATIENCE_S)


@pytest.mark.any_loop
async def test_others_on_the_loop_get_their_turn_while_thousands_are_read(
    opens: Opens, places: Places, monkeypatch: pytest.MonkeyPatch
):
    number = 2000
    for id in range(1, number + 1):
        places.write(id)
    turns = 0
    looks_by_turn: dict[int, int] = {}
    really = KnownInstances.look

    def look(self: KnownInstances, key: str, **options: bool) -> object:
        looks_by_turn[turns] = looks_by_turn.get(turns, 0) + 1
        return really(self, key, **options)

    monkeypatch.setattr(KnownInstances, "look", look)

    async def ticks() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    clock = asyncio.create_task(ticks())
    log = ChangeLog()
    await opens().watch(NAME, log)
    clock.cancel()
    assert log.ids == []
    assert sum(looks_by_turn.values()) >= number
    # a slice of the scan, one of the patrol's, and what one read of the events brings
    assert max(looks_by_turn.values()) <= 3 * 256
    assert turns >= number // 128


# --- broken off ------------------------------------------------------------------------------------------------------


async def test_a_watch_that_is_cancelled_leaves_nothing(opens: Opens, places: Places):
    held = [lockfile.HeldRecord(str(places.records), path.name, path.read_bytes()) for path in written(places, 300)]
    discovery = opens()
    log = ChangeLog()
    task = asyncio.create_task(discovery.watch(NAME, log))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log.changes == []
    assert "known=0" in repr(discovery)
    watch = await discovery.watch(NAME, log)
    assert "known=300" in repr(discovery)
    watch.close()
    assert "known=0" in repr(discovery)
    for each in held:
        each.withdraw()


async def test_a_watch_that_close_overtakes_says_so(opens: Opens, places: Places):
    written(places, 300)
    discovery = opens()
    log = ChangeLog()
    task = asyncio.create_task(discovery.watch(NAME, log))
    await asyncio.sleep(0)
    await discovery.close()
    with pytest.raises(DiscoveryError, match="closed"):
        await task
    assert log.changes == []
    assert repr(discovery) == f"<FileDiscovery {discovery.where} closed held=0 known=0>"


def written(places: Places, number: int) -> list[Path]:
    return [places.write(id) for id in range(1, number + 1)]

"""Instances that are busy: published from a thread of their process, while its loop may be stuck."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.discovery.conftest import HOUR_S, NAME, Places, instance
from tests.timing import MS, PATIENCE_S
from triton_distributed.discovery import Marking, record
from triton_distributed.discovery.etcd.backend import EtcdDiscovery
from triton_distributed.discovery.file.backend import FileDiscovery
from triton_distributed.discovery.memory import MemoryDiscovery
from triton_distributed.external.etcd_endpoint import EtcdOptions
from triton_distributed.testing import ChangeLog, EtcdServer

Pair = tuple[FileDiscovery | EtcdDiscovery, FileDiscovery | EtcdDiscovery]
_numbers = itertools.count()


@pytest.fixture(params=["inotify", "polling", "etcd"])
def place(request: pytest.FixtureRequest, lasting_etcd: EtcdServer) -> str:
    """The URL of an etcd; empty for files."""
    if request.param == "polling":
        request.getfixturevalue("no_inotify")
    return lasting_etcd.url if request.param == "etcd" else ""


@pytest.fixture
async def pair(place: str, trd_dir: Path) -> AsyncIterator[Pair]:
    if place:
        prefix = f"marking-{next(_numbers)}"
        made: list[FileDiscovery | EtcdDiscovery] = [
            EtcdDiscovery(EtcdOptions(place), prefix=prefix, timeout_s=PATIENCE_S) for _ in range(2)
        ]
    else:
        made = [FileDiscovery(trd_dir, poll_s=5 * MS, check_s=HOUR_S) for _ in range(2)]
    yield made[0], made[1]
    for each in made:
        await each.close()


def in_a_thread(discovery: Marking, id: int, busy: bool) -> None:
    """Mark while this loop stands still."""
    thread = threading.Thread(target=discovery.mark, args=(instance(id), busy))
    thread.start()
    thread.join()


def shows(log: ChangeLog, busy: bool) -> bool:
    return log.present[NAME, 7].busy is busy


async def test_others_see_it_and_see_it_clear(pair: Pair) -> None:
    one, other = pair
    log, own = ChangeLog(), ChangeLog()
    await other.watch(NAME, log)
    await one.watch(NAME, own)
    await one.register(instance(7, gpu="a"))
    await one.register(instance(8))
    await log.until_ids([7, 8], PATIENCE_S)
    for busy in (True, False, True):
        in_a_thread(one, 7, busy)
        for each in (log, own):
            await each.until(functools.partial(shows, each, busy), PATIENCE_S)
            assert each.present[NAME, 7].metadata == {"gpu": "a"}
            assert not each.present[NAME, 8].busy
    later = ChangeLog()
    await other.watch(NAME, later)
    assert later.present[NAME, 7].busy
    await one.register(instance(7))
    await log.until(lambda: not log.present[NAME, 7].busy, PATIENCE_S)
    await one.withdraw(instance(7))
    await log.until_ids([8], PATIENCE_S)


async def test_what_is_not_registered_here_stays_so(pair: Pair) -> None:
    one, other = pair
    log = ChangeLog()
    await other.watch(NAME, log)
    in_a_thread(one, 7, True)
    await one.register(instance(7))
    await one.withdraw(instance(7))
    in_a_thread(one, 7, True)
    await other.register(instance(7))
    in_a_thread(one, 7, True)
    await one.register(instance(8))
    await log.until_ids([7, 8], PATIENCE_S)
    assert not any(each.busy for each in log.present.values())
    in_a_thread(one, 8, True)
    await log.until(lambda: log.present[NAME, 8].busy, PATIENCE_S)
    assert not log.present[NAME, 7].busy


async def test_a_file_that_somebody_replaced_is_left_alone(trd_dir: Path, places: Places) -> None:
    one, other = (FileDiscovery(trd_dir, poll_s=HOUR_S, check_s=HOUR_S) for _ in range(2))
    await one.register(instance(7, by="one"))
    await other.register(instance(7, by="other"))
    in_a_thread(one, 7, True)
    found = record.decode(places.path(7).read_bytes())
    assert (found.busy, found.metadata) == (False, {"by": "other"})
    await one.close()
    await other.close()


async def test_marks_and_registrations_at_once_leave_one_good_record(trd_dir: Path, places: Places) -> None:
    """The watchdog's thread and the loop change the same record; none is left over, and the last word stands."""
    one = FileDiscovery(trd_dir, poll_s=HOUR_S, check_s=HOUR_S)
    stop = threading.Event()

    def marks() -> None:
        for busy in itertools.cycle((True, False)):
            one.mark(instance(7), busy)
            if stop.is_set():
                return

    await one.register(instance(7))
    thread = threading.Thread(target=marks)
    thread.start()
    for turn in range(200):
        await one.register(instance(7, turn=turn))
        if turn % 3 == 0:
            places.path(7).unlink(missing_ok=True)  # and somebody cleans up
        if turn % 10 == 0:
            await one.withdraw(instance(7))
            await one.register(instance(7, turn=turn))
        await asyncio.sleep(0)
    stop.set()
    await asyncio.to_thread(thread.join)
    await one.register(instance(7, turn="last"))
    one.mark(instance(7), True)
    assert os.listdir(places.records) == [places.path(7).name]
    found = record.decode(places.path(7).read_bytes())
    assert (found.busy, found.metadata) == (True, {"turn": "last"})
    await one.close()
    assert os.listdir(places.records) == []


def test_a_record_says_busy_only_where_it_is_so() -> None:
    data = record.encode(instance(7))
    assert b"busy" not in data
    busy = record.marked(data, True)
    assert b'"busy":true' in busy
    assert record.decode(busy).busy
    assert record.decode(busy) != record.decode(data)
    assert record.marked(busy, False) == data


async def test_memory_has_nothing_to_say() -> None:
    discovery = MemoryDiscovery()
    assert isinstance(discovery, Marking)
    discovery.mark(instance(7), True)

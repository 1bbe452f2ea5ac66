"""Who lives and who does not: killed, stopped, forked, cleaned."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.discovery.conftest import NAME, Opens, Places, instance
from tests.discovery.processes import worker
from tests.leaks import descriptors
from tests.timing import MS, PATIENCE_S
from triton_distributed.discovery import Change, Removed, Snapshot
from triton_distributed.discovery.file import lockfile
from triton_distributed.names import EndpointName
from triton_distributed.testing import ChangeLog

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has inotify")


class Timed(ChangeLog):
    """Also says when."""

    def __init__(self) -> None:
        super().__init__()
        self.at = 0.0

    def __call__(self, change: Change) -> None:
        super().__call__(change)
        self.at = time.perf_counter()


@linux
@pytest.mark.any_loop
async def test_a_killed_worker_is_gone_within_a_second(opens: Opens, places: Places):
    """The clocks stand still: it is the kernel that tells."""
    took = []
    log = Timed()
    await opens().watch(NAME, log)
    for id in range(1, 6):
        with worker("register", places.directory, id, id + 100) as victim:
            await log.until_ids([id, id + 100], PATIENCE_S)
            killed = time.perf_counter()
            victim.signal(signal.SIGKILL)
            await log.until_ids([], PATIENCE_S)
            took.append(log.at - killed)
    assert sorted(each.instance_id for each in log.changes if isinstance(each, Removed)) == [
        *range(1, 6),
        *range(101, 106),
    ]
    assert not places.path(1).exists()
    print(f"\nfrom SIGKILL to Removed: {', '.join(f'{each * 1000:.1f}' for each in sorted(took))} ms")
    assert max(took) < 1


async def test_a_killed_worker_is_gone_where_there_is_no_inotify(opens: Opens, places: Places, no_inotify: None):
    log = Timed()
    await opens(poll_s=50 * MS).watch(NAME, log)
    with worker("register", places.directory, 7) as victim:
        await log.until_ids([7], PATIENCE_S)
        victim.signal(signal.SIGKILL)
        await log.until_ids([], PATIENCE_S)
    assert not places.path(7).exists()


@pytest.mark.any_loop
async def test_a_dead_record_is_never_listed_and_is_removed(opens: Opens, places: Places):
    dead = places.write(7)
    discovery = opens()
    await discovery.register(instance(8))
    log = ChangeLog()
    await discovery.watch(NAME, log)
    assert log.changes == [Snapshot((instance(8),))]
    assert not dead.exists()
    assert places.path(8).exists()


@linux
async def test_what_nobody_wants_is_removed_too_if_it_is_dead(opens: Opens, places: Places, removals):
    other = EndpointName("ns", "comp", "generate2")
    dead = places.write(7, endpoint=other)
    held = opens()
    await held.register(instance(8, other))
    places.write(9, b"not a record", endpoint=other)
    gone = removals(places.records, dead.name)
    await opens().watch(NAME, ChangeLog())
    await gone
    assert places.path(8, other).exists()
    assert places.path(9, other).exists()


async def test_a_stopped_worker_stays(opens: Opens, places: Places):
    log, polled = ChangeLog(), ChangeLog()
    await opens().watch(NAME, log)
    with worker("register", places.directory, 7, forked=False) as sleeper:  # the stop of a child can be waited for
        await log.until_ids([7], PATIENCE_S)
        sleeper.signal(signal.SIGSTOP)
        _, status = os.waitpid(sleeper.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        late = ChangeLog()
        await opens().watch(NAME, late)
        assert late.ids == [7]
        prober = opens(poll_s=5 * MS, check_s=5 * MS)
        await prober.watch(NAME, polled)
        await prober.register(instance(8))  # many looks lie between these two
        await log.until_ids([7, 8], PATIENCE_S)
        sleeper.signal(signal.SIGCONT)
        sleeper.go()
        for each in (log, late, polled):
            await each.until_ids([8], PATIENCE_S)
            assert [change for change in each.changes if isinstance(change, Removed)] == [Removed(NAME, 7)]


async def test_a_stopped_worker_can_be_killed(opens: Opens, places: Places):
    log = ChangeLog()
    await opens(poll_s=50 * MS).watch(NAME, log)
    with worker("register", places.directory, 7) as victim:
        await log.until_ids([7], PATIENCE_S)
        victim.signal(signal.SIGSTOP)
        victim.signal(signal.SIGKILL)
        await log.until_ids([], PATIENCE_S)


@linux
async def test_a_forked_child_does_not_keep_a_dead_parent_alive(opens: Opens, places: Places):
    log = Timed()
    await opens().watch(NAME, log)
    with worker("fork", places.directory, 7, 8) as parent:
        await log.until_ids([7, 8], PATIENCE_S)
        killed = time.perf_counter()
        parent.signal(signal.SIGKILL)
        await log.until_ids([], PATIENCE_S)
        assert log.at - killed < 1
        parent.process.wait()
        parent.go()
        while (line := parent.hear()) != "child lives":
            assert line == "child"
    assert not list(places.records.iterdir())


@linux
async def test_a_forked_child_holds_nothing_and_may_not_use_it(opens: Opens, places: Places):
    discovery = opens()
    for id in (1, 2, 3):
        await discovery.register(instance(id))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            held = [each for each in descriptors().values() if str(places.records) in each or "inotify" in each]
            closing = discovery.close()
            try:
                closing.send(None)
            except StopIteration:
                status = 0 if not held and "closed" in repr(discovery) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    log = ChangeLog()
    await opens().watch(NAME, log)
    assert log.ids == [1, 2, 3]


async def test_two_that_clean_at_once(places: Places):
    for id in range(1, 301):
        places.write(id)
    with worker("watch", places.directory) as one, worker("watch", places.directory) as other:
        for each in (one, other):
            each.go()
        assert (one.hear(), other.hear()) == ("ids", "ids")
        for each in (one, other):
            assert each.process.wait(PATIENCE_S) == 0
    assert list(places.records.iterdir()) == []


async def test_an_id_can_be_used_again(opens: Opens, places: Places):
    log = ChangeLog()
    await opens(poll_s=50 * MS).watch(NAME, log)
    for _ in range(2):
        with worker("register", places.directory, 7) as victim:
            await log.until_ids([7], PATIENCE_S)
            victim.signal(signal.SIGKILL)
            await log.until_ids([], PATIENCE_S)
    await opens().register(instance(7, by="a later one"))
    await log.until_ids([7], PATIENCE_S)
    assert log.present[NAME, 7].metadata == {"by": "a later one"}


async def test_a_dead_predecessors_record_is_replaced(opens: Opens, places: Places):
    places.write(7)
    await opens().register(instance(7, by="a later one"))
    log = ChangeLog()
    await opens().watch(NAME, log)
    assert log.present[NAME, 7].metadata == {"by": "a later one"}


@linux
async def test_a_lock_that_is_dropped_after_the_news_is_waited_for(
    opens: Opens, places: Places, monkeypatch: pytest.MonkeyPatch
):
    """Linux tells of a file's last close before it drops the lock."""
    log = ChangeLog()
    await opens().watch(NAME, log)
    with worker("register", places.directory, 7) as victim:
        await log.until_ids([7], PATIENCE_S)
        held = late_lock(places.path(7), monkeypatch)
        victim.signal(signal.SIGKILL)
        await log.until_ids([], PATIENCE_S)
    assert held == [True, True, False]


def late_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Have the next two looks find the lock still held. Returns what each look found."""
    really = lockfile._held
    found: list[bool] = []

    def seems_held(fd: int) -> bool:
        found.append(len(found) < 2 or really(fd))
        return found[-1]

    monkeypatch.setattr(lockfile, "_held", seems_held)
    return found

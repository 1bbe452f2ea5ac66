"""Local events: who listens is found in the folder, who is dead is removed, who stands still stops nobody."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.events.conftest import local
from tests.events.processes import FORKS, publisher, subscriber
from tests.runtime.cluster import Cluster, patiently, turns, until
from tests.runtime.programs import program
from tests.timing import MS, PATIENCE_S
from triton_distributed.errors import DiscoveryError
from triton_distributed.events.folder import SubscriberFolder
from triton_distributed.events.link import PREFACE
from triton_distributed.events.local import LocalEvents

Makes = Callable[..., LocalEvents]

DEAD = "00000000000000aa"


def files(trd_dir: Path) -> set[str]:
    events = trd_dir / "events"
    return {each.name for each in events.iterdir()} if events.exists() else set()


def leave_behind(trd_dir: Path, subject: str) -> None:
    """What a killed subscriber leaves."""
    events = trd_dir / "events"
    events.mkdir(mode=0o700, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(events / f"{DEAD}.sock"))
    SubscriberFolder(events).add(DEAD, subject)


async def test_two_publishing_processes_one_subscribing(unix: Cluster, tmp_path: Path):
    subscription = await unix.runtime().namespace("t").component("c").subscribe("e")
    async with publisher(tmp_path, 1000) as one, publisher(tmp_path, 1000) as other:
        got: dict[int, list[int]] = {}
        for _ in range(2000):
            event = await subscription.get(PATIENCE_S)
            got.setdefault(event.publisher, []).append(event.data)
        ids = {int((await each.line()).split()[1]) for each in (one, other)}
        assert got == {id: list(range(1000)) for id in ids}
        assert subscription.dropped == 0


async def test_a_killed_subscriber_is_removed_by_the_publisher(unix: Cluster, trd_dir: Path, tmp_path: Path):
    component = unix.runtime().namespace("t").component("c")
    witness = await component.subscribe("e")
    async with subscriber(tmp_path) as victim, subscriber(tmp_path) as survivor:
        id = int((await victim.line()).split()[1])
        await survivor.line()
        await component.publish("e", 1)
        assert await victim.line() == "first 1"
        victim.signal(signal.SIGKILL)
        await victim.ended()
        assert any(f"{id:016x}" in name for name in files(trd_dir))
        for number in range(2, 200):
            await component.publish("e", number)
        assert not any(f"{id:016x}" in name for name in files(trd_dir))
        await component.publish("e", "end")
        assert await survivor.line() == "first 1"
        assert await survivor.line() == "got 199 last 199 dropped 0"
        assert await survivor.ended() == 0
        assert [(await witness.get(PATIENCE_S)).data for _ in range(200)] == [*range(1, 200), "end"]


async def test_a_stopped_subscriber_does_not_stop_the_publisher(unix: Cluster, tmp_path: Path, caplog):
    component = unix.runtime().namespace("t").component("c")
    reads = await unix.runtime().namespace("t").component("c").subscribe("e")
    block = bytes(1_000_000)
    async with subscriber(tmp_path) as stopped:
        assert (await stopped.line()).startswith("ready")
        await component.publish("e", {"number": 0, "block": block})
        assert await stopped.line() == "first 0"
        stopped.signal(signal.SIGSTOP)
        try:
            for number in range(1, 151):
                await patiently(component.publish("e", {"number": number, "block": block}))
                while (await reads.get(PATIENCE_S)).data["number"] != number:
                    pass
        finally:
            stopped.signal(signal.SIGCONT)
        assert len([text for text in caplog.messages if "does not read" in text]) == 1
        assert reads.dropped == 0
        await component.publish("e", "end")
        words = (await stopped.line()).split()
        got, last, dropped = (int(words[each]) for each in (1, 3, 5))
        assert last == 150
        assert got < 100  # 64 MiB at the publisher, and what the kernel holds
        assert got + dropped == 151
        assert await stopped.ended() == 0


async def test_what_was_published_last_leaves_before_the_publisher_ends(planes: Makes):
    publishes, subscribes = planes(), planes()
    subscription = await subscribes.subscribe("a")
    block = bytes(1_000_000)
    for number in range(20):
        await publishes.publish("a", b"%2d" % number + block)
    await publishes.close()
    got = [await subscription.get(PATIENCE_S) for _ in range(20)]
    assert [int(data[:2]) for data in got] == list(range(20))


async def test_leftovers_of_the_dead_are_swept_by_who_subscribes(planes: Makes, trd_dir: Path):
    leave_behind(trd_dir, "never published")
    (trd_dir / "events" / "notes.txt").write_text("somebody's")
    plane = planes()
    await plane.subscribe("a")
    subscription = await plane.subscribe("b")
    assert not any(DEAD in name for name in files(trd_dir))
    assert "notes.txt" in files(trd_dir)
    subscription.close()
    await plane.close()
    assert files(trd_dir) == {"notes.txt"}


async def test_leftovers_of_the_dead_are_removed_by_who_publishes(planes: Makes, trd_dir: Path):
    leave_behind(trd_dir, "a")
    plane = planes()
    await plane.publish("b", b"nobody was asked")
    assert any(DEAD in name for name in files(trd_dir))
    await plane.publish("a", b"1")
    assert files(trd_dir) == set()


async def test_a_mark_without_a_socket_is_removed(planes: Makes, trd_dir: Path):
    (trd_dir / "events").mkdir(mode=0o700)
    SubscriberFolder(trd_dir / "events").add(DEAD, "a")
    await planes().publish("a", b"1")
    assert files(trd_dir) == set()


async def test_the_end_of_a_subscription_is_seen(planes: Makes, trd_dir: Path):
    publishes, subscribes = planes(), planes()
    one, other = await subscribes.subscribe("a"), await subscribes.subscribe("a")
    assert len(files(trd_dir)) == 2  # a socket, and one mark for both
    one.close()
    await publishes.publish("a", b"1")
    assert await other.get(PATIENCE_S) == b"1"
    other.close()
    assert len(files(trd_dir)) == 1
    again = await subscribes.subscribe("a")
    await publishes.publish("a", b"2")
    assert await again.get(PATIENCE_S) == b"2"


async def test_a_folder_that_others_may_enter_is_refused(planes: Makes, trd_dir: Path):
    trd_dir.chmod(0o755)
    for attempt in (planes().publish("a", b"1"), patiently(planes().subscribe("a"))):
        with pytest.raises(DiscoveryError, match="chmod 700"):
            await attempt
    assert not (trd_dir / "events").exists()


async def test_another_users_folder_is_refused(planes: Makes, trd_dir: Path, monkeypatch):
    (trd_dir / "events").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    for attempt in (planes().publish("a", b"1"), patiently(planes().subscribe("a"))):
        with pytest.raises(DiscoveryError, match="belongs to uid"):
            await attempt
    assert files(trd_dir) == set()


async def test_two_folders_do_not_hear_each_other(trd_dir: Path):
    one, other = local(trd_dir / "one", 1), local(trd_dir / "two", 2)
    subscriptions = [await plane.subscribe("a") for plane in (one, other)]
    await one.publish("a", b"1")
    await other.publish("a", b"2")
    assert [await each.get(PATIENCE_S) for each in subscriptions] == [b"1", b"2"]
    await one.publish("a", b"3")
    assert [await subscriptions[0].get(PATIENCE_S), subscriptions[1].waiting] == [b"3", 0]
    await one.close()
    await other.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reaches long paths")
async def test_a_long_folder(trd_dir: Path):
    one, other = (local(trd_dir / ("x" * 150), id) for id in (1, 2))
    subscription = await other.subscribe("a")
    await one.publish("a", b"1")
    assert await subscription.get(PATIENCE_S) == b"1"
    await one.close()
    await other.close()


@pytest.mark.any_loop
async def test_an_emptied_folder_is_filled_again(planes: Makes, trd_dir: Path):
    publishes, subscribes = planes(), planes(check_s=20 * MS)
    subscription = await subscribes.subscribe("a")
    await publishes.publish("a", b"1")
    before = files(trd_dir)
    for name in before:
        (trd_dir / "events" / name).unlink()
    (trd_dir / "events").rmdir()
    await publishes.publish("a", b"lost")
    assert not (trd_dir / "events").exists()  # whoever removes a folder with all in it is not to find a new file there
    await until(lambda: files(trd_dir) == before)
    await publishes.publish("a", b"2")
    assert [await subscription.get(PATIENCE_S) for _ in range(2)] == [b"1", b"2"]
    mark = next(name for name in before if name.endswith(".mark"))
    (trd_dir / "events" / mark).unlink()
    await until(lambda: files(trd_dir) == before)


async def test_one_look_restores_everything(planes: Makes, trd_dir: Path):
    plane = planes()
    kept = [await plane.subscribe(subject) for subject in ("a", "b")]
    before = files(trd_dir)
    for name in before:
        (trd_dir / "events" / name).unlink()
    plane._look()
    await until(lambda: files(trd_dir) == before)
    assert not any(each.closed for each in kept)


async def test_a_stranger_at_the_socket_disturbs_nobody(planes: Makes, trd_dir: Path, caplog):
    publishes, subscribes = planes(), planes()
    subscription = await subscribes.subscribe("a")
    path = next((trd_dir / "events").glob("*.sock"))
    for words in (b"GET / HTTP/1.1\r\n\r\n", PREFACE + b"\xff" * 100):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(words)
        assert await patiently(reader.read()) == b""
        writer.close()
    assert len([text for text in caplog.messages if "closed" in text]) == 2
    await publishes.publish("a", b"1")
    assert await subscription.get(PATIENCE_S) == b"1"


@pytest.mark.any_loop
@pytest.mark.parametrize("turns_before", range(8))
async def test_a_publisher_that_connects_as_the_subscriber_ends_is_not_left(
    planes: Makes, trd_dir: Path, turns_before: int
):
    plane = planes()
    await plane.subscribe("s")
    with socket.socket(socket.AF_UNIX) as publisher:
        publisher.setblocking(False)
        publisher.connect(str(next((trd_dir / "events").glob("*.sock"))))
        await turns(turns_before)
        await plane.close()
        loop = asyncio.get_running_loop()
        try:
            assert await patiently(loop.sock_recv(publisher, 1)) == b""
        except ConnectionResetError:
            pass  # it was never accepted


async def test_an_event_that_the_subscriber_does_not_take(planes: Makes, caplog):
    publishes, subscribes = planes(), planes(max_message_bytes=1000)
    subscription = await subscribes.subscribe("a")
    await publishes.publish("a", b"1")
    await publishes.publish("a", b"x" * 1001)
    await until(lambda: "above the limit of 1,000" in caplog.text)

    async def publish_again() -> None:
        while not subscription.waiting > 1:
            await publishes.publish("a", b"2")
            await turns(1)

    await patiently(publish_again())
    assert [await subscription.get(PATIENCE_S) for _ in range(2)] == [b"1", b"2"]


async def test_a_full_queue_of_connections_is_no_death(planes: Makes, trd_dir: Path, caplog):
    (trd_dir / "events").mkdir(mode=0o700)
    path = trd_dir / "events" / f"{DEAD}.sock"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(str(path))
        busy.listen(0)
        first.connect(str(path))
        SubscriberFolder(path.parent).add(DEAD, "a")
        await planes().publish("a", b"1")
        assert "misses an event" in caplog.text
        assert len(files(trd_dir)) == 2
        path.unlink()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
async def test_a_forked_child_neither_takes_nor_ends_its_parents_subscription(unix: Cluster, trd_dir: Path, tmp_path):
    component = unix.runtime().namespace("t").component("c")
    # Python 3.12 warns of any fork in a process that has threads.
    async with program(tmp_path, FORKS, options=("-W", "ignore::DeprecationWarning")) as parent:
        _, child, refused = (await parent.line()).split()
        try:
            assert refused == "ForkError"
            await component.publish("e", 1)
            await component.publish("other", 2)
            assert [await parent.line(), await parent.line()] == ["got 1", "got 2"]
            parent.signal(signal.SIGKILL)
            await parent.process.wait()
            await component.publish("e", 3)  # into a connection that nobody holds, or to nobody
            await component.publish("e", 4)
            assert files(trd_dir) == set()
        finally:
            os.kill(int(child), signal.SIGKILL)


class TestFolder:
    def test_it_is_read_again_when_it_has_changed(self, tmp_path: Path):
        mine, theirs = SubscriberFolder(tmp_path), SubscriberFolder(tmp_path)
        long_ago = time.time_ns() - 3_600_000_000_123
        os.utime(tmp_path, ns=(long_ago, long_ago))
        assert [mine.interested("a") for _ in range(3)] == [()] * 3
        assert mine.reads == 1
        theirs.add("0" * 16, "a")
        assert mine.interested("a") == ("0" * 16,)
        theirs.remove("0" * 16, "a")
        assert mine.interested("a") == ()

    def test_a_change_within_one_tick_of_the_clock_is_seen(self, tmp_path: Path):
        mine, theirs = SubscriberFolder(tmp_path), SubscriberFolder(tmp_path)
        now = time.time_ns() // 1_000_000_000 * 1_000_000_000 + 5  # whatever the file system counts in
        os.utime(tmp_path, ns=(now + 10**9, now + 10**9))
        assert mine.interested("a") == ()
        theirs.add("0" * 16, "a")
        os.utime(tmp_path, ns=(now + 10**9, now + 10**9))  # as if within the tick
        assert mine.interested("a") == ("0" * 16,)

    @pytest.mark.parametrize(("age_ns", "nanoseconds", "reads"), [(10**9, 5, 1), (10**9, 0, 2), (4 * 10**9, 0, 1)])
    def test_how_long_a_time_is_in_doubt(self, tmp_path: Path, monkeypatch, age_ns, nanoseconds, reads):
        changed = 1_700_000_000 * 10**9 + nanoseconds
        os.utime(tmp_path, ns=(changed, changed))
        monkeypatch.setattr(time, "time_ns", lambda: changed + age_ns)
        folder = SubscriberFolder(tmp_path)
        for _ in range(2):
            folder.interested("a")
        assert folder.reads == reads

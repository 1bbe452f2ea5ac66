"""What watches of etcd show, as long as etcd is well."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import threading
import time

import pytest

from tests.discovery.conftest import NAME, Heard, OpensEtcd, Raw, instance
from tests.discovery.processes import Worker
from tests.timing import PATIENCE_S
from triton_distributed.config import Config
from triton_distributed.discovery import Added, Change, Removed, Snapshot, record
from triton_distributed.discovery.base import same
from triton_distributed.discovery.etcd import lease, watch
from triton_distributed.discovery.etcd.keys import EtcdKeys
from triton_distributed.errors import ConfigError, DiscoveryError
from triton_distributed.external import etcd_messages as messages
from triton_distributed.names import EndpointName, Instance
from triton_distributed.runtime.backends import make_discovery
from triton_distributed.testing import ChangeLog, EtcdServer, FaultProxy
from triton_distributed.testing.servers import free_port


async def test_keys_of_one_endpoint_do_not_begin_as_anothers():
    keys = EtcdKeys("p/")
    names = [
        EndpointName("ns", "comp", each) for each in ("generate", "generate2", "generat", "generate/", "generate.")
    ]
    for name in names:
        first, end = keys.range(name)
        assert [first <= keys.of(each, 2**63 - 1) < end for each in names] == [each == name for each in names]
        every = keys.range(None)
        assert every[0] <= keys.of(name, 1) < every[1]
        assert not every[0] <= keys.lineage < every[1]


async def test_where_a_record_lies(lasting_etcd: EtcdServer, opens_etcd: OpensEtcd, raw: Raw):
    await opens_etcd(lasting_etcd.url, prefix="here/").register(instance(0x7F))
    found = (await raw(lasting_etcd.url).range(b"here/", b"here0")).kvs
    assert [each.key.decode() for each in found] == [
        f"here/instances/{record.prefix(NAME)}/{0x7F:016x}",
        "here/lineage",
    ]
    assert record.decode(found[0].value) == instance(0x7F)


async def test_prefixes_are_worlds_apart(lasting_etcd: EtcdServer, opens_etcd: OpensEtcd):
    log = ChangeLog()
    await opens_etcd(lasting_etcd.url, prefix="a").watch(None, log)
    await opens_etcd(lasting_etcd.url, prefix="ab").register(instance(1))
    await opens_etcd(lasting_etcd.url, prefix="a").register(instance(2))
    await log.until_ids([2], PATIENCE_S)
    assert log.changes[1:] == [Added(instance(2))]


async def test_a_bad_record_is_skipped_alone(lasting_etcd: EtcdServer, opens_etcd: OpensEtcd, raw: Raw, heard: Heard):
    writer, keys = raw(lasting_etcd.url), EtcdKeys("bad")
    bad, alien = keys.of(NAME, 5), keys.of(NAME, 6)
    early, late = ChangeLog(), ChangeLog()
    discovery = opens_etcd(lasting_etcd.url, prefix="bad")
    await discovery.watch(NAME, early)
    for value in (b"{", b"\xff" * 100):
        await writer.txn([], [messages.put(bad, value)])
    await writer.txn([], [messages.put(alien, record.encode(instance(7)))])
    await discovery.register(instance(1))
    await early.until_ids([1], PATIENCE_S)
    await opens_etcd(lasting_etcd.url, prefix="bad").watch(NAME, late)
    assert late.ids == [1]
    assert sum(bad.decode() in each for each in heard.warnings) == 2, "once by each of two discoveries"
    assert any("id 7, but its key does not" in each for each in heard.warnings)
    await writer.txn([], [messages.put(bad, record.encode(instance(5)))])
    await early.until_ids([1, 5], PATIENCE_S)
    await writer.txn([], [messages.put(bad, b"spoilt")])
    await early.until_ids([1], PATIENCE_S)


async def test_a_snapshot_of_three_hundred(
    lasting_etcd: EtcdServer, opens_etcd: OpensEtcd, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(watch, "PAGE", 64)
    one, other = opens_etcd(lasting_etcd.url), opens_etcd(lasting_etcd.url)
    await asyncio.gather(*(one.register(instance(id)) for id in range(1, 301)))
    log = ChangeLog()
    await other.watch(NAME, log)
    assert log.changes == [Snapshot(tuple(instance(id) for id in range(1, 301)))]


async def test_very_many_changes_come_as_a_snapshot(lasting_etcd: EtcdServer, opens_etcd: OpensEtcd):
    one, other = opens_etcd(lasting_etcd.url), opens_etcd(lasting_etcd.url)
    log = ChangeLog()
    await other.watch(NAME, log)
    await asyncio.gather(*(one.register(instance(id)) for id in range(1, 201)))
    await log.until_ids(range(1, 201), PATIENCE_S)
    await one.close()  # one revision, 200 deletions
    await log.until_ids([], PATIENCE_S)
    assert log.changes[-1] == Snapshot(())


async def test_watches_of_one_endpoint_share_a_stream(lasting_etcd: EtcdServer, opens_etcd: OpensEtcd):
    one, other = opens_etcd(lasting_etcd.url), opens_etcd(lasting_etcd.url)
    logs = [ChangeLog() for _ in range(5)]
    watches = await asyncio.gather(*(other.watch(NAME, log) for log in logs))
    assert "watched=1" in repr(other)
    await one.register(instance(1))
    for log in logs:
        await log.until_ids([1], PATIENCE_S)
    for each in watches:
        each.close()
    assert "watched=0" in repr(other)


async def test_a_cancelled_watch_leaves_nothing(lasting_etcd: EtcdServer, opens_etcd: OpensEtcd):
    discovery = opens_etcd(lasting_etcd.url)
    log = ChangeLog()
    waiting = [asyncio.ensure_future(discovery.watch(NAME, ChangeLog())) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    assert isinstance((await asyncio.gather(*waiting, return_exceptions=True))[0], asyncio.CancelledError)
    waiting[1].result().close()
    cancelled = asyncio.ensure_future(discovery.watch(NAME, log))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert "watched=0" in repr(discovery)
    assert log.changes == []


async def test_a_closed_watch_hears_nothing_of_what_is_under_way(lasting_etcd: EtcdServer, opens_etcd: OpensEtcd):
    """Closed while changes that were handed over wait for the loop."""
    one, other = opens_etcd(lasting_etcd.url), opens_etcd(lasting_etcd.url)
    log, seen = ChangeLog(), ChangeLog()
    watch = await one.watch(NAME, log)

    def closes(change: Change) -> None:
        seen(change)
        watch.close()

    await other.watch(NAME, closes)
    await one.register(instance(1))
    await seen.until_ids([1], PATIENCE_S)
    before = list(log.changes)
    await one.register(instance(2))
    await seen.until_ids([1, 2], PATIENCE_S)
    assert log.changes == before


@pytest.mark.parametrize("what", ["register", "watch"])
async def test_an_unreachable_etcd_is_named_in_time(opens_etcd: OpensEtcd, what: str):
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    discovery = opens_etcd(",".join(urls), timeout_s=0.5)
    began = time.monotonic()
    with pytest.raises(DiscoveryError) as caught:
        await (discovery.register(instance(1)) if what == "register" else discovery.watch(NAME, ChangeLog()))
    assert 0.4 < time.monotonic() - began < PATIENCE_S / 2
    for url in urls:
        assert f"{url}: connection refused" in str(caught.value)
    assert caught.value.where == ", ".join(urls)


async def test_a_registration_that_failed_is_undone(lasting_etcd: EtcdServer, opens_etcd: OpensEtcd):
    """Cancelled when etcd had written it and the answer was on its way."""
    async with FaultProxy(f"tcp://127.0.0.1:{lasting_etcd.port}") as proxy:
        one, other = opens_etcd(proxy.address.replace("tcp", "http")), opens_etcd(lasting_etcd.url)
        await one.register(instance(1))
        log = ChangeLog()
        await other.watch(NAME, log)
        proxy.down.delay_s = 1.0
        attempt = asyncio.ensure_future(one.register(instance(2)))
        await log.until_ids([1, 2], PATIENCE_S)
        attempt.cancel()
        proxy.down.delay_s = 0.0
        with pytest.raises(asyncio.CancelledError):
            await attempt
        await log.until_ids([1], PATIENCE_S)


def was_added(log: ChangeLog, wanted: Instance) -> bool:
    return any(isinstance(each, Added) and same(each.instance, wanted) for each in log.changes)


async def test_a_registration_that_is_cancelled_as_it_succeeds_is_undone(
    lasting_etcd: EtcdServer, opens_etcd: OpensEtcd, monkeypatch: pytest.MonkeyPatch
):
    """The thread is done, and this loop has not heard of it yet."""
    one, other = opens_etcd(lasting_etcd.url), opens_etcd(lasting_etcd.url)
    await one.register(instance(1))
    log = ChangeLog()
    await other.watch(NAME, log)
    written = threading.Event()
    write = one._registrar._write

    async def told(key: bytes, value: bytes) -> None:
        await write(key, value)
        written.set()

    monkeypatch.setattr(one._registrar, "_write", told)
    for again in (instance(2), instance(1, more=True)):  # a new one, and one that replaces another
        written.clear()
        attempt = asyncio.ensure_future(one.register(again))
        await asyncio.sleep(0)
        assert written.wait(PATIENCE_S)  # blocks this loop
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt
        await log.until(functools.partial(was_added, log, again), PATIENCE_S)
        await log.until(lambda: log.ids == [1] and not log.present[NAME, 1].metadata, PATIENCE_S)


def test_a_program_that_forgot_to_close_is_forgotten(lasting_etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch):
    """Its loop is closed, so nobody serves: the thread withdraws everything and ends."""
    monkeypatch.setattr("triton_distributed.discovery.etcd.backend.ORPHAN_S", 0.05)
    config = Config(discovery="etcd", etcd_endpoints=lasting_etcd.url, etcd_prefix="orphan")

    async def forgets() -> None:
        discovery = make_discovery(config)
        await discovery.watch(NAME, ChangeLog())
        await discovery.register(instance(1))

    async def looks() -> None:
        discovery = make_discovery(config)
        log = ChangeLog()
        await discovery.watch(NAME, log)
        await log.until_ids([], PATIENCE_S)
        await discovery.close()

    asyncio.run(forgets())
    asyncio.run(looks())


async def test_a_forked_child_says_so(lasting_etcd: EtcdServer):
    worker = Worker("fork_with_etcd", lasting_etcd.url, "fork")
    try:
        said = [await asyncio.to_thread(worker.hear) for _ in range(3)]
        assert said[0] == "ready"
        assert "belongs to a process that forked this one" in said[1]
        assert said[2] == "closed"
    finally:
        worker.end()


@pytest.mark.parametrize("url", ["ftp://a", "http://", "http://a/b", "http://user@a", "http://a:port", ","])
async def test_what_is_no_url_is_refused(url: str):
    with pytest.raises(ConfigError, match="ETCD_ENDPOINTS"):
        make_discovery(Config(discovery="etcd", etcd_endpoints=url))


async def test_endpoints_as_people_write_them():
    discovery = make_discovery(Config(discovery="etcd", etcd_endpoints="host, https://[::1]:99/,http://c:1,"))
    assert discovery.where == "http://host:2379, https://[::1]:99, http://c:1"
    await discovery.close()


def test_a_missing_library_is_named(lasting_etcd: EtcdServer):
    program = f"""
import asyncio, sys
sys.modules["h11"] = None
from triton_distributed.config import Config
from triton_distributed.names import EndpointName, Instance
from triton_distributed.runtime.backends import make_discovery

async def main():
    discovery = make_discovery(Config(discovery="etcd", etcd_endpoints={lasting_etcd.url!r}))
    try:
        await discovery.register(Instance(EndpointName("a", "b", "c"), 1, ()))
    finally:
        await discovery.close()
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "DiscoveryError" in done.stderr.splitlines()[-1]
    assert "pip install 'triton-distributed[etcd]'" in done.stderr.splitlines()[-1]


async def test_what_an_operator_deletes_comes_back(
    lasting_etcd: EtcdServer, opens_etcd: OpensEtcd, raw: Raw, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lease, "CHECK_BEATS", 1)
    one, other = opens_etcd(lasting_etcd.url, prefix="deleted", ttl_s=2), opens_etcd(lasting_etcd.url, prefix="deleted")
    log = ChangeLog()
    await other.watch(NAME, log)
    await one.register(instance(1))
    await log.until_ids([1], PATIENCE_S)
    await raw(lasting_etcd.url).txn([], [messages.delete(EtcdKeys("deleted").of(NAME, 1))])
    await log.until(lambda: log.changes[1:] == [Added(instance(1)), Removed(NAME, 1), Added(instance(1))], PATIENCE_S)


async def test_compaction_makes_no_difference_to_an_open_watch(
    lasting_etcd: EtcdServer, opens_etcd: OpensEtcd, raw: Raw
):
    one, other = opens_etcd(lasting_etcd.url), opens_etcd(lasting_etcd.url)
    log = ChangeLog()
    await other.watch(NAME, log)
    await one.register(instance(1))
    client = raw(lasting_etcd.url)
    revision = (await client.range(b"x")).header.revision
    await client.call("/v3/kv/compaction", {"revision": revision}, messages.Nothing)
    await one.register(instance(2))
    await log.until_ids([1, 2], PATIENCE_S)

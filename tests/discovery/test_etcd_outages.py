"""etcd is killed, frozen, emptied or compacted: what is known stays, and what is registered comes back by itself.

Nothing here waits for a time to pass but where the time is the matter: a lease, a grace, a timeout.
"""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.discovery.conftest import NAME, Heard, OpensEtcd, Raw, instance
from tests.timing import MS, PATIENCE_S
from triton_distributed.discovery import Added, Answering, Removed
from triton_distributed.discovery.etcd.backend import EtcdDiscovery
from triton_distributed.errors import DiscoveryError
from triton_distributed.external import etcd_messages as messages
from triton_distributed.testing import ChangeLog, EtcdCluster, EtcdServer, FaultProxy

TTL_S = 2


def removed(log: ChangeLog) -> list[Removed]:
    return [each for each in log.changes if isinstance(each, Removed)]


async def test_killed_and_started_again_with_its_data(etcd: EtcdServer, opens_etcd: OpensEtcd, heard: Heard):
    one, other = opens_etcd(etcd.url), opens_etcd(etcd.url)
    log = ChangeLog()
    await other.watch(NAME, log)
    await one.register(instance(1))
    await log.until_ids([1], PATIENCE_S)
    etcd.kill()
    late = ChangeLog()
    await other.watch(NAME, late)  # what is known is known
    assert late.ids == [1]
    async with asyncio.timeout(PATIENCE_S):
        while [other.answers] == [True]:
            await asyncio.sleep(MS)
    answered_at = other.answered_at
    assert isinstance(other, Answering)
    await etcd.start()
    await one.register(instance(2))
    await one.withdraw(instance(2))
    await one.register(instance(3))
    await log.until(lambda: (NAME, 3) in log.present, PATIENCE_S)
    assert [other.answers] == [True]
    assert other.answered_at > answered_at
    assert instance(1) in log.present.values()
    assert removed(log) in ([], [Removed(NAME, 2)])
    assert not any("lost the lease of this process" in each for each in heard.warnings)


async def test_started_again_empty(etcd: EtcdServer, opens_etcd: OpensEtcd, heard: Heard):
    """Everything registers again under its id; clients do not notice. What died meanwhile goes after the grace."""
    one, other, dies = (opens_etcd(etcd.url, ttl_s=TTL_S) for _ in range(3))
    log, every = ChangeLog(), ChangeLog()
    await other.watch(NAME, log)
    await other.watch(None, every)
    for id in (1, 2):
        await one.register(instance(id, by="one"))
    await dies.register(instance(3))
    await log.until_ids([1, 2, 3], PATIENCE_S)
    etcd.kill()
    etcd.empty()
    await dies.close()  # without etcd: it cannot withdraw
    await etcd.start()
    await log.until_ids([1, 2], PATIENCE_S)
    assert removed(log) == [Removed(NAME, 3)]
    assert all(isinstance(each, Added) for each in log.changes[1:4])
    assert len(log.changes) == 5
    await every.until_ids([1, 2], PATIENCE_S)
    late = ChangeLog()
    await opens_etcd(etcd.url).watch(NAME, late)
    assert late.ids == [1, 2]
    assert late.present[NAME, 1].metadata == {"by": "one"}
    await one.withdraw(instance(1))  # it is its own still
    await log.until_ids([2], PATIENCE_S)


@pytest.mark.slow
async def test_frozen_for_longer_than_leases_last(etcd: EtcdServer, opens_etcd: OpensEtcd):
    """As it wakes it lets every lease run out; the workers register again, and clients do not notice."""
    one, other = opens_etcd(etcd.url, ttl_s=TTL_S), opens_etcd(etcd.url, ttl_s=TTL_S, timeout_s=5.0)
    log = ChangeLog()
    await other.watch(NAME, log)
    await one.register(instance(1))
    await log.until_ids([1], PATIENCE_S)
    etcd.freeze()
    with pytest.raises(DiscoveryError, match=f"no answer for 5 s .*{etcd.url}: no answer within 1.5 s"):
        await asyncio.wait_for(other.register(instance(2)), PATIENCE_S)
    etcd.thaw()
    await other.register(instance(3))
    await log.until(lambda: (NAME, 3) in log.present, PATIENCE_S)
    await asyncio.sleep(TTL_S)  # whatever runs out has run out
    await one.register(instance(4))
    await log.until_ids([1, 3, 4], PATIENCE_S)
    assert removed(log) == []


async def test_closing_while_it_is_frozen(etcd: EtcdServer, opens_etcd: OpensEtcd):
    one = opens_etcd(etcd.url, timeout_s=2 * PATIENCE_S)  # it does not wait for that
    await one.watch(NAME, ChangeLog())
    await one.register(instance(1))
    etcd.freeze()
    await asyncio.wait_for(one.close(), PATIENCE_S)
    etcd.thaw()


async def test_withdrawing_and_closing_without_it_takes_no_time(etcd: EtcdServer, opens_etcd: OpensEtcd, heard: Heard):
    one = opens_etcd(etcd.url, timeout_s=3.0)
    await one.watch(NAME, ChangeLog())
    await one.register(instance(1))
    etcd.kill()
    with pytest.raises(DiscoveryError):
        await one.register(instance(2))
    began = time.monotonic()
    await one.withdraw(instance(1))
    await one.close()
    assert time.monotonic() - began < 2.9  # it does not wait as the registration did


async def test_what_was_withdrawn_without_it_goes_when_it_is_back(etcd: EtcdServer, opens_etcd: OpensEtcd):
    one, other = opens_etcd(etcd.url, timeout_s=0.5), opens_etcd(etcd.url, ttl_s=1)
    log = ChangeLog()
    await other.watch(NAME, log)
    for id in (1, 2):
        await one.register(instance(id))
    await log.until_ids([1, 2], PATIENCE_S)
    etcd.kill()
    with pytest.raises(DiscoveryError):
        await one.register(instance(3))
    await one.withdraw(instance(1))
    await etcd.start()
    await log.until_ids([2], PATIENCE_S)
    late = ChangeLog()
    await opens_etcd(etcd.url).watch(NAME, late)
    assert late.ids == [2]


async def test_compacted_while_the_watch_was_away(etcd: EtcdServer, opens_etcd: OpensEtcd, raw: Raw):
    async with FaultProxy(f"tcp://127.0.0.1:{etcd.port}") as proxy:
        one, other = opens_etcd(etcd.url), opens_etcd(proxy.address.replace("tcp", "http"), ttl_s=1)
        log = ChangeLog()
        await other.watch(NAME, log)
        for id in (1, 2):
            await one.register(instance(id))
        await log.until_ids([1, 2], PATIENCE_S)
        proxy.black_hole()
        await one.withdraw(instance(1))
        await one.register(instance(2, changed=True))
        await one.register(instance(3))
        client = raw(etcd.url)
        revision = (await client.range(b"x")).header.revision
        await client.call("/v3/kv/compaction", {"revision": revision}, messages.Nothing)
        proxy.cut(reset=True)
        proxy.heal()
        await log.until_ids([2, 3], PATIENCE_S)
        assert log.present[NAME, 2].metadata == {"changed": True}
        await one.register(instance(4))
        await log.until_ids([2, 3, 4], PATIENCE_S)


async def test_no_event_is_lost_or_doubled_when_connections_break(etcd: EtcdServer, opens_etcd: OpensEtcd):
    async with FaultProxy(f"tcp://127.0.0.1:{etcd.port}") as proxy:
        one, other = opens_etcd(etcd.url), opens_etcd(proxy.address.replace("tcp", "http"))
        log = ChangeLog()
        await other.watch(NAME, log)
        for turn in range(1, 101):
            await one.register(instance(turn))
            if turn % 10 == 0:
                proxy.cut(reset=turn % 20 == 0)
        await log.until_ids(range(1, 101), PATIENCE_S)
        added = [each.instance.id for each in log.changes if isinstance(each, Added)]
        assert added == sorted(set(added))


def in_use(discovery: EtcdDiscovery, cluster: EtcdCluster) -> EtcdServer:
    """The member that a discovery talks to."""
    at = repr(discovery).partition("at ")[2].split()[0]
    return next(each for each in cluster.members if each.url == at)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "frozen"])
async def test_one_member_of_three(etcd_cluster: EtcdCluster, opens_etcd: OpensEtcd, fault: str):
    """Whichever it is, reads and writes go on with the others, and nothing is lost or forgotten."""
    one, other = (opens_etcd(etcd_cluster.urls, timeout_s=PATIENCE_S) for _ in range(2))
    log = ChangeLog()
    await other.watch(NAME, log)
    await one.register(instance(1))
    await log.until_ids([1], PATIENCE_S)
    victims = {in_use(one, etcd_cluster), in_use(other, etcd_cluster)}
    id = 1
    for victim in victims:  # one after the other: two at once leave no majority
        began = time.monotonic()
        (victim.kill if fault == "killed" else victim.freeze)()
        for _ in range(5):
            id += 1
            await one.register(instance(id))
        await log.until_ids(range(1, id + 1), PATIENCE_S)
        print(f"{fault}: five writes seen after {time.monotonic() - began:.2f} s")
        assert victim not in (in_use(one, etcd_cluster), in_use(other, etcd_cluster))
        if fault == "killed":
            await victim.start()
        else:
            victim.thaw()
    assert removed(log) == []

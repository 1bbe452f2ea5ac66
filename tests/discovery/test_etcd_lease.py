"""A worker's lease: it ends with the worker, not with its loop, and comes back when it was lost."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.discovery.conftest import NAME, Heard, OpensEtcd, Raw, instance
from tests.discovery.processes import Worker, worker
from tests.timing import PATIENCE_S
from triton_distributed.discovery import Removed
from triton_distributed.discovery.etcd.keys import EtcdKeys
from triton_distributed.testing import ChangeLog, EtcdServer

TTL_S = 2


@contextmanager
def etcd_worker(server: EtcdServer, prefix: str, *ids: int) -> Iterator[Worker]:
    with worker("register_in_etcd", server.url, prefix, TTL_S, *ids) as made:
        yield made


@pytest.mark.slow
async def test_a_killed_worker_goes_after_the_ttl(lasting_etcd: EtcdServer, opens_etcd: OpensEtcd):
    log = ChangeLog()
    await opens_etcd(lasting_etcd.url, prefix="killed").watch(NAME, log)
    with etcd_worker(lasting_etcd, "killed", 1, 2) as process:
        await log.until_ids([1, 2], PATIENCE_S)
        began = time.monotonic()
        process.signal(signal.SIGKILL)
        await log.until_ids([], PATIENCE_S)
        print(f"gone after {time.monotonic() - began:.2f} s")
        assert time.monotonic() - began > TTL_S * 0.5


@pytest.mark.slow
async def test_a_worker_that_was_stopped_for_longer_registers_again(lasting_etcd: EtcdServer, opens_etcd: OpensEtcd):
    log = ChangeLog()
    await opens_etcd(lasting_etcd.url, prefix="stopped").watch(NAME, log)
    with etcd_worker(lasting_etcd, "stopped", 1, 2) as process:
        await log.until_ids([1, 2], PATIENCE_S)
        process.signal(signal.SIGSTOP)
        await log.until_ids([], PATIENCE_S)
        began = time.monotonic()
        process.signal(signal.SIGCONT)
        await log.until_ids([1, 2], PATIENCE_S)
        print(f"back after {time.monotonic() - began:.2f} s")


@pytest.mark.slow
async def test_a_blocked_loop_keeps_the_registration(lasting_etcd: EtcdServer, opens_etcd: OpensEtcd, raw: Raw):
    """The worker's loop stands still while its lease is revoked: it registers again all the same, and does not lose
    that lease either."""
    log = ChangeLog()
    await opens_etcd(lasting_etcd.url, prefix="blocked").watch(NAME, log)
    client = raw(lasting_etcd.url)
    key = EtcdKeys("blocked").of(NAME, 1)
    with etcd_worker(lasting_etcd, "blocked", 1) as process:
        await log.until_ids([1], PATIENCE_S)
        process.go()
        assert process.hear() == "blocked"
        first = (await client.range(key)).kvs[0].lease
        await client.revoke(first)
        await log.until(lambda: len(log.changes) == 4, PATIENCE_S)
        assert log.changes[2] == Removed(NAME, 1)
        assert log.ids == [1]
        second = (await client.range(key)).kvs[0].lease
        assert second != first
        await asyncio.sleep(TTL_S + 0.5)
        assert (await client.range(key)).kvs[0].lease == second
        assert log.ids == [1]
        process.go()
        assert process.hear() == "free"
        process.go()
        assert process.hear() == "closed"
        await log.until_ids([], PATIENCE_S)


async def test_a_revoked_lease_is_made_anew(lasting_etcd: EtcdServer, opens_etcd: OpensEtcd, raw: Raw, heard: Heard):
    client, keys = raw(lasting_etcd.url), EtcdKeys("revoked")
    one, other = (opens_etcd(lasting_etcd.url, prefix="revoked", ttl_s=TTL_S) for _ in range(2))
    log = ChangeLog()
    await other.watch(NAME, log)
    for id in range(1, 6):
        await one.register(instance(id))
    await other.register(instance(5, by="other"))  # replaces it
    await one.withdraw(instance(4))
    await log.until_ids([1, 2, 3, 5], PATIENCE_S)
    await client.revoke((await client.range(keys.of(NAME, 1))).kvs[0].lease)
    await log.until_ids([5], PATIENCE_S)
    await log.until_ids([1, 2, 3, 5], PATIENCE_S)
    await heard.until(lambda line: "was replaced by another process" in line)
    assert log.present[NAME, 5].metadata == {"by": "other"}
    assert sum("lost the lease of this process" in each for each in heard.warnings) == 1


async def test_a_registration_finds_out_by_itself(lasting_etcd: EtcdServer, opens_etcd: OpensEtcd, raw: Raw):
    """Long before the next beat."""
    client, keys = raw(lasting_etcd.url), EtcdKeys("found-out")
    one, other = (opens_etcd(lasting_etcd.url, prefix="found-out", ttl_s=3600) for _ in range(2))
    await one.register(instance(1))
    await client.revoke((await client.range(keys.of(NAME, 1))).kvs[0].lease)
    await one.register(instance(2))
    log = ChangeLog()
    await other.watch(NAME, log)
    await log.until_ids([1, 2], PATIENCE_S)


async def test_closing_revokes_it(lasting_etcd: EtcdServer, opens_etcd: OpensEtcd, raw: Raw):
    client, keys = raw(lasting_etcd.url), EtcdKeys("closing")
    one = opens_etcd(lasting_etcd.url, prefix="closing")
    await one.register(instance(1))
    lease = (await client.range(keys.of(NAME, 1))).kvs[0].lease
    await one.close()
    assert not await client.keep_alive(lease)

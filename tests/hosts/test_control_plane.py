"""etcd and NATS are away while clients call workers on other hosts: no request fails, and all comes back by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.hosts.network import Network
from tests.hosts.running import Cluster, HostEtcd, HostNats, Program
from tests.timing import MS

pytestmark = pytest.mark.slow

LEASE_S = 2  # the shortest; the default is 10
AWAY_CALLS = 620  # at one every 10 ms: more than three leases, as 30 s are of the default
BRIEF_CALLS = 350  # more than one lease


@pytest.fixture
def members(cluster: Cluster, host_etcd: HostEtcd) -> Cluster:
    cluster.settings = {
        "ETCD_ENDPOINTS": host_etcd.url,
        "TRD_ETCD_LEASE_TTL_S": str(LEASE_S),
        "TRD_CONNECT_TIMEOUT_S": "1",
    }
    return cluster


async def loaded(cluster: Cluster) -> tuple[Program, set[int]]:
    """Two workers and a client with a steady load on them."""
    ids = {(await cluster.worker(host)).first for host in ("serves", "serves2")}
    client = await cluster.client("calls")
    assert set(await client.ask("wait", 2)) == ids
    await client.ask("load")
    await client.ask("more", 50)
    return client, ids


def say(report: Callable[[str], None], what: str, done: dict[str, Any]) -> None:
    longest = f"{done['longest_s'] * 1000:.0f} ms"
    report(f"{what}: {done['calls']} calls, {done['failed']} failed, the longest took {longest}")


async def test_etcd_is_firewalled(network: Network, members: Cluster, report: Callable[[str], None]):
    client, ids = await loaded(members)
    network.unplug("control")
    await client.ask("more", AWAY_CALLS)
    network.plug("control")
    await client.ask("more", 50)

    late = await members.client("calls")  # one that had no view: who is registered now?
    assert set(await late.ask("wait", 2)) == ids
    assert set(await client.ask("wait", 2)) == ids
    await members.worker("serves")
    assert len(await client.ask("wait", 3)) == 3
    done = await client.ask("loaded")
    say(report, f"etcd firewalled for {AWAY_CALLS * 10 * MS:.0f} s with a lease of {LEASE_S} s", done)
    assert done["errors"] == []


async def test_workers_lose_etcd_and_their_clients_do_not(
    network: Network, members: Cluster, report: Callable[[str], None]
):
    """etcd itself says that the workers are gone, as it would if they had died; the client's connections know better."""
    client, ids = await loaded(members)
    network.part("serves", "serves2", "control")
    await client.ask("more", BRIEF_CALLS)
    network.join("serves", "serves2", "control")
    assert set(await client.ask("wait", 2)) == ids
    done = await client.ask("loaded")
    say(report, f"the workers, not the client, cut from etcd for {BRIEF_CALLS * 10 * MS:.1f} s", done)
    assert done["errors"] == []
    assert "answer" in await client.ask("call")


async def test_nats_is_killed_and_restarted(members: Cluster, host_nats: HostNats, report: Callable[[str], None]):
    members.settings["NATS_SERVER"] = host_nats.url
    client, _ = await loaded(members)
    await client.ask("ticks", 5)
    host_nats.kill()
    await client.ask("more", 300)
    await host_nats.start()
    await client.ask("ticks", 5)
    done = await client.ask("loaded")
    say(report, "NATS killed, 3 s later restarted", done)
    assert done["errors"] == []

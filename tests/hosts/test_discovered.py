"""Hosts that find each other through etcd: which addresses are used, and what a wrong one says."""

from __future__ import annotations

import json
import sys

import pytest

from tests.hosts.network import Network
from tests.hosts.running import Cluster, HostEtcd

pytestmark = pytest.mark.slow


@pytest.fixture
def found(cluster: Cluster, host_etcd: HostEtcd) -> Cluster:
    """Everything that is started knows etcd, and nothing else."""
    cluster.settings = {"ETCD_ENDPOINTS": host_etcd.url, "TRD_CONNECT_TIMEOUT_S": "1"}
    return cluster


async def test_calls_go_to_workers_on_other_hosts(network: Network, found: Cluster):
    workers = [await found.worker(host) for host in ("serves", "serves2")]
    client = await found.client("calls")
    assert set(await client.ask("wait", 2)) == {each.first for each in workers}
    answers = [(await client.ask("call"))["answer"] for _ in range(4)]
    assert sorted(answers) == ["serves2: hello"] * 2 + ["serves: hello"] * 2
    assert [network["calls"].sockets_to(network[host]) for host in ("serves", "serves2")] == [1, 1]

    command = (sys.executable, "-m", "triton_distributed.cli.main", "ls", "--json", "hosts.all.echo")
    listed = network["control"].run(*command, settings={"ETCD_ENDPOINTS": found.settings["ETCD_ENDPOINTS"]})
    rows = [json.loads(line) for line in listed.splitlines()]
    assert {int(row["instance"]): row["state"] for row in rows} == {each.first: "serving" for each in workers}
    for row in rows:  # not by a setting: each worker found out under which address etcd's host sees it
        assert any(f"//{network['serves'].address}" in each or f"//{network['serves2'].address}" in each
                   for each in row["addresses"])  # fmt: skip
    assert [await each.stop() for each in workers] == [0, 0]
    assert await client.ask("wait", 0) == []


async def test_unix_sockets_are_for_one_host(network: Network, found: Cluster):
    await found.worker("serves")
    here, elsewhere = await found.client("serves"), await found.client("calls")
    for client in (here, elsewhere):
        await client.ask("wait", 1)
        assert (await client.ask("call"))["answer"] == "serves: hello"
    assert network["serves"].sockets_to(network["serves"]) == 0
    assert network["calls"].sockets_to(network["serves"]) == 1


@pytest.mark.parametrize("network", [{"one_kernel": True}], indirect=True, ids=["one kernel"])
async def test_containers_of_one_machine_use_tcp(network: Network, found: Cluster):
    await found.worker("serves")
    client = await found.client("calls")
    await client.ask("wait", 1)
    assert (await client.ask("call"))["answer"] == "serves: hello"
    assert network["calls"].sockets_to(network["serves"]) == 1


async def test_ipv6(network: Network, found: Cluster):
    await found.worker("serves", TRD_LISTEN="tcp://[::]:7000", TRD_ADVERTISE=network["serves"].address6)
    client = await found.client("calls")
    await client.ask("wait", 1)
    assert (await client.ask("call"))["answer"] == "serves: hello"
    assert network["calls"].sockets_to(network["serves"]) == 0
    found6 = network["calls"].run("ss", "-Htn6", "state", "established", "dst", f"[{network['serves'].address6}]:7000")
    assert len(found6.splitlines()) == 1


@pytest.mark.parametrize(
    ("advertised", "says"),
    [("10.77.0.99:7000", ""), ("10.99.0.1:7000", "unreachable"), ("127.0.0.1:1", "Connect call failed")],
    ids=["nobody", "no route", "this host"],
)
async def test_an_unreachable_address_is_said_to_be(found: Cluster, advertised: str, says: str):
    await found.worker("serves", TRD_ADVERTISE=advertised, TRD_LISTEN="tcp://0.0.0.0:7000")
    client = await found.client("calls")
    await client.ask("wait", 1)
    failed = await client.ask("call")
    assert failed["error"] == "ConnectionFailed"
    assert f"tcp://{advertised}" in failed["text"]
    assert "TRD_ADVERTISE" in failed["text"]
    assert says in failed["text"]

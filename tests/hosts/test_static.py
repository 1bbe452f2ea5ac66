"""Hosts that know each other by a fixed list: the network itself, cut and joined again."""

from __future__ import annotations

import asyncio

import pytest

from tests.hosts.network import Network
from tests.hosts.running import Cluster
from tests.timing import MS

pytestmark = [pytest.mark.slow, pytest.mark.leaves("socket files", reason="a host's folder goes with the host")]


def static(network: Network, *hosts: str) -> str:
    return ";".join(
        f"hosts.all.{name}=tcp://{network[host].address}:{port}"
        for host in hosts
        for name, port in (("echo", 7000), ("count", 7000))
    )


@pytest.fixture
async def pair(network: Network, cluster: Cluster):
    """A worker on one host and a client on another."""
    cluster.settings = {"TRD_DISCOVERY": "static", "TRD_STATIC": static(network, "serves")}
    await cluster.worker("serves", TRD_LISTEN=f"tcp://{network['serves'].address}:7000")
    client = await cluster.client("calls")
    assert (await client.ask("call"))["answer"] == "serves: hello"
    return client


async def test_streams_go_on_after_a_short_cut(network: Network, pair):
    await pair.ask("stream", 200, 0.01)
    while await pair.ask("items") < 20:
        pass
    network.part("calls", "serves")
    call = asyncio.ensure_future(pair.ask("call"))
    before = None
    await asyncio.wait([call], timeout=1500 * MS)
    assert not call.done(), "the network was not cut"
    network.join("calls", "serves")
    assert (await call)["answer"] == "serves: hello"
    done = await pair.ask("streamed")
    assert done == {"items": list(range(200))}

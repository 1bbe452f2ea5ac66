"""Hosts that know each other by a fixed list: the network between a client and a worker, cut without a reset."""

from __future__ import annotations

import asyncio

import pytest

from tests.hosts.network import Network
from tests.hosts.running import Cluster, Program
from tests.timing import MS

pytestmark = pytest.mark.slow
HEALTH_S, HOST_S = 1, 3  # in production 10 and 30


@pytest.fixture
async def pair(network: Network, cluster: Cluster) -> Program:
    """A client on one host, of a worker on another."""
    address = f"tcp://{network['serves'].address}:7000"
    entries = (f"hosts.all.{name}={address}" for name in ("echo", "count"))
    static = {"TRD_DISCOVERY": "static", "TRD_STATIC": ";".join(entries), "TRD_CONNECT_TIMEOUT_S": "1"}
    cluster.settings = {**static, "TRD_HEALTH_TIMEOUT_S": str(HEALTH_S), "TRD_HOST_TIMEOUT_S": str(HOST_S)}
    await cluster.worker("serves", TRD_LISTEN=address)
    client = await cluster.client("calls")
    assert (await client.ask("call"))["answer"] == "serves: hello"
    await client.ask("stream", 150, 0.01)
    await client.ask("items", 20)
    return client


async def test_a_short_cut_is_waited_for(network: Network, pair: Program):
    network.part("calls", "serves")
    call = asyncio.ensure_future(pair.ask("call"))
    await asyncio.wait([call], timeout=1000 * MS)
    assert not call.done(), "the network was not cut"
    network.join("calls", "serves")
    assert (await call)["answer"] == "serves: hello"
    assert await pair.ask("streamed") == {"items": list(range(150))}


async def test_a_long_cut_is_an_error_and_the_worker_comes_back_by_itself(network: Network, pair: Program):
    network.part("calls", "serves")
    cut = await pair.ask("streamed")
    assert cut["error"] == "StreamIncomplete"
    assert cut["items"] == list(range(len(cut["items"])))
    assert f"at tcp://{network['serves'].address}:7000: its host acknowledged nothing for 3 s" in cut["text"]
    refused = await pair.ask("call")
    assert refused["error"] == "ConnectionFailed"
    assert f"tcp://{network['serves'].address}:7000" in refused["text"]

    network.join("calls", "serves")
    while "error" in (again := await pair.ask("call")):
        pass
    assert again["answer"] == "serves: hello"

"""Connections of which one end is gone, or cannot be heard, and connections whose other end is merely stopped."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import pytest

from tests.hosts.network import Network
from tests.hosts.running import Cluster, Program

pytestmark = pytest.mark.slow
HEALTH_S, HOST_S = 1, 3  # in production 10 and 30
LOOKS = 4  # in HEALTH_S


@pytest.fixture
async def pair(network: Network, cluster: Cluster) -> tuple[Program, Program]:
    """A client on one host, and its worker on another."""
    address = f"tcp://{network['serves'].address}:7000"
    entries = (f"hosts.all.{name}={address}" for name in ("echo", "count"))
    cluster.settings = {
        "TRD_DISCOVERY": "static",
        "TRD_STATIC": ";".join(entries),
        "TRD_CONNECT_TIMEOUT_S": "1",
        "TRD_HEALTH_TIMEOUT_S": str(HEALTH_S),
        "TRD_HOST_TIMEOUT_S": str(HOST_S),
    }
    worker = await cluster.worker("serves", TRD_LISTEN=address)
    client = await cluster.client("calls")
    assert (await client.ask("call"))["answer"] == "serves: hello"
    return client, worker


def both(network: Network) -> None:
    network.part("calls", "serves")


def from_the_client(network: Network) -> None:
    network.deafen("serves", "calls")


def from_the_worker(network: Network) -> None:
    network.deafen("calls", "serves")


@pytest.mark.parametrize("lose", [both, from_the_client, from_the_worker])
@pytest.mark.parametrize("pause_s", [0.01, 1000], ids=["busy", "idle"])
async def test_both_ends_find_out(
    network: Network, pair: tuple[Program, Program], lose: Callable[[Network], None], pause_s: float
) -> None:
    """The client is told, and the worker's handler is cancelled, whether it was sending or not."""
    client, worker = pair
    await client.ask("stream", 1_000_000, pause_s)
    await client.ask("items", 1)
    lose(network)
    cut, cancelled = await asyncio.gather(client.ask("streamed"), worker.answer())
    assert cut["error"] == "StreamIncomplete"
    # Whoever is first resets the connection: where only one way is lost, the other may hear of it.
    reset = ["Connection reset by peer", "the peer closed the connection"] if lose is not both else []
    assert any(words in cut["text"] for words in (f"its host acknowledged nothing for {HOST_S} s", *reset)), cut
    assert cancelled == "cancelled"


async def test_a_stopped_worker_with_a_full_window_loses_nothing(
    network: Network, pair: tuple[Program, Program]
) -> None:
    client, worker = pair
    await client.ask("stream", 200, 0.01)
    await client.ask("items", 1)
    worker.process.send_signal(signal.SIGSTOP)
    try:
        await client.ask("push", 20)
        await client.ask("quiet", LOOKS * HOST_S // HEALTH_S * 3)
        timers = network["calls"].run("ss", "-Htno", "state", "established", "dst", network["serves"].address)
        assert "timer:(persist" in timers, timers
    finally:
        worker.process.send_signal(signal.SIGCONT)
    assert await client.ask("pushed") == 20
    assert await client.ask("streamed") == {"items": list(range(200))}


async def test_a_stopped_client_keeps_its_stream(network: Network, pair: tuple[Program, Program]) -> None:
    """Also where its window is full: the worker's kernel is answered."""
    client, worker = pair
    await client.ask("stream", 300, 0.01)
    await client.ask("items", 1)
    client.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(HOST_S * 2.5):
                await worker.answer()
    finally:
        client.process.send_signal(signal.SIGCONT)
    assert await client.ask("streamed") == {"items": list(range(300))}

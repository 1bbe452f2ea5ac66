"""Events over a real NATS server: it goes, it comes back, it freezes, it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.runtime.cluster import patiently, until
from tests.timing import PATIENCE_S
from triton_distributed.errors import BrokerError, MessageTooLarge
from triton_distributed.events.nats import BUFFER_BYTES, NatsEvents
from triton_distributed.external import nats as external
from triton_distributed.external.nats import NatsConnection, NatsOptions
from triton_distributed.testing import NatsServer

Connects = Callable[[], NatsConnection]


async def gone(connection: NatsConnection) -> None:
    await until(lambda: not connection.connected)


async def back(connection: NatsConnection) -> None:
    await until(lambda: connection.connected)


async def test_a_server_that_was_killed_and_started_again(nats: NatsServer, connect: Connects):
    connections = connect(), connect()
    one, other = (NatsEvents(each) for each in connections)
    subscription = await other.subscribe("a.b")
    await one.publish("a.b", b"before")
    assert await subscription.get(PATIENCE_S) == b"before"
    nats.kill()
    for each in connections:
        await gone(each)
    for number in range(100):
        await one.publish("a.b", b"%d" % number)  # waits in the client's buffer, as far as it goes
    await nats.start()
    for each in connections:
        await back(each)
    await until(lambda: all(each.reconnections for each in connections))  # counted a turn after the connection is back
    assert [each.reconnections for each in connections] == [1, 1]
    await connections[1].settle(PATIENCE_S)  # its subscription was sent again; now the server has it
    await one.publish("a.b", b"after")
    got = []
    while (event := await subscription.get(PATIENCE_S)) != b"after":
        got.append(int(event))
    assert got == sorted(set(got))
    await one.close()
    await other.close()


async def test_while_it_is_away_a_bounded_buffer_fills_and_then_it_says_so(nats: NatsServer, connect: Connects):
    connection = connect()
    plane = NatsEvents(connection)
    await plane.publish("a.b", b"x")
    nats.kill()
    await gone(connection)
    for _ in range(BUFFER_BYTES // 100_000):
        await patiently(plane.publish("a.b", bytes(100_000)))
    with pytest.raises(BrokerError, match=r"not connected, and the buffer of 2,097,152 bytes is full") as caught:
        await patiently(plane.publish("a.b", bytes(100_000)))
    assert nats.url in str(caught.value)
    with pytest.raises(BrokerError, match="no answer|cannot subscribe"):
        await patiently(plane.subscribe("a.c"))
    await plane.close()


@pytest.mark.slow
async def test_a_frozen_server_holds_nobody_for_long(
    nats: NatsServer, connect: Connects, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(external, "PING_INTERVAL_S", 0.5)  # The client leaves the server after three of them.
    plane = NatsEvents(connect())
    await plane.publish("a.b", b"x")
    nats.freeze()
    try:
        with pytest.raises(BrokerError, match="no answer|does not read|not connected"):
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    await plane.publish("a.b", bytes(500_000))
    finally:
        nats.thaw()
    await plane.close()


async def test_no_server(connect: Connects, nats: NatsServer):
    nats.kill()
    connection = NatsConnection(NatsOptions(nats.url, timeout_s=0.2))
    plane = NatsEvents(connection)
    for attempt in (plane.publish("a", b""), patiently(plane.subscribe("a"))):
        with pytest.raises(BrokerError) as caught:
            await attempt
        assert nats.url in str(caught.value)
    never = plane.subscribe("a")
    with pytest.raises(BrokerError):
        await never.get(PATIENCE_S)
    await plane.close()
    await connection.close()


async def test_an_event_above_the_servers_limit_names_it(nats: NatsServer, connect: Connects):
    plane = NatsEvents(connect())
    subscription = await plane.subscribe("a")
    await plane.publish("a", bytes(1_048_576))
    with pytest.raises(MessageTooLarge) as caught:
        await plane.publish("a", bytes(1_048_577))
    assert str(caught.value) == (
        "an event has 1,048,577 bytes, above the limit of 1,048,576: "
        f"raise max_payload of the NATS server at {nats.url}"
    )
    assert len(await subscription.get(PATIENCE_S)) == 1_048_576
    await plane.close()


async def test_what_others_publish_there_is_left_out(nats: NatsServer, connect: Connects):
    """Anybody can publish on NATS; a subscriber is not ended by it."""
    from triton_distributed.events.event import pack, unpack

    connection = connect()
    plane = NatsEvents(connection)
    subscription = await plane.subscribe("a", read=lambda data: unpack(data)[0])
    client = await connection.client()
    for data in (b"", b"{}", b"\x01" * 100, pack("ours", 1)):
        await client.publish("a", data)
    assert await subscription.get(PATIENCE_S) == "ours"
    assert subscription.unreadable == 3
    await plane.close()


async def test_ending_it_tells_the_server(nats: NatsServer, connect: Connects):
    connection = connect()
    plane = NatsEvents(connection)
    client = await connection.client()
    async with plane.subscribe("a"):
        assert len(client._subs) == 1
    assert len(client._subs) == 0
    async for _ in await _with_one_event(plane):
        break
    await until(lambda: not client._subs)
    await plane.close()


async def _with_one_event(plane: NatsEvents):
    subscription = await plane.subscribe("a")
    await plane.publish("a", b"1")
    return subscription

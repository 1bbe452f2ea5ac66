"""Sessions over a real NATS server."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.servers import missing
from tests.timing import MS, PATIENCE_S
from tests.transport.sessions import Caller, Lost, Service, Watched, bodies, calling, messages, numbers, serving, until
from triton_distributed.errors import BrokerError, ConnectionFailed
from triton_distributed.external.nats import NatsConnection, NatsOptions
from triton_distributed.external.nats_port import NatsPort
from triton_distributed.testing import NatsServer, ServerMissing
from triton_distributed.transport.address import Address
from triton_distributed.transport.nats import messages as m
from triton_distributed.transport.nats.network import NatsNetwork
from triton_distributed.transport.nats.transport import NatsTransport

ADDRESS = "nats://some_service_12345678.generate-1f"
BEAT_S = 1000 * MS  # as by default: most tests must not see a session end because of a busy machine
SOON_S = 50 * MS  # for tests that wait for a beat
pytestmark = pytest.mark.any_loop


@contextlib.asynccontextmanager
async def network(server: NatsServer, beat_s: float = BEAT_S) -> AsyncIterator[NatsNetwork]:
    """A connection of its own, as another process has."""
    connection = NatsConnection(NatsOptions(server.url))
    made = NatsNetwork(asyncio.get_running_loop(), connection, beat_s=beat_s)
    try:
        yield made
    finally:
        await made.close()
        await connection.close()


@contextlib.asynccontextmanager
async def joined(server: NatsServer, beat_s: float = BEAT_S, **options: Any) -> AsyncIterator[tuple[Service, Caller]]:
    """A service and a caller, each over its own connection."""
    async with (
        network(server, beat_s) as theirs,
        network(server, beat_s) as ours,
        serving(ADDRESS, networks={"nats": theirs}, **options) as service,
        calling(networks={"nats": ours}, **options) as caller,
    ):
        yield service, caller


def over_nats(session: Watched) -> Any:
    """The transport of a session, of which tests see the private parts."""
    assert isinstance(session.transport, NatsTransport)
    return session.transport


async def test_sessions(nats: NatsServer):
    async with joined(nats) as (service, caller):
        assert service.address == ADDRESS
        assert await numbers(await caller.call(ADDRESS, b"count 1000")) == [*range(1000)]
        body = bytes(range(256)) * 4000
        stream = await caller.call(ADDRESS, b"echo", end=False)
        await stream.send(body, ())
        stream.end()
        assert await bodies(stream) == [body]
    assert service.lost == ["the runtime at this end was shut down"]


async def test_64_streams_at_once(nats: NatsServer):
    async with joined(nats) as (_, caller):
        streams = await asyncio.gather(*[caller.call(ADDRESS, b"count 500") for _ in range(64)])
        assert await asyncio.gather(*map(numbers, streams)) == [[*range(500)]] * 64
        assert len(caller.made) == 1


async def test_what_is_larger_than_a_message_is_cut_and_put_together(tmp_path):
    config = tmp_path / "nats.conf"
    config.write_text("max_payload: 4096\n")
    try:
        server = NatsServer("-c", str(config), environ=os.environ)
    except ServerMissing as error:
        missing(error)
    array = np.arange(512 * 1024, dtype=np.float32)
    async with server, joined(server) as (_, caller):
        stream = await caller.call(ADDRESS, b"array 2", array.data.cast("B"))
        assert await bodies(stream) == [b"array"] * 2
        assert await numbers(await caller.call(ADDRESS, b"count 5000")) == [*range(5000)]


async def test_an_array_of_32_mib(nats: NatsServer):
    array = np.arange(8 << 20, dtype=np.float32)
    async with joined(nats) as (service, caller):
        stream = await caller.call(ADDRESS, b"array", array.data.cast("B"))
        async with asyncio.timeout(PATIENCE_S):
            ((body, buffers),) = [each async for each in messages(stream)]
        assert body == b"array"
        assert np.array_equal(np.frombuffer(buffers[0], np.float32), array)
        assert max(over_nats(each)._sent for each in service.accepted) > array.nbytes


async def test_nobody_listens(nats: NatsServer):
    async with network(nats) as ours, calling(networks={"nats": ours}) as caller:
        with pytest.raises(ConnectionFailed, match=f"nothing listens on that subject, at NATS {nats.url}"):
            await caller.pool.connect((ADDRESS,))
        with pytest.raises(ConnectionFailed, match="without wildcards"):
            await caller.pool.connect(("nats://a.*",))
        assert not ours._transports


async def test_an_answer_that_does_not_come(nats: NatsServer):
    async with network(nats) as ours, calling(50 * MS, networks={"nats": ours}) as caller:
        port = await ours._connected()
        await port.subscribe("deaf", lambda message: None)
        with pytest.raises(ConnectionFailed, match="no answer within"):
            await caller.pool.connect(("nats://deaf",))
        assert not ours._transports


async def test_a_worker_of_another_version(nats: NatsServer):
    async with joined(nats) as (_, _caller), network(nats) as ours:
        port = await ours._connected()
        answer = asyncio.get_running_loop().create_future()
        await port.subscribe("me", answer.set_result)
        newer = m.HEADER.pack(m.OPEN, 0, 0) + m.OPENING.pack(m.MAGIC, 9, 1000)
        port.publish(Address.parse(ADDRESS).host, newer, "me")
        async with asyncio.timeout(PATIENCE_S):
            message = await answer
        assert message.data[0] == m.CLOSE
        assert b"version 1 of sessions over NATS, not 9" in message.data


async def test_what_is_no_opening_is_ignored(nats: NatsServer):
    async with joined(nats) as (service, caller), network(nats) as ours:
        port = await ours._connected()
        subject = Address.parse(ADDRESS).host
        for data in (b"", b"\x01", bytes(40), m.opening(m.OPENED, 10), m.opening(m.OPEN, 0)):
            port.publish(subject, data, "me")
        port.publish(subject, m.opening(m.OPEN, 10), "")
        await port.flush()
        assert await numbers(await caller.call(ADDRESS, b"count 3")) == [0, 1, 2]
        assert len(service.accepted) == 1


async def test_strangers_on_the_subject_of_a_session_are_ignored(nats: NatsServer):
    async with joined(nats) as (service, caller), network(nats) as ours:
        stream = await caller.call(ADDRESS, b"echo", end=False)
        port = await ours._connected()
        for each in (service.accepted[0], caller.made[0]):
            for data in (b"", b"hello", m.HEADER.pack(m.DATA, 9, 9), m.HEADER.pack(m.CLOSE, 0, 0)):
                port.publish(over_nats(each).subject, data, "me")
        await port.flush()
        await stream.send(b"still here", ())
        stream.end()
        assert await bodies(stream) == [b"still here"]


async def test_a_gap_ends_the_session_with_words_at_both_ends(nats: NatsServer):
    async with joined(nats, SOON_S) as (service, caller):
        stream = await caller.call(ADDRESS, b"hold")
        async with asyncio.timeout(PATIENCE_S):
            await service.came.wait()
        over_nats(caller.made[0])._next += 1  # as if one had been dropped on its way
        with pytest.raises(Lost, match="lost on their way through NATS"):
            await bodies(stream)
        assert "lost on their way through NATS" in service.lost[0]


async def test_an_end_whose_connection_is_gone_is_noticed(nats: NatsServer):
    """As when its process was killed: the NATS server sees the connection close, and nobody says goodbye."""
    async with (
        network(nats) as theirs,
        network(nats, SOON_S) as ours,
        calling(networks={"nats": ours}) as caller,
        serving(ADDRESS, networks={"nats": theirs}) as service,
    ):
        stream = await caller.call(ADDRESS, b"hold")
        async with asyncio.timeout(PATIENCE_S):
            await service.came.wait()
        theirs._closed = True  # says nothing any more
        await theirs._connection.close()
        with pytest.raises(Lost, match="nothing listens on its subject any more"):
            await bodies(stream)


async def test_a_server_that_restarts_loses_no_idle_session(nats: NatsServer):
    async with joined(nats, 2 * BEAT_S) as (service, caller):
        stream = await caller.call(ADDRESS, b"echo", end=False)
        async with asyncio.timeout(PATIENCE_S):
            await service.came.wait()
            await stream.send(b"before", ())
            while not stream.inbox:
                await stream.readable()
            nats.kill()
            while over_nats(caller.made[0])._network._port.connected:
                await asyncio.sleep(0)
            await stream.send(b"meanwhile", ())
            await nats.start()
        stream.end()
        assert await bodies(stream) == [b"before", b"meanwhile"]
        assert not service.lost
        assert await numbers(await caller.call(ADDRESS, b"count 3")) == [0, 1, 2]
        assert len(caller.made) == 1


async def test_a_server_that_stays_away_ends_the_sessions(nats: NatsServer):
    async with joined(nats, 20 * MS) as (service, caller):
        stream = await caller.call(ADDRESS, b"hold")
        async with asyncio.timeout(PATIENCE_S):
            await service.came.wait()
        nats.kill()
        with pytest.raises(Lost, match="nothing was heard from the other end for"):
            await bodies(stream)
        with pytest.raises(ConnectionFailed, match=f"NATS at {nats.url}: there is no connection at the moment"):
            await caller.pool.connect((ADDRESS,))
        await until(lambda: service.lost)


async def test_closing_ends_a_reconnection_that_lost_its_cancellation(
    nats: NatsServer, monkeypatch: pytest.MonkeyPatch
):
    """`asyncio.wait_for` of Python 3.11 loses a cancellation that arrives together with its result."""
    connection = NatsConnection(NatsOptions(nats.url))
    client = await connection.client()
    dialling, lost = asyncio.Event(), asyncio.Event()

    async def connect(*_: Any, **__: Any) -> None:
        dialling.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not lost.is_set():
                lost.set()
                raise ConnectionRefusedError from None
            raise

    monkeypatch.setattr(client._transport, "connect", connect)
    nats.kill()
    async with asyncio.timeout(PATIENCE_S):
        await dialling.wait()
        await connection.close()
    assert lost.is_set()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_without_a_server_everything_names_it(nats: NatsServer):
    nats.kill()
    connection = NatsConnection(NatsOptions(nats.url, timeout_s=0.3))
    ours = NatsNetwork(asyncio.get_running_loop(), connection)
    async with calling(networks={"nats": ours}) as caller:
        with pytest.raises(ConnectionFailed, match=f"NATS at {nats.url}"):
            await caller.pool.connect((ADDRESS,))
        with pytest.raises(BrokerError, match=f"NATS at {nats.url}"):
            async with serving(ADDRESS, networks={"nats": ours}):
                pass
    await ours.close()
    await connection.close()


async def test_a_slow_socket_makes_writers_wait_and_loses_nothing(nats: NatsServer):
    async with joined(nats) as (_service, caller):
        await caller.pool.connect((ADDRESS,))
        nats.freeze()
        streams = [await caller.call(ADDRESS, b"echo", end=False) for _ in range(20)]
        body = bytes(range(256)) * 1000
        sending = [asyncio.ensure_future(each.send(body, ())) for each in streams]
        async with asyncio.timeout(PATIENCE_S):
            while not caller.made[0].paused:
                await asyncio.sleep(0)
        nats.thaw()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*sending)
        for each in streams:
            each.end()
        assert await asyncio.gather(*map(bodies, streams)) == [[body]] * 20


async def test_one_subject_is_listened_on_once(nats: NatsServer):
    async with network(nats) as ours, serving(ADDRESS, networks={"nats": ours}):
        with pytest.raises(OSError, match="has a listener already"):
            async with serving(ADDRESS, networks={"nats": ours}):
                pass
    assert repr(ours) == f"<NatsNetwork {nats.url}, 0 sessions>"


async def test_after_closing_nobody_listens(nats: NatsServer):
    async with (
        network(nats) as theirs,
        network(nats) as ours,
        calling(networks={"nats": ours}) as caller,
        serving(ADDRESS, networks={"nats": theirs}) as service,
    ):
        await caller.pool.connect((ADDRESS,))
        service.listener.close_listening()
        await (await theirs._connected()).flush()
        assert await numbers(await caller.call(ADDRESS, b"count 3")) == [0, 1, 2]  # the session goes on
        async with network(nats) as others, calling(networks={"nats": others}) as late:
            with pytest.raises(ConnectionFailed, match="nothing listens"):
                await late.pool.connect((ADDRESS,))


@pytest.mark.parametrize("where", ["before it has a connection", "before it has subscribed"])
async def test_a_session_that_is_opened_while_the_connection_is_closed_is_no_error(
    nats: NatsServer, where: str, monkeypatch: pytest.MonkeyPatch
):
    """Nobody waits for the task that opens it: an error of it would be reported by the loop, and fail this test."""

    async def gone(*_: Any, **__: Any) -> None:
        raise ConnectionError("closed")

    async with network(nats) as theirs, serving(ADDRESS, networks={"nats": theirs}) as service:
        if where == "before it has a connection":
            await theirs._connection.close()
        else:
            monkeypatch.setattr(NatsPort, "subscribe", gone)
        opening: Any = SimpleNamespace(data=m.opening(m.OPEN, 1000), reply="somebody.1")
        theirs._open(Address.parse(ADDRESS).host, opening)
        assert theirs._tasks
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait(theirs._tasks)
        assert not theirs._transports
        assert not service.listener.sessions
        await theirs.close()
        theirs._open(Address.parse(ADDRESS).host, opening)
        assert not theirs._tasks


async def test_a_client_that_gave_up_for_good_is_replaced(nats: NatsServer):
    """Credentials that are refused for a while end the client library's connection for good."""
    async with joined(nats, SOON_S) as (_, caller):
        await caller.pool.connect((ADDRESS,))
        session = caller.made[0]
        await over_nats(session)._network._port._client.close()
        await until(lambda: session.lost is not None)
        assert "was closed" in str(session.lost)
        assert await numbers(await caller.call(ADDRESS, b"count 3")) == [0, 1, 2]


async def test_a_listener_whose_client_gave_up_for_good_listens_again(nats: NatsServer):
    async with (
        network(nats, SOON_S) as theirs,
        network(nats) as ours,
        calling(networks={"nats": ours}) as caller,
        serving(ADDRESS, networks={"nats": theirs}),
    ):
        assert theirs._port is not None
        await theirs._port._client.close()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                with contextlib.suppress(ConnectionFailed):
                    await caller.pool.connect((ADDRESS,))
                    break
        assert await numbers(await caller.call(ADDRESS, b"count 3")) == [0, 1, 2]

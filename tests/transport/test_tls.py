"""Mutual TLS on TCP: who may, who may not and what each is told, on every loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.certificates import LONG_AGO, SETTINGS, Member
from tests.timing import MS, PATIENCE_S
from tests.transport.sessions import (
    HELLO,
    address_of,
    answering,
    bodies,
    calling,
    messages,
    numbers,
    peer,
    serving,
    session,
    until,
    watched,
)
from tests.transport.test_bad_input import unharmed
from tests.transport.test_session import asked, tcp_pair, written_in_vain
from tests.wire.joined import request
from triton_distributed.errors import ConfigError, ConnectionFailed
from triton_distributed.external.tls import TlsFiles
from triton_distributed.transport.bulk_reader import BulkReader
from triton_distributed.transport.tls import FAREWELL, SessionTls, TlsTransport
from triton_distributed.wire import frames as f

pytestmark = pytest.mark.any_loop


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def foreign() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def worker(tmp_path: Path, authority: trustme.CA) -> Member:
    return Member(tmp_path / "worker", authority)


@pytest.fixture
def client(tmp_path: Path, authority: trustme.CA) -> Member:
    return Member(tmp_path / "client", authority)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, "triton_distributed.transport"):
        yield caplog


def turned_away(log: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in log.records if each.name == "triton_distributed.transport"]


# --- it works --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=lambda each: each.name)
async def test_calls_over_tls(worker, client, version):
    context = client.tls()
    made = context._files.context(server=False)
    made.maximum_version = version
    async with serving(tls=worker.tls()) as service, calling(tls=context) as caller:
        assert await numbers(await caller.call(service.address, b"count 5000")) == [*range(5000)]
        for each in (caller.made[0], service.accepted[0]):
            transport = each.transport
            assert transport.get_extra_info("ssl_object").version() == version.name.replace("_", ".")
            assert transport.get_extra_info("ssl_object").getpeercert()
            assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert id(transport.get_protocol()) == id(each)
        assert service.accepted[0].address.startswith("tcp://127.0.0.1:")


async def test_what_passes_on_the_wire_is_not_readable(worker, client):
    seen = bytearray()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            seen.extend(data)
            writer.write(data)
        writer.close()

    async with serving(tls=worker.tls()) as service, calling(tls=client.tls()) as caller:

        async def between(from_client) -> None:
            async with peer(service.address) as to_worker:
                with contextlib.suppress(ConnectionError):
                    await asyncio.gather(
                        relay(from_client.reader, to_worker.writer), relay(to_worker.reader, from_client.writer)
                    )

        async with answering(between) as address:
            assert await bodies(await caller.call(address, b"echo")) == []
            stream = await caller.call(address, b"echo", end=False)
            await stream.send(b"in the open", ())
            stream.end()
            assert await bodies(stream) == [b"in the open"]
            await caller.pool.close()
            await service.accepted[0].gone.wait()
    assert len(seen) > 1000
    assert b"in the open" not in seen
    assert b"TRD" not in seen


@contextlib.asynccontextmanager
async def half(worker, client, version):
    """A greeted session and the plain TLS socket at its other end."""
    here, there = tcp_pair()
    here.setblocking(False)
    context = worker.files().context(server=True)
    context.maximum_version = version
    made = session()
    secured = asyncio.create_task(
        asyncio.to_thread(context.wrap_socket, there, server_side=True, suppress_ragged_eofs=False)
    )
    await asyncio.get_running_loop().create_connection(lambda: client.tls().dialling(made), sock=here)
    async with asyncio.timeout(PATIENCE_S):
        other = await secured
        other.send(HELLO)
        await made.ready
    try:
        yield made, other
    finally:
        other.close()
        made.close()
        async with asyncio.timeout(PATIENCE_S):
            await made.gone.wait()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=lambda each: each.name)
async def test_a_write_that_fails_leaves_what_the_peer_has_said(worker, client, version):
    async with half(worker, client, version) as (made, there):
        answered, begun, other = (asked(made) for _ in range(3))
        seen = b""
        while not seen.endswith(request(3)):
            seen += await asyncio.to_thread(there.recv, 1 << 16)
        accepted = f.frame(f.ACCEPT, 0, f.UINT64.pack(1) + f.UINT64.pack(2))
        body = bytes(range(256)) * 400
        parts = f.UINT64.pack(len(body)) + body
        there.send(accepted)
        there.send(f.frame(f.DATA, 1, parts[:50_000], f.MORE) + f.frame(f.DATA, 1, parts[50_000:], f.END))
        there.close()
        await written_in_vain(made)
        assert await bodies(answered) == [body]
        assert (begun.accepted, begun.lost) == (True, made.lost)
        assert (other.accepted, other.lost) == (False, made.lost)
        assert "Broken pipe" in made.lost
        assert not made.possibly_incomplete


async def test_what_is_left_of_a_connection_and_was_tampered_with_counts_as_nothing(worker, client):
    async with half(worker, client, ssl.TLSVersion.TLSv1_3) as (made, there):
        stream = asked(made)
        while not (await asyncio.to_thread(there.recv, 1 << 16)).endswith(request(1)):
            pass
        plain = socket.socket(fileno=os.dup(there.fileno()))
        there.send(f.frame(f.ACCEPT, 0, f.UINT64.pack(1)))
        plain.send(b"\x17\x03\x03\x00\x20" + bytes(32))  # a record that nobody has encrypted
        plain.close()
        there.close()
        await written_in_vain(made)
        assert stream.lost == made.lost
        assert made.possibly_incomplete


async def test_large_arrays_are_read_into_their_place(worker, client, monkeypatch):
    begun = []
    begin = vars(BulkReader)["begin"].__func__

    def noted(cls, *args):
        begun.append(args[1])
        return begin(cls, *args)

    monkeypatch.setattr(BulkReader, "begin", classmethod(noted))
    arrays = [random.Random(n).randbytes(size) for n, size in enumerate((5_000_000, 16 << 20, 300_001))]
    async with serving(tls=worker.tls()) as service, calling(tls=client.tls()) as caller:
        small = await caller.call(service.address, b"count 20000")
        for _ in range(3):  # over and back again: the reader is switched in and out
            stream = await caller.call(service.address, b"array 2", *(memoryview(each) for each in arrays))
            async with asyncio.timeout(PATIENCE_S):
                got = [[bytes(each) for each in buffers] async for _, buffers in messages(stream)]
            assert got == [arrays, arrays]
            assert await numbers(await caller.call(service.address, b"count 100")) == [*range(100)]
        assert await numbers(small) == [*range(20_000)]
    assert {*begun} >= {caller.made[0], service.accepted[0]}


async def test_who_reads_nothing_stops_its_producer_and_loses_nothing(worker, client):
    window = 1 << 24
    async with (
        serving(tls=worker.tls(), window=window) as service,
        peer(service.address, ssl=client.context(), server_hostname="") as slow,
    ):
        await slow.say(HELLO, request(1, b"large 400", window=2**31))
        await until(lambda: service.accepted and service.accepted[0].paused)
        (serving_,) = service.running
        assert serving_.sent < 400
        got = bytearray()
        while True:
            kind, flags, stream, payload = await slow.frame()
            if kind == f.DATA:
                got += payload[8:] if flags & f.MORE and not got else payload
            if stream and flags & f.END:
                break
        assert len(got) >= 400 * 100_000


async def test_unix_sockets_and_memory_stay_plain(trd_dir, worker, client):
    places = [address_of(each, trd_dir) for each in ("unix", "memory")]
    async with serving(*places, tls=worker.tls()) as service:
        for each in service.addresses:
            async with calling(tls=client.tls()) as secure, calling() as plain:
                assert await numbers(await secure.call(each, b"count 3")) == [0, 1, 2]
                assert await numbers(await plain.call(each, b"count 3")) == [0, 1, 2]


@pytest.mark.parametrize("end", ["close", "abort"])
async def test_who_leaves_in_the_middle_leaves_nothing_behind(worker, client, end):
    async with serving(tls=worker.tls()) as service, unharmed(service, tls=client.tls()):
        async with peer(service.address, ssl=client.context(), server_hostname="") as bad:
            await bad.say(HELLO, request(1, b"hold"), request(2, b"count 100000"))
            while len(service.served) < 4:
                await bad.frame()
            if end == "close":
                bad.writer.close()
            else:
                bad.writer.transport.abort()
            async with asyncio.timeout(PATIENCE_S):
                await service.accepted[-1].gone.wait()
        assert service.accepted[-1].streams == {}


async def test_a_worker_that_says_farewell_is_heard(worker, client):
    async with serving(tls=worker.tls()) as service, calling(tls=client.tls()) as caller:
        found = await caller.pool.connect((service.address,))
        service.accepted[0].break_off(f.GoawayCode.PROTOCOL, "out of tune")
        async with asyncio.timeout(PATIENCE_S):
            await watched(found).gone.wait()
        assert found.lost is not None
        assert "out of tune" in found.lost


# --- who may not -----------------------------------------------------------------------------------------------------


async def refusal(caller, address: str) -> str:
    with pytest.raises(ConnectionFailed) as caught:
        await caller.call(address, b"count 1")
    return str(caught.value)


async def gone(service, number: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while len(service.accepted) <= number:
            await asyncio.sleep(0)
        await service.accepted[number].gone.wait()


async def test_a_plain_client_at_a_tls_port(worker, client, warnings):
    async with serving(tls=worker.tls()) as service, unharmed(service, tls=client.tls()):
        async with calling() as plain:
            text = await refusal(plain, service.address)
            assert "this worker accepts only TLS: set TRD_TLS_CERT, TRD_TLS_KEY and TRD_TLS_CA" in text
        await gone(service, 1)
        (line,) = turned_away(warnings)
        assert "turned tcp://127.0.0.1:" in line
        assert "the peer does not speak TLS" in line


async def test_a_plain_client_that_speaks_slowly_or_something_else(worker, client, warnings):
    async with serving(tls=worker.tls()) as service, unharmed(service, tls=client.tls()):
        async with peer(service.address) as other:
            await other.say(b"GET / HTTP/1.1\r\n\r\n")
            assert (await other.reader.read(1 << 16)) == FAREWELL
        async with peer(service.address) as slow:
            await slow.say(HELLO[:1])
            await asyncio.sleep(0)
            with contextlib.suppress(ConnectionError):
                await slow.say(HELLO[1:])
                await slow.reader.read()
        await gone(service, 2)
        assert len(turned_away(warnings)) == 1


async def test_a_tls_client_at_a_plain_port(client, warnings):
    async with serving() as service, unharmed(service):
        async with calling(tls=client.tls()) as caller:
            text = await refusal(caller, service.address)
            assert "the worker does not speak TLS, and this end does: set TRD_TLS_CERT" in text
        await gone(service, 1)
    if lines := turned_away(warnings):  # the client may be gone before its words are read
        assert "peer speaks TLS, and this end does not: see TRD_TLS_CERT" in lines[0]


@pytest.mark.parametrize("kind", ["foreign", "expired"])
async def test_a_client_whose_certificate_is_not_accepted(tmp_path, authority, foreign, worker, client, kind, warnings):
    if kind == "foreign":
        bad = Member(tmp_path / "bad", foreign, authority)
    else:
        bad = Member(tmp_path / "bad", authority, not_before=LONG_AGO, not_after=LONG_AGO.replace(year=2002))
    async with serving(tls=worker.tls()) as service, unharmed(service, tls=client.tls()):
        async with calling(tls=bad.tls()) as caller:
            text = await refusal(caller, service.address)
            # A reset may overtake the alert; then the client knows less, but what to look at.
            assert "the worker refused this end's certificate" in text or "may not accept the certificate" in text
            assert "TRD_TLS_CERT" in text
            assert "TRD_TLS_CA there" in text
        await gone(service, 1)
        (line,) = turned_away(warnings)
        why = "certificate has expired" if kind == "expired" else "unable to get local issuer"
        assert f"the client's certificate is not accepted: {why}" in line


@pytest.mark.parametrize("kind", ["foreign", "expired"])
async def test_a_worker_whose_certificate_is_not_accepted(tmp_path, authority, foreign, client, kind, warnings):
    if kind == "foreign":
        bad = Member(tmp_path / "bad", foreign, authority)
    else:
        bad = Member(tmp_path / "bad", authority, not_before=LONG_AGO, not_after=LONG_AGO.replace(year=2002))
    async with serving(tls=bad.tls()) as service, calling(tls=client.tls()) as caller:
        text = await refusal(caller, service.address)
        why = "certificate has expired" if kind == "expired" else "unable to get local issuer certificate"
        assert f"the worker's certificate is not accepted: {why}; see TRD_TLS_CA here, TRD_TLS_CERT there" in text
        await gone(service, 0)
        (line,) = turned_away(warnings)
        assert "the client refused this worker's certificate" in line


async def test_a_client_without_a_certificate(worker, client, authority, warnings):
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    authority.configure_trust(bare)
    async with serving(tls=worker.tls()) as service, unharmed(service, tls=client.tls()):
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            async with peer(service.address, ssl=bare, server_hostname="") as bad:
                await bad.say(HELLO, request(1, b"count 3"))
                await bad.reader.read()
        await gone(service, 1)
        (line,) = turned_away(warnings)
        assert "the client shows no certificate: it needs TRD_TLS_CERT and TRD_TLS_KEY" in line
        assert len(service.served) == 2


async def test_old_versions_are_not_spoken(worker, client, authority):
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    authority.configure_trust(old)
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    async with serving(tls=worker.tls()) as service:
        with pytest.raises((ConnectionError, ssl.SSLError)):
            async with peer(service.address, ssl=old, server_hostname=""):
                pass
        await gone(service, 0)


async def test_the_name_that_a_worker_must_carry(tmp_path, authority, client):
    worker = Member(tmp_path / "worker", authority, name="workers.example")
    async with serving(tls=worker.tls()) as service:
        async with calling(tls=client.tls("workers.example")) as caller:
            assert await numbers(await caller.call(service.address, b"count 3")) == [0, 1, 2]
        async with calling(tls=client.tls("other.example")) as caller:
            text = await refusal(caller, service.address)
            assert "other.example" in text
            assert "see TRD_TLS_SERVER_NAME and TRD_TLS_CA here, TRD_TLS_CERT there" in text


# --- renewal ---------------------------------------------------------------------------------------------------------


async def test_a_renewed_certificate_is_used_from_the_next_handshake_on(worker, client, authority, foreign):
    """Both ends move to another authority without a restart; the session that there was goes on."""
    of_worker, of_client = worker.tls(), client.tls()
    async with serving(tls=of_worker) as service, calling(tls=of_client) as first:
        stream = await first.call(service.address, b"echo", end=False)
        worker.write(foreign)
        async with calling(tls=of_client) as late:
            assert "not accepted" in await refusal(late, service.address)
        client.write(foreign)
        async with calling(tls=of_client) as late:
            assert await numbers(await late.call(service.address, b"count 3")) == [0, 1, 2]
            peer_of_late = late.made[0].transport.get_extra_info("ssl_object").getpeercert()
            peer_of_first = first.made[0].transport.get_extra_info("ssl_object").getpeercert()
            assert peer_of_late["serialNumber"] != peer_of_first["serialNumber"]
        await stream.send(b"still here", ())
        stream.end()
        assert await bodies(stream) == [b"still here"]


async def test_a_renewal_that_is_half_done_keeps_what_there_was(worker, client, authority):
    of_worker = worker.tls()
    async with serving(tls=of_worker) as service:
        for content in (b"", b"half a certifi", None):
            if content is None:
                os.unlink(worker.key)
            else:
                Path(worker.cert).write_bytes(content)
            async with calling(tls=client.tls()) as caller:
                assert await numbers(await caller.call(service.address, b"count 3")) == [0, 1, 2]
        worker.write(authority)
        async with calling(tls=client.tls()) as caller:
            assert await numbers(await caller.call(service.address, b"count 3")) == [0, 1, 2]


async def test_files_that_are_none(tmp_path):
    files = TlsFiles(SETTINGS, str(tmp_path / "none"), "", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="^TRD_TLS_CERT="):
        SessionTls(files)


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"], ids=["-", "1", "11"])
async def test_a_handshake_that_is_not_finished_ends_in_time(worker, client, said, warnings):
    async with (
        serving(tls=worker.tls(), hello_timeout_s=200 * MS) as service,
        unharmed(service, tls=client.tls()),
        peer(service.address) as slow,
    ):
        await slow.say(said)
        async with asyncio.timeout(PATIENCE_S):
            assert await slow.reader.read() == b""
        (line,) = turned_away(warnings)
        assert f"the peer sent no hello within {200 * MS:g} s" in line


async def test_tls_without_a_hello_ends_in_time(worker, client):
    async with (
        serving(tls=worker.tls(), hello_timeout_s=200 * MS) as service,
        peer(service.address, ssl=client.context(), server_hostname="") as silent,
    ):
        assert await silent.dismissal() == f"the peer sent no hello within {200 * MS:g} s"


async def test_connections_count_before_their_handshake(worker, client, warnings):
    async with (
        serving(tls=worker.tls(), max_sessions=2) as service,
        calling(tls=client.tls()) as caller,
        peer(service.address),
        peer(service.address),
    ):
        await until(lambda: len(service.accepted) == 2)
        assert await numbers(await caller.call(service.address, b"count 3")) == [0, 1, 2]
        assert len(service.listener.sessions) == 2  # the one that was silent for longest has given way
        assert "2 sessions are open here, see TRD_MAX_SESSIONS" in turned_away(warnings)[0]
        await gone(service, 0)


async def test_a_worker_that_never_answers_the_handshake(client):
    async with answering(lambda peer: peer.hear()) as address, calling(timeout_s=100 * MS, tls=client.tls()) as caller:
        assert "no answer within 0.1 s" in await refusal(caller, address)


async def test_noise(worker, client):
    """Random bytes in place of TLS, and in the middle of it."""
    chance = random.Random(5)
    async with serving(tls=worker.tls()) as service, unharmed(service, tls=client.tls()):
        for number in range(200):
            start = (b"", b"\x16\x03\x01", b"\x15\x03\x03\x00\x02", b"\x16\x03\x03\x00\x20\x01")[number % 4]
            async with peer(service.address) as bad:
                with contextlib.suppress(ConnectionError):
                    await bad.say(start + chance.randbytes(chance.randint(1, 300)))
                    bad.writer.write_eof()
                    await bad.reader.read()
        await until(lambda: len(service.listener.sessions) <= 1)


async def test_records_that_are_forged_end_the_session(worker, client):
    """Behind a good handshake: what is no record of this connection."""
    async with serving(tls=worker.tls()) as service, calling(tls=client.tls()) as caller:
        stream = await caller.call(service.address, b"hold")
        transport = caller.made[0].transport
        assert isinstance(transport, TlsTransport)
        transport._plain.write(b"\x17\x03\x03\x00\x20" + bytes(32))
        async with asyncio.timeout(PATIENCE_S):
            while stream.lost is None:
                await stream.next_readable()
            await service.accepted[0].gone.wait()
        assert "TLS with the client failed" in service.lost[0] or "alert" in service.lost[0]

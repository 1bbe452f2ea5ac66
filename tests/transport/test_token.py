"""Sessions between ends that share a token, and all the others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

import pytest
import trustme

from tests.certificates import Member
from tests.timing import MS, PATIENCE_S
from tests.transport.sessions import HELLO, address_of, answering, bodies, calling, numbers, peer, serving
from tests.transport.test_bad_input import resident, unharmed
from tests.wire.joined import frames_of, request
from triton_distributed.errors import ConnectionFailed
from triton_distributed.wire import frames as f
from triton_distributed.wire.authentication import REFUSED
from triton_distributed.wire.hello import Hello, hello_frame

pytestmark = pytest.mark.any_loop

TOKEN = b"correct horse battery staple"
SCHEMES = ["tcp", "unix", "memory"]
OPENING = hello_frame(Hello(features=["token"], challenge=b"c" * 32))


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_calls_between_members(trd_dir, scheme):
    async with serving(address_of(scheme, trd_dir), token=TOKEN) as service, calling(token=TOKEN) as caller:
        assert await numbers(await caller.call(service.address, b"count 5000")) == [*range(5000)]
        large = bytes(3_000_000)
        stream = await caller.call(service.address, b"array", large)
        assert await bodies(stream) == [b"array"]
        assert caller.made[0].connection.peer is not None
        assert caller.made[0].connection.peer.window == service.accepted[0].connection.hello.window


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("of_client", "of_worker"),
    [
        pytest.param(b"wrong", TOKEN, id="wrong"),
        pytest.param(b"", TOKEN, id="client has none"),
        pytest.param(TOKEN, b"", id="worker has none"),
    ],
)
async def test_who_does_not_share_the_token_is_refused(trd_dir, scheme, of_client, of_worker, caplog):
    with caplog.at_level(logging.WARNING, "triton_distributed.transport"):
        async with (
            serving(address_of(scheme, trd_dir), token=of_worker) as service,
            unharmed(service, token=of_worker),
            calling(token=of_client) as caller,
        ):
            for _ in range(3):
                with pytest.raises(ConnectionFailed, match="refused: .*TRD_TOKEN"):
                    await caller.call(service.address, b"count 1")
            for each in service.accepted[1:]:
                await asyncio.wait_for(each.gone.wait(), PATIENCE_S)
            assert len(service.served) == 2
    (line,) = [each.getMessage() for each in caplog.records]
    assert line.startswith("turned tcp://127.0.0.1:" if scheme == "tcp" else "turned a client away: ")
    assert "refused" in line or "closed the connection" in line


async def test_the_token_is_not_on_the_wire():
    seen = [bytearray(), bytearray()]

    async def relay(kept: bytearray, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            kept.extend(data)
            writer.write(data)
        writer.close()

    async with serving(token=TOKEN) as service, calling(token=TOKEN) as caller:

        async def between(from_client) -> None:
            async with peer(service.address) as to_worker:
                with contextlib.suppress(ConnectionError):
                    await asyncio.gather(
                        relay(seen[0], from_client.reader, to_worker.writer),
                        relay(seen[1], to_worker.reader, from_client.writer),
                    )

        async with answering(between) as address:
            assert await numbers(await caller.call(address, b"count 3")) == [0, 1, 2]
            await caller.pool.close()
            await asyncio.wait_for(service.accepted[0].gone.wait(), PATIENCE_S)
    for each in seen:
        assert [frame[0] for frame in frames_of(bytes(each))][:2] == [f.HELLO, f.AUTH]
        assert TOKEN not in each
        assert TOKEN.hex().encode() not in each


@pytest.mark.parametrize(
    "data",
    [
        pytest.param([HELLO, request(1, b"count 3")], id="a plain member's request"),
        pytest.param([OPENING, request(1, b"count 3")], id="a request before the proof"),
        pytest.param([OPENING, f.frame(f.AUTH, 0, bytes(80)), request(1, b"count 3")], id="a request behind a lie"),
        pytest.param([OPENING, f.HEADER.pack(1 << 30, f.AUTH, 0, 0)], id="a proof of 1 GiB"),
        pytest.param([b"GET / HTTP/1.1\r\n\r\n"], id="HTTP"),
    ],
)
async def test_strangers_get_the_challenge_and_a_refusal(data):
    async with serving(token=TOKEN) as service, unharmed(service, token=TOKEN), peer(service.address) as bad:
        with contextlib.suppress(ConnectionError):
            await bad.say(*data)
        heard = await bad.hear()
        assert {each[0] for each in heard} <= {f.HELLO, f.GOAWAY}
        assert b"agent" not in heard[0][3]
        assert heard[1:] in ([], [(f.GOAWAY, 0, 0, bytes((f.GoawayCode.PROTOCOL,)) + REFUSED.encode())])
        assert service.lost == [REFUSED]


@pytest.mark.parametrize("said", [b"", OPENING[:-1], OPENING, OPENING + f.HEADER.pack(80, f.AUTH, 0, 0) + bytes(79)])
async def test_who_is_slow_to_prove_it_is_ended_in_time(said):
    async with (
        serving(token=TOKEN, hello_timeout_s=200 * MS) as service,
        unharmed(service, token=TOKEN),
        peer(service.address) as slow,
    ):
        await slow.say(said)
        assert await slow.dismissal() == f"the peer sent no hello within {200 * MS:g} s"


async def test_a_worker_that_never_proves_it():
    async def challenges(peer) -> None:
        await peer.say(OPENING)
        await peer.hear()

    async with answering(challenges) as address, calling(timeout_s=100 * MS, token=TOKEN) as caller:
        with pytest.raises(ConnectionFailed, match="no answer within"):
            await caller.call(address, b"count 1")


async def test_a_mirror_learns_nothing():
    async def mirror(peer) -> None:
        while data := await peer.reader.read(1 << 16):
            await peer.say(data)

    async with answering(mirror) as address, calling(token=TOKEN) as caller:
        with pytest.raises(ConnectionFailed, match="refused: .*TRD_TOKEN"):
            await caller.call(address, b"count 1")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads what the kernel says of a process's memory")
async def test_thousands_of_wrong_tokens(caplog):
    """They cost neither memory nor a log; a member is served meanwhile and afterwards."""
    async with serving(token=TOKEN) as service, unharmed(service, token=TOKEN):
        before = resident()
        with caplog.at_level(logging.WARNING, "triton_distributed.transport"):
            for _ in range(40):
                async with contextlib.AsyncExitStack() as stack:
                    peers = [await stack.enter_async_context(peer(service.address)) for _ in range(50)]
                    for each in peers:
                        await each.say(OPENING, f.frame(f.AUTH, 0, bytes(200)))
                    for each in peers:
                        assert REFUSED in await each.dismissal()
            assert len(caplog.records) < 60  # one in ten seconds
        async with asyncio.timeout(PATIENCE_S):
            while len(service.listener.sessions) > 1:
                await asyncio.sleep(0)
        service.accepted[1:] = []
        assert resident() - before < 50 << 20
        async with calling(token=TOKEN) as late:
            assert await numbers(await late.call(service.address, b"count 3")) == [0, 1, 2]


async def test_a_token_inside_tls(tmp_path):
    authority = trustme.CA()
    worker, client = (Member(tmp_path / name, authority).tls() for name in ("worker", "client"))
    async with serving(token=TOKEN, tls=worker) as service:
        async with calling(token=TOKEN, tls=client) as caller:
            assert await numbers(await caller.call(service.address, b"count 3")) == [0, 1, 2]
        async with calling(token=b"wrong", tls=client) as caller:
            with pytest.raises(ConnectionFailed, match="refused: .*TRD_TOKEN"):
                await caller.call(service.address, b"count 1")
        async with calling(token=TOKEN) as caller:
            with pytest.raises(ConnectionFailed, match="accepts only TLS: set TRD_TLS_CERT"):
                await caller.call(service.address, b"count 1")

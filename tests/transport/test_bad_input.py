"""Peers that break the protocol, by mistake or on purpose: the one who did it is told and closed, and a good client's
stream on another session goes on and finishes."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.timing import MS, PATIENCE_S
from tests.transport.sessions import HELLO, Service, bodies, calling, messages, numbers, peer, serving
from tests.wire.joined import request
from triton_distributed.wire import frames as f
from triton_distributed.wire.hello import Hello, hello_frame

ITEMS = 20_000


@contextlib.asynccontextmanager
async def unharmed(service: Service, **options: Any) -> AsyncIterator[None]:
    """While the block runs a good client has read some of its items; afterwards it gets all the others."""
    async with calling(**options) as good:
        stream = await good.call(service.address, b"count %d" % ITEMS)
        two_way = await good.call(service.address, b"echo", end=False)
        await two_way.send(b"before", ())
        first = await anext(messages(stream))
        yield
        await two_way.send(bytes(300_000), ())
        two_way.end()
        assert [first[0][0], *await numbers(stream)][-1] == ITEMS - 1
        assert await bodies(two_way) == [b"before", bytes(300_000)]
        assert len(good.made) == 1


BROKEN = [
    pytest.param([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"], "not this protocol", id="HTTP"),
    pytest.param(
        [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64)], "peer speaks TLS|not a hello", id="TLS"
    ),
    pytest.param([request(1)], "first frame is not a hello", id="a request without a hello"),
    pytest.param([f.frame(f.HELLO, 0, b"TRD\0\xc1")], "hello cannot be read", id="a hello that is none"),
    pytest.param([f.frame(f.HELLO, 0, b"TRD\0\x81\xa5agent\xa2\xff\xff")], "hello cannot be read", id="no text"),
    pytest.param([hello_frame(Hello(version=4, lowest=3))], "speaks 1 to 1, the peer 3 to 4", id="a later version"),
    pytest.param([HELLO, HELLO], "kind 1 came on the session", id="two hellos"),
    pytest.param([HELLO, f.frame(77, 0)], "kind 77", id="an unknown kind"),
    pytest.param(
        [HELLO, f.HEADER.pack(2**32 - 1, f.DATA, 0, 1)], "announces 4,294,967,295 bytes", id="oversized frame"
    ),
    pytest.param([HELLO, f.frame(f.REQUEST, 1, f.UINT64.pack(2**63), f.MORE)], "the limit is", id="oversized message"),
    pytest.param([HELLO, f.frame(f.DATA, 9, b"\x01")], "stream 9, which was never opened", id="out of order"),
    pytest.param([HELLO, request(5), request(4)], "stream 4 was opened twice or out of order", id="ids that go down"),
    pytest.param([HELLO, request(1, b"hold"), f.frame(f.DATA, 1, b"\x01")], "in state RECEIVED", id="behind the end"),
    pytest.param([HELLO, request(1, announced=2**31)], "shorter than the metadata", id="metadata that is not there"),
    pytest.param(
        [HELLO, request(1, b"echo", flags=0), *[f.frame(f.DATA, 1, bytes(f.MAX_FRAME))] * 40], "credit", id="no credit"
    ),
    pytest.param(
        [HELLO, request(1, b"echo", flags=0), f.frame(f.DATA, 1, f.UINT64.pack(99) + b"x", f.MORE | f.END)],
        "middle of a message",
        id="a message that goes on and ends",
    ),
]


@pytest.mark.any_loop
@pytest.mark.parametrize(("data", "says"), BROKEN)
@pytest.mark.parametrize("slowly", [False, True], ids=["at once", "byte by byte"])
async def test_who_breaks_the_protocol_is_told_and_closed(data, says, slowly):
    async with serving() as service, unharmed(service), peer(service.address) as bad:
        said = b"".join(data)
        with contextlib.suppress(ConnectionError):  # it closes before it has taken everything
            for at in range(0, min(len(said), 400), 1) if slowly else ():
                await bad.say(said[at : at + 1])
                if not at % 16:
                    await asyncio.sleep(0)
            await bad.say(said[400:] if slowly else said)
        heard = await bad.hear()
        assert len(service.lost) == 1
        with pytest.raises(AssertionError, match=says):
            raise AssertionError(service.lost[0])
        # Closing on bytes that nobody read resets a TCP connection, and a reset may overtake the words.
        words = bytes((f.GoawayCode.PROTOCOL,)) + service.lost[0].encode()
        assert (f.GOAWAY, 0, 0, words) in heard or len(said) > 70


@pytest.mark.any_loop
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(HELLO[:3], id="half a header"),
        pytest.param(HELLO[:-1], id="most of a hello"),
    ],
)
async def test_who_says_nothing_is_told_and_closed_in_time(data):
    async with (
        serving(hello_timeout_s=100 * MS) as service,
        unharmed(service),
        peer(service.address) as silent,
    ):
        await silent.say(data)
        assert await silent.dismissal() == f"the peer sent no hello within {100 * MS:g} s"


@pytest.mark.parametrize("end", ["close", "half-close", "abort"])
@pytest.mark.parametrize(
    "data",
    [
        pytest.param([b""], id="at once"),
        pytest.param([HELLO[:9]], id="in its hello"),
        pytest.param([HELLO, request(1, b"hold")[:20]], id="in a header"),
        pytest.param([HELLO, request(1, b"count 100000")], id="with an answer under way"),
        pytest.param([HELLO, f.frame(f.REQUEST, 1, f.UINT64.pack(1 << 29) + bytes(99), f.MORE)], id="in a message"),
        pytest.param(
            [
                HELLO,
                request(1, b"echo", flags=0),
                f.frame(f.DATA, 1, f.UINT64.pack(1 << 29) + bytes(99), f.MORE),
                f.frame(f.DATA, 1, bytes(200000), f.MORE)[:90000],
            ],
            id="in a fragment that is read in place",
        ),
    ],
)
async def test_who_leaves_in_the_middle_leaves_nothing_behind(data, end):
    async with serving() as service, unharmed(service):
        before = len(service.accepted)
        async with peer(service.address) as bad:
            await bad.say(*data)
            if end == "half-close":
                bad.writer.write_eof()
                await bad.hear()
            elif end == "close":
                bad.writer.close()
            else:
                bad.writer.transport.abort()
            async with asyncio.timeout(PATIENCE_S):
                while len(service.accepted) == before:
                    await asyncio.sleep(0)
                await service.accepted[-1].gone.wait()
        assert service.accepted[-1].streams == {}
        assert len(service.listener.sessions) == before


async def test_noise():
    """Random bytes behind a hello, many times over: each peer is told and closed."""
    chance = random.Random(7)
    async with serving() as service, unharmed(service):
        for _ in range(100):
            async with peer(service.address) as bad:
                with contextlib.suppress(ConnectionError):
                    await bad.say(HELLO, chance.randbytes(chance.randint(14, 300)))
                    bad.writer.write_eof()
                frames = await bad.hear()
                assert frames[0][0] == f.HELLO
                assert {each[0] for each in frames[1:]} <= set(f.Kind)


async def test_a_thousand_connections_at_once():
    """Silent ones: all are told and closed, and meanwhile a good client is served."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 3000:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(3000, hard), hard))
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2500:
        pytest.skip("this machine allows too few open files")
    async with serving(hello_timeout_s=1000 * MS) as service, unharmed(service), contextlib.AsyncExitStack() as stack:
        peers = await asyncio.gather(*[stack.enter_async_context(peer(service.address)) for _ in range(1000)])
        words = await asyncio.gather(*[each.dismissal() for each in peers])
        assert set(words) == {f"the peer sent no hello within {1000 * MS:g} s"}
        async with asyncio.timeout(PATIENCE_S):
            while len(service.listener.sessions) > 1:
                await asyncio.sleep(0)


async def test_a_thousand_good_connections_at_once():
    async with serving() as service, contextlib.AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(calling()) for _ in range(1000)]
        streams = await asyncio.gather(*[each.call(service.address, b"count 3") for each in callers])
        assert await asyncio.gather(*[numbers(each) for each in streams]) == [[0, 1, 2]] * 1000


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads what the kernel says of a process's memory")
@pytest.mark.parametrize(
    ("flood", "number"),
    [
        pytest.param([f.frame(f.PING, 0, bytes(64))], 600_000, id="pings"),
        pytest.param(None, 200_000, id="requests that are refused"),
        pytest.param([f.frame(f.CREDIT, 1, bytes(4))], 400_000, id="credit"),
        pytest.param([f.frame(f.ACCEPT, 0, bytes(8000))], 4000, id="accepts"),
    ],
)
async def test_who_asks_without_reading_costs_little(flood, number):
    async with (
        serving(hello=Hello(max_streams=10), hello_timeout_s=500 * MS) as service,
        unharmed(service),
        peer(service.address) as bad,
    ):
        bad.reader._limit = 1  # type: ignore[attr-defined]  # stops reading: what is answered stays where it is
        before = resident()
        await bad.say(HELLO, request(1, b"hold"))

        async def floods() -> None:
            with contextlib.suppress(ConnectionError):
                for at in range(0, number, 1000):
                    if flood is None:
                        await bad.say(b"".join(request(2 + at + each) for each in range(1000)))
                    else:
                        await bad.say(flood[0] * 1000 if number > 10_000 else flood[0])

        flooding = asyncio.create_task(floods())
        async with asyncio.timeout(PATIENCE_S):
            while not flooding.done() and not service.accepted[-1].inbound.choked:  # it may not be heard to its end
                assert resident() - before < 100 << 20
                await asyncio.sleep(0.001)
        assert resident() - before < 100 << 20
        flooding.cancel()
        bad.writer.transport.abort()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads what the kernel says of a process's memory")
async def test_messages_that_are_announced_and_never_sent_cost_little():
    async with serving() as service, unharmed(service), peer(service.address) as bad:
        before = resident()
        await bad.say(HELLO)
        for size in (1 << 29, 250_000):
            for number in range(2000):
                data = f.frame(f.REQUEST, number + (1 if size > 1 << 20 else 2001), f.UINT64.pack(size) + b"x", f.MORE)
                await bad.say(data)
        await bad.say(f.frame(f.PING, 0, b"there yet"))
        while (await bad.frame())[0] not in (f.PONG, f.GOAWAY):
            pass
        assert resident() - before < 100 << 20

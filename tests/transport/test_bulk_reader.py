"""Large messages, read from the socket straight to where they stay, while small frames come between."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from tests.timing import PATIENCE_S
from tests.transport.sessions import (
    HELLO,
    WINDOW,
    Failed,
    Lost,
    Peer,
    address_of,
    answering,
    bodies,
    calling,
    messages,
    numbers,
    peer,
    serving,
)
from tests.wire.joined import request
from triton_distributed.transport.bulk_reader import BulkReader
from triton_distributed.transport.stream import Stream
from triton_distributed.wire import frames as f
from triton_distributed.wire.hello import Hello
from triton_distributed.wire.states import State

pytestmark = pytest.mark.any_loop
ARRAY = bytes(range(256)) * 65536  # 16 MiB in which every misplaced byte shows
SOCKETS = ["tcp", "unix"]


@pytest.fixture
def switches(monkeypatch) -> list[BulkReader]:
    """The readers that took a session's place."""
    made: list[BulkReader] = []
    begin = vars(BulkReader)["begin"].__func__

    def noted(cls, *args):
        reader = begin(cls, *args)
        if reader is not None:
            made.append(reader)
        return reader

    monkeypatch.setattr(BulkReader, "begin", classmethod(noted))
    return made


async def arrays(stream: Stream) -> int:
    """How many arrays came, each looked at."""
    found = 0
    async with asyncio.timeout(PATIENCE_S):
        async for body, buffers in messages(stream):
            assert body == b"array"
            assert all(memoryview(each) == ARRAY for each in buffers)
            found += 1
    return found


@pytest.mark.parametrize("scheme", SOCKETS)
async def test_arrays_arrive_intact_while_small_frames_come_between(trd_dir, scheme, switches):
    async with serving(address_of(scheme, trd_dir)) as service, calling() as caller:
        small = [await caller.call(service.address, b"count 20000") for _ in range(3)]
        async with asyncio.TaskGroup() as both:
            reading = [both.create_task(numbers(each)) for each in small]
            large = both.create_task(arrays(await caller.call(service.address, b"array 3", ARRAY)))
        assert large.result() == 3
        assert [each.result() for each in reading] == [[*range(20_000)]] * 3
        assert {each._session for each in switches} == {caller.made[0], service.accepted[0]}
        assert len(caller.made) == 1
        # reads come as plain bytes again
        for _ in range(3):
            assert await numbers(await caller.call(service.address, b"count 10")) == [*range(10)]
        assert caller.made[0].inbound.bulk is service.accepted[0].inbound.bulk is None


@pytest.mark.parametrize("scheme", [*SOCKETS, "memory"])
async def test_arrays_both_ways_at_once(trd_dir, scheme):
    async with serving(address_of(scheme, trd_dir)) as service, calling() as caller:
        streams = await asyncio.gather(*[caller.call(service.address, b"array 1", ARRAY, ARRAY[:99]) for _ in range(3)])
        for stream in streams:
            async with asyncio.timeout(PATIENCE_S):
                ((_, (first, second)),) = [each async for each in messages(stream)]
            assert memoryview(first) == ARRAY
            assert bytes(second) == ARRAY[:99]


async def test_buffers_of_every_size_in_one_message():
    sizes = [0, 1, f.SMALL, 0, f.MAX_FRAME, f.MAX_FRAME + 1, 0, 5_000_000, 3, *range(2000), 0]
    buffers = [ARRAY[at : at + size] for at, size in enumerate(sizes)]
    async with serving() as service, calling() as caller:
        stream = await caller.call(service.address, b"array 2", *buffers)
        async with asyncio.timeout(PATIENCE_S):
            got = [[bytes(each) for each in found] async for _, found in messages(stream)]
        assert got == [buffers, buffers]


async def test_what_arrived_may_be_written_to_and_outlives_its_session():
    async with serving() as service, calling() as caller:
        stream = await caller.call(service.address, b"array 1", ARRAY)
        async with asyncio.timeout(PATIENCE_S):
            ((_, (got,)),) = [each async for each in messages(stream)]
    assert memoryview(got) == ARRAY
    got[0] = 255
    assert got[0] == 255


@pytest.mark.parametrize("side", ["caller", "service"])
async def test_an_abort_in_the_middle_of_a_fragment_leaves_the_session_whole(side):
    async with serving() as service, calling() as caller:
        counting = await caller.call(service.address, b"count 20000")
        if side == "caller":
            stream = await caller.call(service.address, b"array 50", ARRAY)
            receiver, direct = stream, caller.made[0]
        else:
            stream = await caller.call(service.address, b"hold", end=False)
            sending = asyncio.ensure_future(stream.send(b"", [memoryview(ARRAY)] * 10))
            async with asyncio.timeout(PATIENCE_S):
                while len(service.served) < 2:
                    await asyncio.sleep(0)
            receiver, direct = service.served[1].stream, service.accepted[0]
        async with asyncio.timeout(PATIENCE_S):
            while not (direct.connection.direct is not None and direct.connection.direct.stream is receiver):
                await asyncio.sleep(0)
        receiver.abort(f.CANCEL if side == "caller" else f.ERROR, 0, b"enough")
        if side == "service":
            handler = service.served[1].task
            assert handler is not None
            handler.cancel()  # its handler holds on to a stream that is gone
            with pytest.raises(Failed, match="enough"):
                await bodies(stream)
            async with asyncio.timeout(PATIENCE_S):
                await sending
        assert await numbers(counting) == [*range(20_000)]
        assert await arrays(await caller.call(service.address, b"array 1", ARRAY)) == 1
        assert len(caller.made) == 1


@pytest.mark.parametrize("left", [1, 100_000, 200_000])
async def test_a_peer_that_is_gone_in_the_middle_of_a_fragment(left):
    async def worker(peer: Peer) -> None:
        await peer.say(HELLO)
        while (await peer.frame())[0] != f.REQUEST:
            pass
        data = f.frame(f.DATA, 1, f.UINT64.pack(400_000) + bytes(199_992), f.MORE)
        data += f.frame(f.DATA, 1, bytes(200_008), f.END)
        await peer.say(data[:-left])
        peer.writer.close()  # on credit that it did not read, which resets the connection

    async with calling() as caller, answering(worker) as address:
        stream = await caller.call(address, b"x")
        with pytest.raises(Lost, match="closed the connection|connection lost"):
            await bodies(stream)
        assert stream.state == State.CLOSED
        assert not stream.inbox


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(f.frame(f.DATA, 1, bytes(150_000), f.END), "bytes missing", id="ended too early"),
        pytest.param(f.frame(f.DATA, 1, bytes(250_000), f.END), "longer than it announced", id="too long"),
        pytest.param(f.frame(f.DATA, 1, bytes(200_008), f.MORE | f.END), "middle of a message", id="goes on and ends"),
        pytest.param(f.frame(f.BATCH, 1, bytes(200_008)), "continued by a frame of kind 4", id="another kind"),
        pytest.param(
            f.frame(f.DATA, 1, bytes(200_008), f.END) + f.frame(99, 0), "kind 99", id="nonsense behind the last"
        ),
    ],
)
async def test_what_breaks_the_protocol_while_reading_in_place(data, says):
    async with serving() as service, calling() as caller, peer(service.address) as bad:
        good = await caller.call(service.address, b"count 20000")
        first = f.frame(f.DATA, 1, f.UINT64.pack(400_000) + bytes(199_992), f.MORE)
        with contextlib.suppress(ConnectionError):  # it may be sent away before it has said all of it
            await bad.say(HELLO, request(1, b"echo", flags=0), first, data[:-5])
            for at in range(5, 0, -1):
                await bad.say(data[-at : len(data) - at + 1])
                await asyncio.sleep(0)
        await bad.hear()
        (why,) = service.lost
        assert says in why
        assert await numbers(good) == [*range(20_000)]


async def test_a_message_larger_than_one_credit_can_say_is_taken():
    """Credit for all of it is given at once, and one CREDIT holds 32 bits."""
    hello = Hello(max_message=1 << 40, window=WINDOW)
    async with serving(hello=hello) as service, peer(service.address) as one:
        await one.say(HELLO, request(1, b"echo", flags=0))
        await one.say(f.frame(f.DATA, 1, f.UINT64.pack(1 << 33), f.MORE), f.frame(f.PING, 0, b"alive"))
        credit = 0
        while (frame := await one.frame())[0] != f.PONG:
            kind, _, _, payload = frame
            assert kind != f.GOAWAY, payload
            if kind == f.CREDIT:
                credit += f.UINT32.unpack(payload)[0]
        assert credit >= 1 << 33
        assert service.lost == []

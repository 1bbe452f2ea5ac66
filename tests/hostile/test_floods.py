"""Peers that send as fast as they can, or that read nothing: they wait for their turn, and others do not."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from tests.runtime.cluster import until
from tests.timing import PATIENCE_S
from tests.transport.sessions import (
    HELLO,
    Peer,
    Service,
    Watched,
    answering,
    bodies,
    calling,
    numbers,
    peer,
    serving,
    watched,
)
from tests.wire.joined import request
from triton_distributed.transport.fairness import ENDED, FRAMES, READ_BYTES, FairShare
from triton_distributed.transport.inbound import UNTAKEN
from triton_distributed.transport.stream import Stream
from triton_distributed.wire import frames as f
from triton_distributed.wire.connection import MOST_WAITING_PONGS
from triton_distributed.wire.hello import Hello
from triton_distributed.wire.window import MADE_BYTES, SMALLEST_WINDOW, WRITE_BYTES

pytestmark = pytest.mark.any_loop

MANY = 100_000


def read_up_to(peer: Peer, limit: int) -> None:
    """Let a peer's reader hold twice this many bytes before it stops reading."""
    peer.reader._limit = limit  # type: ignore[attr-defined]


async def accepted(service: Service, bad: Peer) -> Watched:
    """The session of a raw peer that has just been connected."""
    await bad.say(HELLO)
    await until(lambda: service.accepted[-1].connection.peer is not None)
    return service.accepted[-1]


def held(session: Watched) -> bool:
    """Whether a session reads nothing for now."""
    return session._inbound is not None and session._inbound.held


LAST = f.frame(f.PING, 0, b"the last")


async def answer_to_last(bad: Peer) -> None:
    """Wait until everything before `LAST` was served."""
    while (await bad.frame())[3] != b"the last":
        pass


CANCELLED = request(1) + f.frame(f.CANCEL, 1)
FLOODS = [
    pytest.param(CANCELLED + f.frame(f.CANCEL, 1) * MANY, id="cancels of a stream that is over"),
    pytest.param(b"".join(request(n) + f.frame(f.CANCEL, n) for n in range(1, 4000)), id="requests and their cancels"),
    pytest.param(CANCELLED + f.frame(f.CREDIT, 1, bytes(4)) * MANY, id="credit"),
    pytest.param(f.frame(f.PONG, 0, b"what?") * MANY, id="answers to nothing"),
    pytest.param(f.coded(f.GOAWAY, 0, f.GoawayCode.DRAINING, b"soon") * MANY, id="farewells"),
]


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_flood_waits_its_turn_and_a_call_does_not(flood):
    async with serving() as service, calling() as good:
        await numbers(await good.call(service.address, b"count 1"))
        async with peer(service.address) as bad:
            session = await accepted(service, bad)
            said = asyncio.create_task(bad.say(flood, LAST))
            served = asyncio.create_task(answer_to_last(bad))
            await until(lambda: held(session) or session.lost)
            assert await numbers(await good.call(service.address, b"count 3")) == [0, 1, 2]
            assert not served.done(), "the whole flood was served before the call"
            await asyncio.wait_for(served, PATIENCE_S)
            await said
            assert not held(session)
        await until(session.gone.is_set)
        await until(lambda: not service.running)


async def test_no_frame_of_a_flood_is_lost_or_served_twice():
    async with serving() as service, peer(service.address) as bad:
        session = await accepted(service, bad)
        number = 3000
        asking = asyncio.create_task(bad.say(*[f.frame(f.PING, 0, b"%d" % each) for each in range(number)]))
        assert (await bad.frame())[0] == f.HELLO
        for each in range(number):
            assert await bad.frame() == (f.PONG, 0, 0, b"%d" % each)
        await asking
        assert not held(session)


async def test_who_takes_no_answers_is_heard_no_more_until_he_does():
    async with serving() as service, calling() as good, peer(service.address) as bad:
        session = await accepted(service, bad)
        read_up_to(bad, 1)  # stops reading
        number = 300_000
        asking = asyncio.create_task(bad.say(f.frame(f.PING, 0, bytes(64)) * number))
        await until(lambda: session.inbound.choked)
        assert len(session.connection.out) <= UNTAKEN + FRAMES
        assert session.transport.get_write_buffer_size() <= 2 * WRITE_BYTES
        assert await numbers(await good.call(service.address, b"count 3")) == [0, 1, 2]
        assert held(session)
        assert session.lost is None
        read_up_to(bad, 1 << 20)
        assert (await bad.frame())[0] == f.HELLO
        answers = number * (f.HEADER_BYTES + 64)
        async with asyncio.timeout(PATIENCE_S):
            assert len(await bad.reader.readexactly(answers)) == answers
            await asking
        assert not held(session)


async def test_the_items_of_many_streams_that_nobody_reads_are_few():
    streams = 400
    async with serving() as service, calling() as good, peer(service.address) as bad:
        session = await accepted(service, bad)
        read_up_to(bad, 1)
        endless = b"".join(request(n, b"count 1000000000", window=2**32 - 1) for n in range(1, streams + 1))
        await bad.say(endless)
        await until(lambda: session.paused)
        assert await numbers(await good.call(service.address, b"count 3")) == [0, 1, 2]
        made = sum(len(item) + 256 for stream in session.streams.values() for item in stream.outbox)
        assert (
            session.connection.turn_bytes == max(SMALLEST_WINDOW, MADE_BYTES // streams)
            or len(session.streams) < streams
        )
        assert made <= 2 * MADE_BYTES
        assert session.transport.get_write_buffer_size() <= 2 * WRITE_BYTES


async def test_the_streams_of_a_lost_client_end_a_few_at_a_time():
    streams = 200
    async with serving() as service, calling() as good, peer(service.address) as bad:
        session = await accepted(service, bad)
        await bad.say(*[request(n, b"hold") for n in range(1, streams + 1)])
        await until(lambda: sum(each.task is not None for each in service.running) == streams)
        streams_of_it = list(session.streams.values())
        streams_of_it[0].push(b"nobody takes this")
        session.break_off(f.GoawayCode.PROTOCOL, "enough")
        assert not session.connection.ready
        assert not any(each.outbox for each in streams_of_it)
        assert sum(each.task is not None and each.task.cancelling() for each in service.running) == ENDED
        assert not session.streams
        await until(lambda: not service.running)
        assert await numbers(await good.call(service.address, b"count 3")) == [0, 1, 2]


async def test_the_handlers_of_a_burst_begin_a_few_at_a_time_and_in_order():
    streams = 300
    async with serving() as service, calling() as good, peer(service.address) as bad:
        await numbers(await good.call(service.address, b"count 1"))
        session = await accepted(service, bad)
        said = asyncio.create_task(bad.say(b"".join(request(n, b"hold") for n in range(1, streams + 1))))
        seen, began = [0], service.served
        async with asyncio.timeout(PATIENCE_S):
            while seen[-1] < streams + 1:
                await asyncio.sleep(0)
                seen.append(sum(each.task is not None for each in began))
                assert sum(each.stream.accepted for each in began) == seen[-1]  # the peer is told of no others
        await said
        most = max(after - before for before, after in itertools.pairwise(seen))
        assert most <= FRAMES
        await until(lambda: not held(session))
        assert await numbers(await good.call(service.address, b"count 3")) == [0, 1, 2]


async def test_a_request_that_is_cancelled_in_the_turn_that_serves_it_does_not_begin():
    async with serving() as service, peer(service.address) as bad:
        session = await accepted(service, bad)
        many = FRAMES // 2
        await bad.say(b"".join([*(request(n, b"hold") for n in range(1, many + 1)), f.frame(f.CANCEL, many), LAST]))
        await answer_to_last(bad)
        await until(lambda: not held(session))
        assert service.served[-1].task is None
        assert sum(each.task is not None for each in service.served) == many - 1


@pytest.mark.parametrize("size", [1000, f.MAX_FRAME - 64])
async def test_large_frames_wait_their_turn_too(size):
    class Counting(FairShare):
        def wait(self, session: Any) -> None:
            taken.append(session.taken)
            super().wait(session)

    taken: list[int] = []
    count = 4 * READ_BYTES // size
    async with serving() as service, calling() as good, peer(service.address) as bad:
        session = await accepted(service, bad)
        session.inbound.share = Counting(asyncio.get_running_loop())
        await bad.say(CANCELLED, *[f.frame(f.PONG, 0, bytes(size))] * count, LAST)
        assert await numbers(await good.call(service.address, b"count 3")) == [0, 1, 2]
        await answer_to_last(bad)
        assert taken
        assert max(taken) <= READ_BYTES + 2 * f.MAX_FRAME


async def test_a_large_message_waits_its_turn_too():
    async with serving() as service, calling() as good:
        await numbers(await good.call(service.address, b"count 1"))
        large = bytes(32 * READ_BYTES)
        call = asyncio.ensure_future(good.call(service.address, b"array 1", large))
        missing: list[int] = []  # bytes of the message, turn by turn
        while not call.done():
            missing += [each.assembly.left for each in service.accepted[-1].streams.values() if each.assembly]
            await asyncio.sleep(0)
        assert await bodies(await call) == [b"array"]
    steps = [before - after for before, after in itertools.pairwise(missing)]
    assert len(missing) >= 16
    assert max(steps) <= READ_BYTES + 2 * f.LARGE_FRAME


class Ending(Stream):
    """In place of a stream that ends with its session."""

    def __init__(self, name: str, noted: list[str]) -> None:
        self.name, self.noted = name, noted

    def on_closed(self) -> None:
        self.noted.append(self.name)


async def test_handlers_of_several_lost_clients_end_side_by_side():
    noted: list[str] = []
    share = FairShare(asyncio.get_running_loop())
    share.end([Ending("many", noted) for _ in range(10 * ENDED)])
    share.end([Ending("one", noted)])
    share.end([])
    assert noted == ["many"] * ENDED
    await until(lambda: len(noted) == 10 * ENDED + 1)
    assert noted.index("one") == ENDED + 1


class Waiting:
    """In place of a session: notes its turns and wants so many."""

    def __init__(self, share: FairShare, name: str, wanted: int, noted: list[str]) -> None:
        self.share, self.name, self.wanted, self.noted = share, name, wanted, noted
        share.wait(self)

    def take_turn(self) -> None:
        self.noted.append(self.name)
        self.wanted -= 1
        if self.wanted:
            self.share.wait(self)


async def test_sessions_that_wait_take_turns_and_one_at_a_time():
    noted: list[str] = []
    share = FairShare(asyncio.get_running_loop())
    for name in ("a", "b", "c"):
        Waiting(share, name, 10, noted)
    seen = [0]
    async with asyncio.timeout(PATIENCE_S):
        while len(noted) < 30:
            assert share.frames < FRAMES
            await asyncio.sleep(0)
            seen.append(len(noted))
    assert noted == ["a", "b", "c"] * 10
    assert max(after - before for before, after in itertools.pairwise(seen)) == 1
    await asyncio.sleep(0)
    assert (share.frames, share.read_bytes) == (FRAMES, READ_BYTES)


async def test_a_session_that_raises_in_its_turn_does_not_stop_the_others():
    class Broken(Waiting):
        def take_turn(self) -> None:
            raise ValueError

    loop = asyncio.get_running_loop()
    raised: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: raised.append(context))
    noted: list[str] = []
    share = FairShare(loop)
    Broken(share, "broken", 1, noted)
    Waiting(share, "good", 3, noted)
    await until(lambda: noted == ["good"] * 3)
    assert [type(each["exception"]) for each in raised] == [ValueError]


async def test_a_client_reads_a_worker_that_floods_in_turns_too():
    async def floods(worker: Any) -> None:
        await worker.say(HELLO, f.frame(f.PONG, 0) * 4 * MANY, LAST)
        await answer_to_last(worker)
        served.set()
        await worker.hear()

    served = asyncio.Event()

    async with answering(floods) as address, serving() as service, calling() as caller:
        bad = watched(await caller.pool.connect((address,)))
        await until(lambda: held(bad))
        assert await numbers(await caller.call(service.address, b"count 3")) == [0, 1, 2]
        assert not served.is_set()
        await asyncio.wait_for(served.wait(), PATIENCE_S)


async def test_large_messages_pass_beside_a_flood():
    async with serving() as service, calling() as good, peer(service.address) as bad:
        session = await accepted(service, bad)
        said = asyncio.create_task(bad.say(CANCELLED + f.frame(f.CANCEL, 1) * 3 * MANY))
        await until(lambda: held(session) or said.done())
        large = bytes(3_000_000)
        stream = await good.call(service.address, b"array 3", large)
        assert await bodies(stream) == [b"array"] * 3
        said.cancel()


async def test_streams_beyond_the_limit_are_refused_and_not_kept():
    async with (
        serving(hello=Hello(max_streams=10)) as service,
        calling() as good,
        peer(service.address) as bad,
    ):
        session = await accepted(service, bad)
        await bad.say(*[request(n, b"echo", flags=0) for n in range(1, 1001)], f.frame(f.PING, 0, b"end"))
        kinds = []
        while (frame := await bad.frame())[0] != f.PONG:
            kinds.append(frame[0])
        assert kinds.count(f.REJECT) == 990
        assert len(session.streams) == 10
        assert await numbers(await good.call(service.address, b"count 3")) == [0, 1, 2]


async def test_a_worker_that_pings_without_reading_costs_its_client_little():
    async def asks(worker: Any) -> None:
        await worker.say(HELLO, *[f.frame(f.PING, 0, bytes(64)) * 1000] * 100)
        asked.set()

    asked = asyncio.Event()
    async with answering(asks, limit=1) as address, serving() as service, calling() as caller:
        bad = watched(await caller.pool.connect((address,)))
        bad.paused = True  # as if the kernel took nothing
        await asyncio.wait_for(asked.wait(), PATIENCE_S)
        await until(lambda: len(bad.connection.out) >= MOST_WAITING_PONGS)
        assert await numbers(await caller.call(service.address, b"count 3")) == [0, 1, 2]
        assert len(bad.connection.out) <= MOST_WAITING_PONGS
        assert bad.lost is None
        bad.transport.abort()

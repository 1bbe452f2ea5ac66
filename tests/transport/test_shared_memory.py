"""Large buffers between two sessions of one host: which travel through shared memory, and who gets it back."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.test_shared_memory import memory_files, writable
from tests.timing import PATIENCE_S
from tests.transport.sessions import (
    WINDOW,
    Peer,
    address_of,
    calling,
    messages,
    peer,
    serving,
    until,
)
from triton_distributed.system.shared_memory import SUPPORTED, Segment
from triton_distributed.transport import shared_pool
from triton_distributed.transport.session import Session
from triton_distributed.transport.shared_memory import SMALLEST, SessionMemory
from triton_distributed.transport.shared_pool import SharedPool
from triton_distributed.transport.stream import Stream
from triton_distributed.wire import frames as f
from triton_distributed.wire.assembly import RETURNED, head_of
from triton_distributed.wire.hello import SHARED_MEMORY, Hello, hello_frame
from triton_distributed.wire.shared import Offer, Said, memory_frame, offer_frame, read_memory
from triton_distributed.wire.window import ByteBudget

if not SUPPORTED:
    pytest.skip("this system has no sealed memory files", allow_module_level=True)

pytestmark = pytest.mark.any_loop
MIB = 1024 * 1024
LARGE = bytes(range(256)) * (4 * MIB // 256)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = memory_files()
    yield
    gc.collect()
    assert memory_files() == before


@pytest.fixture
async def pool() -> AsyncIterator[SharedPool]:
    made = a_pool()
    yield made
    made.close()


def a_pool(limit: int = 64 * MIB) -> SharedPool:
    return SharedPool(asyncio.get_running_loop(), limit)


def memory_of(session: Session) -> SessionMemory:
    assert session.memory is not None
    return session.memory


def kinds(buffers: list[Any]) -> list[bool]:
    """Of each buffer, whether it lies in shared memory."""
    return [type(each) is memoryview for each in buffers]


async def answers(stream: Stream) -> list[list[Any]]:
    async with asyncio.timeout(PATIENCE_S):
        return [buffers async for _, buffers in messages(stream)]


def unix(tmp_path: Path) -> str:
    return address_of("unix", tmp_path)


async def test_a_large_buffer_is_used_in_place_and_its_memory_used_again(trd_dir, pool):
    async with serving(unix(trd_dir), shared=pool) as service, calling(shared=a_pool()) as caller:
        for _ in range(5):
            (got,), *_ = await answers(await caller.call(service.address, b"array", LARGE))
            assert kinds([got]) == [True]
            assert got.readonly
            assert got == LARGE
            del got
            await until(lambda: pool._free)
    assert pool.bytes == len(LARGE)  # one slot in all


async def test_small_buffers_stay_in_the_message(trd_dir, pool):
    async with serving(unix(trd_dir), shared=pool) as service, calling(shared=a_pool()) as caller:
        sent = [bytes(SMALLEST - 1), bytes(SMALLEST), b"", LARGE]
        ((*got,),) = await answers(await caller.call(service.address, b"array", *sent))
        assert kinds(got) == [False, True, False, True]
        assert [bytes(each) for each in got] == sent
        del got


async def test_items_of_both_directions(trd_dir, pool):
    mine = a_pool()
    async with serving(unix(trd_dir), shared=pool) as service, calling(shared=mine) as caller:
        stream = await caller.call(service.address, b"echo", end=False)
        found = messages(stream)
        for number in range(5):
            await stream.send(b"item", [memoryview(LARGE)], f.END if number == 4 else 0)
            _, (got,) = await asyncio.wait_for(anext(found), PATIENCE_S)
            assert kinds([got]) == [True]
            assert got == LARGE
            del got
        assert [each async for each in found] == []
        await until(lambda: not memory_of(caller.made[0])._lent and mine._free)
    assert mine.bytes == len(LARGE)
    assert pool.bytes == 0  # what came back is where it was
    mine.close()


async def test_what_came_back_is_used_again_after_both_ends_have_dropped_it(trd_dir, pool):
    mine = a_pool()
    async with serving(unix(trd_dir), shared=pool) as service, calling(shared=mine) as caller:
        stream = await caller.call(service.address, b"echo", end=False)
        found = messages(stream)
        await stream.send(b"item", [memoryview(LARGE)])
        _, (got,) = await asyncio.wait_for(anext(found), PATIENCE_S)
        await stream.send(b"item", [memoryview(bytes(len(LARGE)))])
        _, (other,) = await asyncio.wait_for(anext(found), PATIENCE_S)
        await until(lambda: len(memory_of(caller.made[0])._lent) == 1)  # the worker has dropped the first one
        assert (got, other) == (LARGE, bytes(len(LARGE)))
        assert (mine.bytes, mine._free) == (2 * len(LARGE), [])
        part = got[100:200]
        del got
        assert part == LARGE[100:200]
        del part
        await until(lambda: len(mine._free) == 1)
        await stream.send(b"item", [memoryview(LARGE)])
        _, (kept,) = await asyncio.wait_for(anext(found), PATIENCE_S)
        assert mine.bytes == 2 * len(LARGE)
    await until(lambda: mine.bytes == 0)
    assert (kept, other) == (LARGE, bytes(len(LARGE)))
    del kept, other
    mine.close()


async def test_a_written_buffer_is_not_sent_back_as_it_was(trd_dir, pool):
    """As a tensor, which may be written."""
    mine = a_pool()
    async with serving(unix(trd_dir), shared=pool) as service, calling(shared=mine) as caller:
        stream = await caller.call(service.address, b"hold", end=False)
        await until(lambda: service.running)
        there = service.served[0].stream
        await stream.send(b"item", [memoryview(LARGE)])
        await until(lambda: there.inbox)
        cost, *_, buffers = there.inbox.popleft()
        there.read(cost)
        assert buffers is not None
        written = writable(memoryview(buffers.pop()))
        written[:5] = b"WRITE"
        await there.send(b"item", [written])
        async with asyncio.timeout(PATIENCE_S):
            _, (got,) = await anext(messages(stream))
        assert bytes(got[:6]) == b"WRITE" + LARGE[5:6]
        assert pool.bytes == len(LARGE)
        del got, written
    mine.close()


@pytest.mark.parametrize(
    ("where", "here", "there"),
    [("tcp", True, True), ("memory", True, True), ("unix", True, False), ("unix", False, True), ("unix", False, False)],
)
async def test_without_it_at_one_end_buffers_travel_as_bytes(where, here, there, trd_dir, pool):
    service_pool = pool if there else None
    async with (
        serving(address_of(where, trd_dir), shared=service_pool) as service,
        calling(shared=a_pool() if here else None) as caller,
    ):
        ((got,),) = await answers(await caller.call(service.address, b"array", LARGE))
        assert kinds([got]) == [False]
        assert bytes(got) == LARGE
    assert pool.bytes == 0


async def test_a_peer_that_cannot_open_it_gets_bytes(trd_dir, pool, monkeypatch, caplog):
    caplog.set_level("INFO")

    def hidden(*_: Any) -> int:
        raise PermissionError(13, "not in this namespace")

    async with serving(unix(trd_dir), shared=pool) as service, calling(shared=a_pool()) as caller:
        monkeypatch.setattr("triton_distributed.system.mapping.open_segment", hidden)
        for _ in range(2):
            ((got,),) = await answers(await caller.call(service.address, b"array", LARGE))
            assert kinds([got]) == [False]
            assert bytes(got) == LARGE
        assert not memory_of(service.accepted[0]).lends  # it does not try again
        assert len(pool._free) == 1
    assert sum("cannot map" in each for each in caplog.messages) == 1


async def test_a_full_pool_sends_bytes_and_an_emptier_one_lends_again(trd_dir):
    pool = a_pool(2 * len(LARGE))
    async with serving(unix(trd_dir), shared=pool) as service, calling(shared=a_pool()) as caller:
        kept = [await answers(await caller.call(service.address, b"array", LARGE)) for _ in range(4)]
        assert [kinds(each[0]) for each in kept] == [[True], [True], [False], [False]]
        assert all(bytes(each[0][0]) == LARGE for each in kept)
        kept.clear()
        await until(lambda: len(pool._free) == 2)
        ((got,),) = await answers(await caller.call(service.address, b"array", LARGE))
        assert kinds([got]) == [True]
        del got
    pool.close()


async def test_little_memory_sends_bytes(trd_dir, pool, monkeypatch):
    monkeypatch.setattr(shared_pool, "available_bytes", lambda: 4 * len(LARGE) - 1)
    async with serving(unix(trd_dir), shared=pool) as service, calling(shared=a_pool()) as caller:
        ((got,),) = await answers(await caller.call(service.address, b"array", LARGE))
        assert kinds([got]) == [False]

        def full(*_: int) -> None:
            raise OSError(28, "no space")

        monkeypatch.setattr(shared_pool, "available_bytes", lambda: 1 << 40)
        monkeypatch.setattr(os, "posix_fallocate", full)
        ((got,),) = await answers(await caller.call(service.address, b"array", LARGE))
        assert kinds([got]) == [False]
    assert pool.bytes == 0


async def test_what_is_held_keeps_its_content_after_its_session(trd_dir, pool):
    async with serving(unix(trd_dir), shared=pool) as service:
        async with calling(shared=a_pool()) as caller:
            ((got,),) = await answers(await caller.call(service.address, b"array", LARGE))
        await until(lambda: pool.bytes == 0)  # the worker never writes to that memory again
        async with calling(shared=a_pool()) as caller:
            ((other,),) = await answers(await caller.call(service.address, b"array", bytes(len(LARGE))))
            assert kinds([got, other]) == [True, True]
            assert other == bytes(len(LARGE))
            assert got == LARGE
            del other
    del got


async def test_memory_is_released_when_the_collector_runs_in_another_thread(trd_dir, pool):
    async with serving(unix(trd_dir), shared=pool) as service, calling(shared=a_pool()) as caller:
        ((got,),) = await answers(await caller.call(service.address, b"array", LARGE))
        cycle: list[Any] = [got]
        cycle.append(cycle)
        del got, cycle
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join()
        await until(lambda: pool._free)


async def test_a_child_that_may_read_it_keeps_it(trd_dir, pool):
    async with serving(unix(trd_dir), shared=pool) as service, calling(shared=a_pool()) as caller:
        ((got,),) = await answers(await caller.call(service.address, b"array", LARGE))
        child = os.fork()
        if child == 0:
            os._exit(0 if got == LARGE else 1)
        del got
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        await until(lambda: pool.bytes == 0)  # given up, not used again


async def test_a_child_of_the_sender_that_may_read_it_keeps_it(trd_dir, pool):
    mine = a_pool()
    async with serving(unix(trd_dir), shared=pool) as service, calling(shared=mine) as caller:
        stream = await caller.call(service.address, b"echo", end=False)
        await stream.send(b"item", [memoryview(LARGE)], f.END)
        ((got,),) = await answers(stream)
        child = os.fork()
        if child == 0:
            os._exit(0 if got == LARGE else 1)
        del got
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        await until(lambda: mine.bytes == 0)
    mine.close()


async def test_a_message_for_a_stream_that_is_over_gives_its_memory_back(trd_dir, pool):
    async with serving(unix(trd_dir), shared=pool) as service, calling(shared=a_pool()) as caller:
        for _ in range(10):
            stream = await caller.call(service.address, b"array 3", LARGE)
            await until(lambda: len(memory_of(service.accepted[0])._lent))
            stream.abort(f.CANCEL)
            del stream
            await until(lambda: not service.running and not memory_of(service.accepted[0])._lent)
        assert pool.bytes <= 2 * len(LARGE)


async def test_one_message_waits_until_it_is_read(trd_dir, pool):
    """A reader that does not read holds one slot a stream, however many items its producer has."""
    async with serving(unix(trd_dir), shared=pool) as service, calling(shared=a_pool()) as caller:
        stream = await caller.call(service.address, b"array 5", LARGE)
        await until(lambda: len(stream.inbox) == 1)
        stream.session.connection.send(f.frame(f.PING, 0))
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(memory_of(service.accepted[0])._lent) == 1
        assert len(await answers(stream)) == 5


async def test_held_bytes_count_lent_ones(trd_dir, pool):
    """The worker refuses what would exceed its limit, and gives the memory back."""
    mine = a_pool()
    async with serving(unix(trd_dir), shared=pool) as service, calling(shared=mine) as caller:
        stream = await caller.call(service.address, b"hold", end=False)
        await until(lambda: service.running)
        held = service.accepted[0].connection.held = ByteBudget(len(LARGE) + MIB)
        stream_there = service.served[0].stream
        await stream.send(b"one", [memoryview(LARGE)])
        await until(lambda: stream_there.inbox)
        assert held.bytes >= len(LARGE)
        stream.credit = WINDOW  # a caller that ignores its credit
        await stream.send(b"two", [memoryview(LARGE)])
        await until(lambda: stream.failure is not None)
        assert held.bytes <= MIB
        stream_there.inbox.clear()
        await until(lambda: len(mine._free) == 2)
    mine.close()


async def test_a_slot_is_withdrawn_when_it_is_not_used(trd_dir, pool, monkeypatch):
    monkeypatch.setattr(shared_pool, "IDLE_S", 0.05)
    async with serving(unix(trd_dir), shared=pool) as service, calling(shared=a_pool()) as caller:
        ((got,),) = await answers(await caller.call(service.address, b"array", LARGE))
        del got
        await until(lambda: pool._free)
        await until(lambda: pool.bytes == 0 and not memory_of(caller.made[0])._mapped)
        ((got,),) = await answers(await caller.call(service.address, b"array", LARGE))
        assert kinds([got]) == [True]
        del got


async def asked_for_an_array(raw: Peer) -> None:
    """Ask for an array that is large enough to be lent."""
    await raw.say(hello_frame(Hello(window=WINDOW, features=[SHARED_MEMORY])))
    prefix = f.REQUEST_PREFIX.pack(1, 2, 9.0, WINDOW, 0)
    body = prefix + b"array"
    half = bytes(SMALLEST)
    head = f.UINT64.pack(len(body) + SMALLEST + 16) + head_of(len(body), [memoryview(half)])
    await raw.say(f.frame(f.REQUEST, 1, head + body, f.MORE | f.BUFFERS))
    await raw.say(f.frame(f.DATA, 1, half[: SMALLEST // 2], f.MORE))
    await raw.say(f.frame(f.DATA, 1, half[SMALLEST // 2 :], f.END))


async def test_a_lost_session_ends_a_send_that_waits_for_an_answer(trd_dir, pool, monkeypatch):
    """A peer that never answers an offer."""
    monkeypatch.setattr("triton_distributed.transport.shared_memory.ANSWER_S", 2 * PATIENCE_S)
    async with serving(unix(trd_dir), shared=pool) as service:
        async with peer(service.address) as raw:
            await asked_for_an_array(raw)
            await until(lambda: service.accepted and memory_of(service.accepted[0])._answers)
        await until(lambda: not service.running and len(pool._free) == 1)


async def test_an_offer_without_an_answer_delays_one_message_and_then_sends_bytes(trd_dir, pool, monkeypatch):
    monkeypatch.setattr("triton_distributed.transport.shared_memory.ANSWER_S", 0.05)
    async with serving(unix(trd_dir), shared=pool) as service, peer(service.address) as raw:
        await asked_for_an_array(raw)
        async with asyncio.timeout(PATIENCE_S):
            while (frame := await raw.frame())[0] != f.MEMORY:
                pass
            _, offer = read_memory(frame[3])
            while (frame := await raw.frame())[0] != f.DATA:
                pass
        assert not frame[1] & f.LENT
        memory = memory_of(service.accepted[0])
        assert not memory.wants([memoryview(LARGE)])
        assert len(pool._free) == 1
        assert isinstance(offer, Offer)
        await raw.say(memory_frame(Said.TAKEN, offer.segment))  # late
        await until(lambda: memory.wants([memoryview(LARGE)]))
        pool.drop(pool._free.pop())
        await raw.say(memory_frame(Said.REFUSED, offer.segment), f.frame(f.PING, 0))  # it is closed here meanwhile
        while (await raw.frame())[0] != f.PONG:
            pass
        assert memory.lends
        await raw.say(f.frame(f.CANCEL, 1))


def offered(segment: Segment, number: int = 1) -> bytes:
    return offer_frame(Offer(number, segment.size, segment.fileno(), segment.cookie))


def message(number: int, *places: tuple[int, int], size: int = SMALLEST, stream: int = 1) -> bytes:
    body = f.REQUEST_PREFIX.pack(1, 2, 9.0, WINDOW, 0) + b"hold"
    lent = [memoryview(bytes(size))] * len(places)
    return f.frame(f.REQUEST, stream, head_of(len(body), lent, places) + body, f.END | f.BUFFERS | f.LENT)


async def test_a_plain_peer_lends_and_gets_it_back(trd_dir, pool):
    segment = Segment(SMALLEST)
    for _ in segment.make():
        pass
    async with serving(unix(trd_dir), shared=pool) as service, peer(service.address) as raw:
        await raw.say(hello_frame(Hello(window=WINDOW, features=[SHARED_MEMORY])), offered(segment))
        await raw.frame()
        assert read_memory((await raw.frame())[3]) == (Said.TAKEN, 1)
        await raw.say(message(1, (1, 0)))
        await until(lambda: service.running)
        (held,) = service.served[0].buffers
        assert held == bytes(SMALLEST)
        service.served[0].buffers = None
        del held
        said = []
        async with asyncio.timeout(PATIENCE_S):
            while (frame := await raw.frame())[0] != f.MEMORY:
                said.append(frame[0])
        assert read_memory(frame[3]) == (Said.RELEASED, 1)
        await raw.say(f.frame(f.CANCEL, 1))
    segment.close()


async def test_placed_memory_that_was_written_here_is_used_again_after_its_owner_has_dropped_it(trd_dir, pool):
    """A tensor may be written; the next message was on its way when the owner dropped the memory."""
    segment = Segment(SMALLEST)
    segment.fill(memoryview(bytes(SMALLEST)))
    async with serving(unix(trd_dir), shared=pool) as service, peer(service.address) as raw:
        await raw.say(hello_frame(Hello(window=WINDOW, features=[SHARED_MEMORY])), offered(segment), message(1, (1, 0)))
        await until(lambda: service.running)
        (held,) = service.served[0].buffers
        tensor = writable(memoryview(held))
        tensor[:1] = b"x"
        segment.close()
        await raw.say(message(1, (1, 0), stream=2))
        await until(lambda: len(service.running) == 2)
        (other,) = service.served[1].buffers
        assert other == bytes(SMALLEST)
        assert tensor[:2].tobytes() == b"x\0"
        service.served[0].buffers = service.served[1].buffers = None
        del held, other, tensor
        await raw.say(f.frame(f.CANCEL, 1), f.frame(f.CANCEL, 2))


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([message(1, (9, 0))], "not mapped here"),
        ([message(1, (1, 1))], "outside"),
        ([message(1, (1 | RETURNED, 0))], "not mapped here"),
        ([message(1, (1, 1 << 63))], "outside"),
        ([message(1, (1, 0), size=0)], "outside"),
        ([message(1, (1, 0), size=SMALLEST + 1)], "outside"),
        ([memory_frame(Said.WITHDRAWN, 1), message(1, (1, 0))], "not mapped here"),
        (["again"], "offered twice"),
        ([f.frame(f.MEMORY, 0, b"\7")], "malformed"),
        ([f.frame(f.MEMORY, 0)], "malformed"),
    ],
    ids=range(10),
)
async def test_a_peer_that_lies_is_disconnected(frames, words, trd_dir, pool):
    segment = Segment(SMALLEST)
    for _ in segment.make():
        pass
    async with serving(unix(trd_dir), shared=pool) as service, peer(service.address) as raw:
        await raw.say(hello_frame(Hello(window=WINDOW, features=[SHARED_MEMORY])), offered(segment))
        await raw.say(*(offered(segment) if each == "again" else each for each in frames))
        assert words in await raw.dismissal()
    segment.close()


async def test_answers_that_fit_no_question_are_ignored(trd_dir, pool):
    async with serving(unix(trd_dir), shared=pool) as service, peer(service.address) as raw:
        await raw.say(hello_frame(Hello(window=WINDOW, features=[SHARED_MEMORY])))
        await raw.say(*(memory_frame(said, 5) for said in (Said.TAKEN, Said.RELEASED, Said.KEPT, Said.WITHDRAWN)))
        await raw.say(f.frame(f.PING, 0))
        while (await raw.frame())[0] != f.PONG:
            pass


async def test_an_offer_over_tcp_is_refused_without_a_look(pool, monkeypatch):
    def never(*_: Any) -> int:
        raise AssertionError("it was opened")

    monkeypatch.setattr("triton_distributed.system.mapping.open_segment", never)
    async with serving("tcp://127.0.0.1:0", shared=pool) as service, peer(service.address) as raw:
        await raw.say(hello_frame(Hello(window=WINDOW, features=[SHARED_MEMORY])))
        await raw.say(offer_frame(Offer(1, 4096, 3, b"c" * 16)))
        await raw.frame()
        assert read_memory((await raw.frame())[3]) == (Said.REFUSED, 1)


async def test_an_end_without_shared_memory_takes_no_memory_frame(trd_dir):
    async with serving(unix(trd_dir)) as service, peer(service.address) as raw:
        await raw.say(hello_frame(Hello(window=WINDOW)), memory_frame(Said.WITHDRAWN, 1))
        assert "no shared memory" in await raw.dismissal()


async def test_more_offers_than_a_session_maps_are_refused(trd_dir, pool, monkeypatch):
    monkeypatch.setattr("triton_distributed.transport.shared_memory.MOST_MAPPED", 2)
    segment = Segment(SMALLEST)
    for _ in segment.make():
        pass
    async with serving(unix(trd_dir), shared=pool) as service, peer(service.address) as raw:
        await raw.say(hello_frame(Hello(window=WINDOW, features=[SHARED_MEMORY])))
        await raw.say(*(offered(segment, number) for number in (1, 2, 3)))
        await raw.frame()
        said = [read_memory((await raw.frame())[3]) for _ in range(3)]
        assert said == [(Said.TAKEN, 1), (Said.TAKEN, 2), (Said.REFUSED, 3)]
    segment.close()

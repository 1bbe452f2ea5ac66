"""Sessions to workers: dialled once, shared, replaced, and failures in words."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from tests.timing import MS, PATIENCE_S
from tests.transport.sessions import HELLO, Peer, answering, calling, numbers, serving, watched
from triton_distributed.errors import ConnectionFailed
from triton_distributed.transport.pool import MOST_ADDRESSES
from triton_distributed.transport.stream import Owner
from triton_distributed.wire import frames as f
from triton_distributed.wire.frames import GoawayCode
from triton_distributed.wire.hello import Hello, hello_frame

pytestmark = pytest.mark.any_loop


async def test_everybody_shares_one_dial_and_one_session():
    async with serving() as service, calling() as caller:
        sessions = await asyncio.gather(*[caller.pool.connect((service.address,)) for _ in range(50)])
        assert {id(each) for each in sessions} == {id(caller.made[0])}
        assert len(service.accepted) == 1
        assert caller.pool.get((service.address,)) is sessions[0]
        assert repr(sessions[0]) == f"<Session {service.address} open, 0 streams>"


async def test_a_waiter_that_is_cancelled_leaves_the_dial_to_the_others():
    async with serving() as service, calling() as caller:
        one, other = (asyncio.ensure_future(caller.pool.connect((service.address,))) for _ in range(2))
        await asyncio.sleep(0)
        one.cancel()
        assert (await other).usable
        assert one.cancelled()


async def test_the_first_address_that_answers_is_taken():
    async with serving() as service, calling() as caller:
        found = await caller.pool.connect(("tcp://127.0.0.1:1", "unix:///none.sock", service.address))
        assert found.address == service.address


async def test_a_failure_names_every_address_and_why(trd_dir):
    with_file = f"unix://{trd_dir}/none.sock"
    async with calling() as caller:
        with pytest.raises(ConnectionFailed) as caught:
            await caller.pool.connect(("tcp://127.0.0.1:1", with_file, "memory://none"))
    assert [address for address, _ in caught.value.attempts] == ["tcp://127.0.0.1:1", with_file, "memory://none"]
    text = str(caught.value)
    for address, why in caught.value.attempts:
        assert why
        assert f"{address}: {why}" in text
    assert "nothing listens on memory://none" in text
    assert caller.lost == []


@pytest.mark.parametrize(
    "address",
    [
        "tcp://" + "a" * 70 + ":1",
        "tcp://..:1",
        "tcp://a\0b:1",
        "unix:///a\0b",
        "unix:///\ud800",
        "unix:///" + "x" * 300,
        "tcp://127.0.0.1:0",
        "http://x",
        "",
    ],
    ids=ascii,
)
async def test_what_is_no_address_is_passed_over(address):
    async with serving() as service, calling() as caller:
        assert (await caller.pool.connect((address, service.address))).usable
        with pytest.raises(ConnectionFailed):
            await caller.pool.connect((address,))


async def test_a_worker_that_says_nothing():
    async with answering(lambda peer: peer.hear()) as address, calling(timeout_s=50 * MS) as caller:
        with pytest.raises(ConnectionFailed, match=r"no answer within 0\.05 s, see TRD_CONNECT_TIMEOUT_S"):
            await caller.pool.connect((address,))


async def test_an_address_that_says_nothing_holds_the_next_up_for_one_timeout():
    async with (
        answering(lambda peer: peer.hear()) as silent,
        serving() as service,
        calling(timeout_s=50 * MS) as caller,
    ):
        found = await caller.pool.connect((silent, "unix:///none.sock", service.address))
        assert found.address == service.address


async def test_an_unreachable_address_is_known_to_be_the_workers_word():
    async with calling() as caller:
        with pytest.raises(ConnectionFailed) as caught:
            await caller.pool.connect(("unix:///none.sock", "tcp://127.0.0.1:1"))
    (_, of_unix), (_, of_tcp) = caught.value.attempts
    assert of_tcp.endswith(" (the worker advertises that address, see TRD_ADVERTISE and TRD_LISTEN there)")
    assert "TRD_ADVERTISE" not in of_unix


async def test_a_worker_without_an_address_for_this_host():
    async with calling() as caller:
        with pytest.raises(ConnectionFailed, match="Unix sockets of another host only, set TRD_LISTEN there"):
            await caller.pool.connect(())


async def test_only_so_many_addresses_are_tried():
    async with calling() as caller:
        with pytest.raises(ConnectionFailed) as caught:
            await caller.pool.connect(tuple(f"unix:///none-{number}.sock" for number in range(1000)))
    assert len(caught.value.attempts) == MOST_ADDRESSES


def says(*data: bytes, then: str = "close"):
    async def answer(peer: Peer) -> None:
        await peer.say(*data)
        if then == "close":
            peer.writer.close()
        else:
            await peer.hear()

    return answer


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param([], "the peer closed the connection|lost", id="nothing"),
        pytest.param([HELLO], "the peer closed the connection|lost", id="hello"),
        pytest.param([HELLO[:-1]], "the peer closed the connection|lost", id="most of a hello"),
        pytest.param([HELLO, f.coded(f.GOAWAY, 0, GoawayCode.BUSY, b"full house")], "full house", id="busy"),
        pytest.param([HELLO, f.coded(f.GOAWAY, 0, GoawayCode.DRAINING, b"bye")], "bye", id="draining"),
        pytest.param([HELLO, f.coded(f.GOAWAY, 0, GoawayCode.PROTOCOL, b"no!")], "no!", id="protocol"),
        pytest.param([b"HTTP/1.1 400 Bad Request\r\n\r\n"], "not this protocol", id="HTTP"),
        pytest.param([hello_frame(Hello(version=9, lowest=8))], "speaks 1 to 1, the peer 8 to 9", id="later version"),
        pytest.param([HELLO, f.frame(99, 0)], "kind 99", id="nonsense behind the hello"),
        pytest.param([HELLO, HELLO], "kind 1", id="two hellos"),
    ],
)
async def test_a_worker_that_goes_away_at_once_is_never_handed_out(data, words):
    async with calling() as caller, answering(says(*data)) as address:
        for _ in range(3):
            try:
                found = await caller.pool.connect((address,))
            except ConnectionFailed as error:
                assert address in str(error)
                with pytest.raises(ConnectionFailed, match=words):
                    raise
            else:  # its end came after it was connected
                async with asyncio.timeout(PATIENCE_S):
                    await watched(found).gone.wait()
            assert caller.pool.get((address,)) is None


async def test_a_worker_that_drains_from_the_start_gets_no_calls():
    goaway = f.coded(f.GOAWAY, 0, GoawayCode.DRAINING, b"bye")
    async with calling() as caller, answering(says(HELLO + goaway, then="stay")) as address:
        with pytest.raises(ConnectionFailed, match="bye"):
            await caller.pool.connect((address,))
        assert caller.pool.get((address,)) is None
        async with asyncio.timeout(PATIENCE_S):
            await caller.made[0].gone.wait()


async def test_a_lost_session_is_told_and_replaced():
    async with calling() as caller, contextlib.AsyncExitStack() as stack:
        service = await stack.enter_async_context(serving())
        key = (service.address,)
        first = await caller.pool.connect(key)
        service.accepted[0].transport.abort()
        async with asyncio.timeout(PATIENCE_S):
            await watched(first).gone.wait()
        assert caller.pool.get(key) is None
        ((addresses, words),) = caller.lost
        assert addresses == key
        assert "closed the connection" in words or "lost" in words
        assert await numbers(await caller.call(service.address, b"count 2")) == [0, 1]
        assert caller.pool.get(key) is not first


async def test_a_session_that_goes_away_gets_no_calls_and_finishes_those_it_has():
    async with serving() as service, calling() as caller:
        stream = await caller.call(service.address, b"count 100000")
        first = caller.pool.get((service.address,))
        service.accepted[0].go_away(GoawayCode.DRAINING, "the worker is shutting down")
        async with asyncio.timeout(PATIENCE_S):
            while not caller.lost:
                await asyncio.sleep(0)
        assert caller.lost == [((service.address,), "the worker is shutting down")]
        assert caller.pool.get((service.address,)) is None
        second = await caller.pool.connect((service.address,))
        assert second is not first
        assert await numbers(stream) == [*range(100_000)]


async def test_closing_ends_what_is_dialled_and_what_is_open():
    async with serving() as service, answering(lambda peer: peer.hear()) as silent, calling() as caller:
        stream = await caller.call(service.address, b"hold")
        dialling = asyncio.ensure_future(caller.pool.connect((silent,)))
        await asyncio.sleep(0)
        await caller.pool.close()
        assert stream.lost == "the runtime at this end was shut down"
        with pytest.raises(asyncio.CancelledError):
            await dialling
        async with asyncio.timeout(PATIENCE_S):
            await service.served[0].ended.wait()


async def test_the_rotation_hears_of_a_lost_worker_before_its_calls_do():
    async with serving() as service, calling() as caller:
        stream = await caller.call(service.address, b"")
        known: list[bool] = []

        class Noting(Owner):
            def stream_closed(self, closed: object) -> None:
                known.append([addresses for addresses, _ in caller.lost] == [(service.address,)])

        stream.owner = Noting()
        service.accepted[0].abandon("the worker was killed")
        await stream.readable()
        assert known == [True], "a call that tries again must not be offered the worker that it has lost"

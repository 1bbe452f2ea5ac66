"""A session on an event loop: its start, its pauses, its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import weakref
from typing import Any, cast

import msgspec
import pytest

from tests.runtime.cluster import until
from tests.timing import MS, PATIENCE_S
from tests.transport.sessions import (
    HELLO,
    Failed,
    Lost,
    Peer,
    Watched,
    answering,
    bodies,
    calling,
    closed,
    half,
    messages,
    numbers,
    peer,
    rest_of,
    serving,
    session,
)
from tests.wire.joined import request
from triton_distributed import is_compiled
from triton_distributed.errors import RemoteProtocolError
from triton_distributed.testing.proxy import LINGER_NOTHING
from triton_distributed.transport.session import part
from triton_distributed.transport.stream import Owner, Stream
from triton_distributed.wire import frames as f
from triton_distributed.wire.frames import GoawayCode
from triton_distributed.wire.states import State

pytestmark = pytest.mark.any_loop


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """A TCP connection within this process."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        here = socket.create_connection(listening.getsockname())
        return here, listening.accept()[0]


async def served(made: Watched, there: socket.socket, requests: list[Any]) -> None:
    """Send request 1 and wait until it is there."""
    await asyncio.get_running_loop().sock_sendall(there, request(1, window=1 << 30))
    async with asyncio.timeout(PATIENCE_S):
        while not requests:
            await asyncio.sleep(0)


@pytest.mark.skipif(is_compiled(), reason="a compiled class keeps no attributes in a dict")
async def test_a_session_and_its_connection_have_few_attributes():
    """With 30 the interpreter keeps them in a dict of their own, and a call takes 1 to 2 % more instructions."""
    async with half() as (here, _):
        plain = set(vars(here)) - {"gone"}  # of the tests' own class
        assert len(plain) < 30
        assert len(vars(here.connection)) < 30


async def test_states_in_words():
    async with serving() as service, calling() as caller:
        await caller.pool.connect((service.address,))
        made = caller.made[0]
        assert repr(made) == f"<Session {service.address} open, 0 streams>"
        await caller.call(service.address, b"hold")
        assert repr(made).endswith("open, 1 streams>")
        service.accepted[0].go_away(GoawayCode.DRAINING, "bye")
        async with asyncio.timeout(PATIENCE_S):
            while made.connection.going is None:
                await asyncio.sleep(0)
        assert repr(made).endswith("going, 1 streams>")
        assert not made.usable
        made.close()
        assert repr(made).endswith("lost, 0 streams>")
        assert made.lost == "the runtime at this end was shut down, having said: bye"


async def test_no_hello_in_time():
    async with answering(lambda peer: peer.hear()) as address:
        made = session(hello_timeout_s=50 * MS)
        host, port = address.removeprefix("tcp://").split(":")
        await asyncio.get_running_loop().create_connection(lambda: cast(Any, made), host, int(port))
        with pytest.raises(RemoteProtocolError, match=r"no hello within"):
            await made.ready
        async with asyncio.timeout(PATIENCE_S):
            await made.gone.wait()


async def test_the_time_for_a_hello_is_over_with_the_hello():
    async with serving(hello_timeout_s=50 * MS) as service, calling(hello_timeout_s=50 * MS) as caller:
        stream = await caller.call(service.address, b"echo", end=False)
        loop = asyncio.get_running_loop()
        later = loop.create_future()
        loop.call_later(150 * MS, later.set_result, None)
        await later
        stream.end()
        assert await bodies(stream) == []


async def test_a_ping_is_answered():
    async with serving() as service, peer(service.address) as one:
        await one.say(HELLO, f.frame(f.PING, 0, b"12345678"))
        assert (await one.frame())[0] == f.HELLO
        assert await one.frame() == (f.PONG, 0, 0, b"12345678")


async def test_a_large_first_request_right_behind_the_hello():
    async with serving() as service, peer(service.address) as one:
        await one.say(HELLO + request(1, b"count 1" + b" " * 60_000))
        kinds = [(await one.frame())[0] for _ in range(3)]
        assert kinds == [f.HELLO, f.ACCEPT, f.DATA]


async def test_an_end_that_takes_no_requests_says_so():
    async def worker(peer: Peer) -> None:
        await peer.say(HELLO, request(1))
        heard.append((await peer.hear())[-1])

    heard: list[Any] = []
    async with calling() as caller, answering(worker) as address:
        made = None
        with contextlib.suppress(Exception):
            made = await caller.pool.connect((address,))
        async with asyncio.timeout(PATIENCE_S):
            await caller.made[0].gone.wait()
            while not heard:
                await asyncio.sleep(0)
        assert heard[0][0] == f.GOAWAY
        assert b"takes no requests" in heard[0][3]
        assert made is None or made.lost


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_open_streams_learn_that_the_session_is_gone(how):
    async with serving() as service, calling() as caller:
        idle = await caller.call(service.address, b"hold")
        busy = await caller.call(service.address, b"count 10000000")
        await anext(messages(busy))
        transport = service.accepted[0].transport
        transport.abort() if how == "abort" else service.accepted[0].close()
        for stream in (idle, busy):
            with pytest.raises(Lost, match="closed the connection|connection lost"):
                await bodies(stream)
            assert stream.state == State.CLOSED
        async with asyncio.timeout(PATIENCE_S):
            for each in service.served:
                await each.ended.wait()
        assert service.running == set()


async def test_closing_writes_what_waits_even_while_the_peer_is_slow():
    requests: list[Any] = []
    async with half(lambda *request: requests.append(request)) as (made, there):
        await served(made, there, requests)
        stream = requests[0][0]
        pushed = 0
        while not made.paused:
            stream.push(bytes(1000) + b"item %d" % pushed)
            pushed += 1
            await asyncio.sleep(0)
        stream.push(b"the last")
        stream.end()
        made.close()
        data = await rest_of(there)
        for each in range(pushed):
            assert b"item %d" % each in data
        assert data.endswith(f.frame(f.DATA, 1, b"the last", f.END))


async def test_closing_ends_in_bounded_time_though_the_peer_reads_nothing():
    requests: list[Any] = []
    async with half(lambda *request: requests.append(request), hello_timeout_s=50 * MS) as (made, there):
        await served(made, there, requests)
        while not made.paused:
            requests[0][0].push(bytes(60_000))
            await asyncio.sleep(0)
        made.close()
        async with asyncio.timeout(PATIENCE_S):
            await made.gone.wait()


async def test_a_session_that_is_lost_while_the_kernel_is_full_lets_its_senders_go():
    """The last fragment is in the transport and the peer is gone: whoever waits for it must not turn in a circle."""
    async with half() as (made, there):
        stream = made.connection.open_stream(False)
        body = f.REQUEST_PREFIX.pack(1, 2, 1.0, 1, 0)
        sending = asyncio.ensure_future(stream.send(body, [memoryview(bytes(100_000))], f.END, f.REQUEST))
        async with asyncio.timeout(PATIENCE_S):
            while not (made.paused and made.waiters):
                await asyncio.sleep(0)
        there.close()
        async with asyncio.timeout(PATIENCE_S):
            await sending
        assert made.lost


async def test_nothing_is_kept_of_senders_that_gave_up_while_the_kernel_is_full():
    async with half() as (made, _):
        body = f.REQUEST_PREFIX.pack(1, 2, 1.0, 1, 0)
        for _ in range(200):
            stream = made.connection.open_stream(False)
            sending = asyncio.ensure_future(stream.send(body, [memoryview(bytes(100_000))], f.END, f.REQUEST))
            for _ in range(3):
                await asyncio.sleep(0)
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sending
            stream.abort(f.CANCEL)
        assert made.paused
        assert made.streams == {}
        assert len(made.waiters) < 20
        assert len(made.connection.ready) < 20


async def test_a_stream_ended_by_a_frame_says_which():
    async def worker(peer: Peer) -> None:
        await peer.say(HELLO)
        while (await peer.frame())[0] != f.REQUEST:
            pass
        await peer.say(f.frame(f.DATA, 1, b"\x01"), f.coded(f.REJECT, 1, 2, b"not here"))
        await peer.hear()

    async with calling() as caller, answering(worker) as address:
        stream = await caller.call(address, b"x")
        got: list[Any] = []
        with pytest.raises(Failed) as caught:
            async for body, _ in messages(stream):
                got.append(msgspec.msgpack.decode(body))
        assert got == [1]
        assert caught.value.args == (f.REJECT, 2, b"not here")


async def test_thousands_of_streams_on_one_session():
    async with serving() as service, calling() as caller:
        streams = [await caller.call(service.address, b"count 1") for _ in range(2000)]
        assert len(caller.made) == 1
        assert [await numbers(each) for each in streams] == [[0]] * 2000
        assert caller.made[0].streams == service.accepted[0].streams == {}


async def test_a_lost_session_is_gone_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        async with serving() as service, calling() as caller:
            assert await numbers(await caller.call(service.address, b"count 3")) == [0, 1, 2]
            ends = [weakref.ref(each) for each in (caller.made[0], service.accepted[0])]
            caller.made[0].close()
            await closed(caller.made[0], service.accepted[0])
            caller.made.clear()
            service.accepted.clear()
            service.served.clear()
            await until(lambda: not any(each() for each in ends))
    finally:
        gc.enable()


async def test_a_session_that_is_not_connected_yet_has_nothing_to_wait_for():
    made = session()
    made.go_away(GoawayCode.DRAINING, "bye")
    assert made.connection.out == []
    async with asyncio.timeout(PATIENCE_S):
        await part(made)
    made.close()


# --- what the peer said before its end -------------------------------------------------------------------------------


PAIRS = pytest.mark.parametrize("pair", [socket.socketpair, tcp_pair], ids=["unix", "tcp"])
PING = f.frame(f.PING, 0)


class Asking(Owner):
    """A caller that looks, when its stream is lost, whether its request had left."""

    left: bool | None = None

    def stream_ended(self) -> None: ...

    def stream_silent(self, stream: Stream, words: str) -> None: ...

    def stream_stopped(self) -> None: ...

    def stream_closed(self, stream: Stream) -> None:
        self.left = stream.id not in stream.session.unsent


def asked(made: Watched):
    """A stream whose request is written."""
    stream = made.connection.open_stream(True)
    made.connection.send(request(stream.id))
    made.flush()
    return stream


async def written_in_vain(made: Watched) -> None:
    """The peer has closed: write before the loop can read, so that the write fails, and wait for the end."""
    with contextlib.suppress(OSError):  # the first write to a TCP peer that has closed only gets a reset back
        os.write(made.transport.get_extra_info("socket").fileno(), PING)
    made.connection.send(PING)
    made.flush()
    async with asyncio.timeout(PATIENCE_S):
        await made.gone.wait()


@PAIRS
async def test_a_write_that_fails_leaves_what_the_peer_has_said(pair):
    async with half(pair=pair) as (made, there):
        answered, begun, other = (asked(made) for _ in range(3))
        while there.recv(1 << 16)[-len(request(3)) :] != request(3):
            pass
        accepted = f.frame(f.ACCEPT, 0, f.UINT64.pack(1) + f.UINT64.pack(2))
        there.send(accepted + f.frame(f.BATCH, 1, f.array_of([b"\x01", b"\x02"])) + f.frame(f.DATA, 1, b"\x03", f.END))
        there.close()
        await written_in_vain(made)
        assert await numbers(answered) == [1, 2, 3]
        assert answered.lost is None
        assert (begun.accepted, begun.lost) == (True, made.lost)
        assert (other.accepted, other.lost) == (False, made.lost)
        assert not made.possibly_incomplete


@PAIRS
async def test_a_write_that_fails_leaves_the_rest_of_a_large_item(pair):
    async with half(pair=pair) as (made, there):
        there.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        stream = asked(made)
        body = bytes(range(256)) * 400
        first = f.frame(f.DATA, 1, f.UINT64.pack(len(body)) + body[:1000], f.MORE)
        last = f.frame(f.DATA, 1, body[1000:], f.END)
        there.send(first + last[:5000])
        async with asyncio.timeout(PATIENCE_S):
            while not made.connection.direct:
                await asyncio.sleep(0)
        assert there.recv(1 << 16)
        assert there.send(last[5000:]) == len(last) - 5000
        there.close()
        await written_in_vain(made)
        assert await bodies(stream) == [body]


async def test_words_behind_which_the_protocol_is_broken_are_not_the_last(caplog):
    async with half() as (made, there):
        stream = asked(made)
        there.send(f.frame(f.ACCEPT, 0, f.UINT64.pack(1)) + f.frame(99, 1) + f.frame(f.DATA, 1, b"\x01", f.END))
        there.close()
        await written_in_vain(made)
        assert stream.accepted
        assert made.possibly_incomplete
        assert made.lost is not None
        assert "Broken pipe" in made.lost


@pytest.mark.parametrize("read_first", [True, False])
async def test_after_a_reset_nobody_knows_what_was_under_way(read_first):
    async with half(pair=tcp_pair) as (made, there):
        stream = asked(made)
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOTHING)
        there.close()
        if not read_first:
            made.connection.send(PING)
            made.flush()
        async with asyncio.timeout(PATIENCE_S):
            await made.gone.wait()
        assert made.possibly_incomplete
        assert stream.lost == made.lost
        assert made.unsent == set()


async def test_after_a_reset_it_is_known_which_requests_never_left():
    async with half(pair=tcp_pair) as (made, there):
        sent, whole, part, waiting = asked(made), *(made.connection.open_stream(end) for end in (False, False, True))
        owners = [Asking() for _ in range(4)]
        for each, owner in zip((sent, whole, part, waiting), owners, strict=True):
            each.owner = owner
        prefix = f.REQUEST_PREFIX.pack(1, 2, 1.0, 1, 0)
        await whole.send(prefix, [memoryview(bytes(20_000))], f.END, f.REQUEST)
        sending = asyncio.ensure_future(part.send(prefix, [memoryview(bytes(50_000_000))], f.END, f.REQUEST))
        async with asyncio.timeout(PATIENCE_S):
            while not made.paused:
                await asyncio.sleep(0)
        made.connection.send(request(waiting.id))
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOTHING)
        there.close()
        async with asyncio.timeout(PATIENCE_S):
            await made.gone.wait()
            await sending
        assert made.possibly_incomplete
        assert [each.left for each in owners] == [True, True, False, False]


async def test_what_became_of_a_request_is_forgotten_with_it():
    async with half() as (made, _):
        prefix = f.REQUEST_PREFIX.pack(1, 2, 1.0, 1, 0)
        sending = asyncio.ensure_future(
            made.connection.open_stream(False).send(prefix, [memoryview(bytes(9_000_000))], f.END, f.REQUEST)
        )
        async with asyncio.timeout(PATIENCE_S):
            while not made.unsent:
                await asyncio.sleep(0)
        sending.cancel()
        await asyncio.wait([sending])
        assert made.unsent == set()


@PAIRS
async def test_an_end_takes_nothing_that_was_under_way(pair):
    async with half(pair=pair) as (made, there):
        stream = asked(made)
        there.recv(1 << 16)
        there.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(PATIENCE_S):
            await made.gone.wait()
        assert stream.lost == "the peer closed the connection"
        assert not made.possibly_incomplete


async def test_nothing_more_is_begun_for_a_client_that_is_gone():
    requests: list[Any] = []
    async with half(lambda *request: requests.append(request)) as (made, there):
        there.send(request(1))
        there.close()
        await written_in_vain(made)
        assert requests == []

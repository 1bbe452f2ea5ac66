"""One stream: what waits, what is charged, what is given back."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.joined import WINDOW, End, Noted, greeted, joined, move, opened, request
from triton_distributed.errors import LocalProtocolError, RemoteProtocolError
from triton_distributed.wire import frames as f
from triton_distributed.wire.assembly import fragments, head_of
from triton_distributed.wire.hello import Hello
from triton_distributed.wire.states import State
from triton_distributed.wire.window import FRAME_COST, SLACK, TURN_BYTES


def served(**options: Any) -> tuple[End, Noted]:
    """A server with one request of a client that has ended its side."""
    end = greeted(**options)
    end.receive(request(1))
    return end, end.requests[-1][0]


def test_one_item_is_data_and_several_are_a_batch():
    end, stream = served()
    stream.push(b"\x01")
    assert end.written() == [(f.DATA, 0, 1, b"\x01")]
    for item in (b"\x01", b"\x02", b"\x03"):
        stream.push(item)
    stream.end()
    ((kind, flags, number, payload),) = end.written()
    assert (kind, flags, number, msgspec.msgpack.decode(payload)) == (f.BATCH, f.END, 1, [1, 2, 3])
    assert stream.state == State.CLOSED
    assert end.streams == {}


def test_an_end_without_items_is_a_frame_of_its_own_and_once():
    end, stream = served()
    stream.end()
    stream.end()
    assert end.written() == [(f.END_OF_STREAM, f.END, 1, b"")]
    stream.end()
    assert end.written() == []


def test_a_turn_takes_so_many_small_items_and_so_many_bytes():
    _, stream = served()
    small = sum(1 for _ in iter(lambda: stream.push(b"\x01"), True)) + 1
    assert small == pytest.approx(TURN_BYTES / 256, abs=2)
    end, stream = served()
    assert stream.push(bytes(f.SMALL)) is True
    assert not stream.may_push
    end.take_output()
    assert stream.credit == WINDOW - f.SMALL - FRAME_COST
    assert not stream.may_push  # the window is used up


def test_items_wait_for_credit_and_credit_wakes_the_producer():
    end, stream = served(window=4096)
    end.streams[1].granted(4096)
    assert stream.push(bytes(5000)) is True
    end.take_output()
    assert (stream.may_push, stream.credit) == (False, 4096 - 5000 - FRAME_COST)
    assert stream.told == []
    end.receive(f.frame(f.CREDIT, 1, f.UINT32.pack(100)))
    assert not stream.may_push
    assert stream.told == []
    end.receive(f.frame(f.CREDIT, 1, f.UINT32.pack(4096)))
    assert (stream.may_push, stream.told) == (True, ["writable"])


def test_a_turn_that_is_over_wakes_the_producer_when_it_is_written():
    end, stream = served()
    stream.granted(10 * TURN_BYTES)
    while not stream.push(bytes(1000)):
        pass
    assert not stream.may_push
    end.take_output()
    assert (stream.may_push, stream.told) == (True, ["writable"])


def test_a_peer_that_grants_nothing_gets_one_turn():
    end, stream = served()
    stream.granted(0)
    assert stream.push(b"\x01") is True
    end.take_output()
    assert not stream.may_push


def test_credit_is_given_back_in_halves_of_the_window():
    client, server = joined(window=8192)
    mine, theirs = opened(client, server)
    theirs.push(bytes(1000))
    move(client, server)
    mine.read(mine.inbox.popleft()[0])
    assert client.take_output() == b""
    for _ in range(3):
        theirs.push(bytes(1000))
        move(client, server)
        mine.read(mine.inbox.popleft()[0])
    ((kind, _, number, payload),) = client.written()
    assert (kind, number) == (f.CREDIT, mine.id)
    assert f.UINT32.unpack(payload)[0] == 4 * (1000 + FRAME_COST)


def test_a_message_larger_than_one_credit_can_say_is_granted_by_several():
    total = (1 << 33) + 5
    end = greeted(Hello(max_message=1 << 40, window=WINDOW))
    end.receive(request(1, flags=0))
    end.receive(f.frame(f.DATA, 1, f.UINT64.pack(total), f.MORE))  # not a byte of it: nothing is allocated
    amounts = [f.UINT32.unpack(payload)[0] for kind, _, _, payload in end.written() if kind == f.CREDIT]
    assert max(amounts) == f.MAX_CREDIT
    assert total <= sum(amounts) <= total + WINDOW


def test_credit_beyond_what_one_frame_can_say():
    client, server = joined()
    mine, theirs = opened(client, server, end=False)
    before = mine.credit + theirs._credit_due
    theirs.read(3 * 2**32 + 5, at_once=True)
    frames = server.written()
    assert [each[0] for each in frames] == [f.CREDIT] * 4
    for kind, flags, number, payload in frames:
        client.take(f.frame(kind, number, payload, flags))
    assert mine.credit == before + 3 * 2**32 + 5


def test_no_credit_for_a_peer_that_has_ended():
    client, server = joined(window=8192)
    mine, theirs = opened(client, server)
    theirs.push(bytes(8000))
    theirs.end()
    move(client, server)
    mine.read(mine.inbox.popleft()[0])
    assert client.take_output() == b""


def test_streams_have_no_inbox_of_their_own_before_a_message_comes():
    """An idle stream takes 760 bytes less: 10,000 of them must fit 3 KiB each."""
    client, server = joined()
    (mine, theirs), (quiet, _) = opened(client, server), opened(client, server)
    assert mine.inbox is theirs.inbox is quiet.inbox
    theirs.push(b"item")
    move(client, server)
    assert [bytes(body) for _, _, _, body, _ in mine.inbox] == [b"item"]
    assert not theirs.inbox
    assert not quiet.inbox


@pytest.mark.parametrize("fragmented", [False, True])
def test_more_than_credit_and_slack_breaks_the_protocol(fragmented):
    end = greeted(window=4096)
    end.receive(request(1, flags=0))
    most = end.hello.window + SLACK
    flags = f.MORE if fragmented else 0
    sent = 0
    with pytest.raises(RemoteProtocolError, match="above its credit"):
        for number in range(100):
            payload = bytes(f.UINT64.pack(1 << 29) if fragmented and not number else b"") + bytes(20_000)
            end.requests[0][0].inbox = deque([(0, f.DATA, 0, b"unread", None)])  # so that nothing is given back
            sent += len(payload) + FRAME_COST
            end.receive(f.frame(f.DATA, 1, payload, flags))
    assert most - 20_100 <= sent <= most + 20_100


def test_an_honest_sender_never_exceeds_the_slack():
    """The most that is sent with one byte of credit: an item with its token, a fragment that lends, and the end."""
    caller, worker = joined(window=4096)
    caller.borrow = lambda segment, offset, size: memoryview(bytes(size))
    mine, theirs = opened(caller, worker)
    theirs.push(bytes(theirs.credit - FRAME_COST - 1))
    move(caller, worker)
    assert theirs.credit == 1
    theirs.checkpoint(bytes(f.SMALL))
    theirs.push(bytes(f.SMALL))
    lent = [memoryview(bytes(1))]
    body = bytes(f.MAX_FRAME - len(head_of(0, lent, [(1, 0)])))
    ((flags, start, piece),) = fragments(body, lent, f.CHECKPOINT, lambda: 0, [(1, 0)])
    theirs.settle()
    worker.send(f.frame(f.DATA, theirs.id, start + piece, flags))
    theirs.charge(f.MAX_FRAME, flags, lends=True)
    theirs.end()
    caller.take(worker.take_output())
    assert mine.state == State.CLOSED
    assert [len(each[3]) for each in mine.inbox][1:] == [2 * f.SMALL + 1, len(body)]


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        pytest.param([(f.DATA, f.MORE, 10)], None, id="begun"),
        pytest.param([(f.DATA, f.MORE, 10), (f.BATCH, 0, 2)], "continued by a frame of kind 4", id="BATCH within"),
        pytest.param(
            [(f.DATA, f.MORE, 10), (f.END_OF_STREAM, f.END, 0)], "in the middle of a message", id="END within"
        ),
        pytest.param([(f.DATA, f.MORE | f.END, 10)], "in the middle of a message", id="MORE and END"),
        pytest.param([(f.DATA, f.MORE, 10), (f.DATA, f.MORE | f.END, 1)], "in the middle", id="MORE and END later"),
        pytest.param([(f.END_OF_STREAM, f.MORE, 0)], "in the middle of a message", id="END with MORE"),
        pytest.param([(f.DATA, f.MORE, 10), (f.DATA, f.END, 1)], "bytes missing", id="ended too early"),
        pytest.param([(f.DATA, f.MORE, 10), (f.DATA, f.END, 20)], "longer than it announced", id="too long"),
        pytest.param([(f.DATA, f.BUFFERS, 10)], "names|add up", id="no head"),
    ],
)
def test_fragments_out_of_order(frames, says):
    end = greeted()
    stream = end.open_stream(True)
    data = b"".join(
        f.frame(kind, 1, (f.UINT64.pack(10) if not at else b"") + bytes(size - 9 if not at and size else size), flags)
        for at, (kind, flags, size) in enumerate(frames)
    )
    if says is None:
        end.receive(data)
        assert not stream.inbox
        assert not stream.told
        return
    with pytest.raises(RemoteProtocolError, match=says):
        end.receive(data)


def test_items_in_a_state_that_does_not_allow_them_are_our_own_fault():
    end = greeted()
    stream = end.open_stream(True)
    stream.push(b"\x01")
    with pytest.raises(LocalProtocolError, match="stream 1 in state SENT"):
        end.take_output()
    with pytest.raises(LocalProtocolError, match="stream 1 in state SENT"):
        stream.charge(1, 0)


def test_an_error_leaves_behind_the_items_that_came_before_it():
    end, stream = served()
    stream.push(b"\x01")
    stream.push(b"\x02")
    stream.abort(f.ERROR, 0, b"why")
    assert [(kind, payload) for kind, _, _, payload in end.written()] == [
        (f.BATCH, b"\x92\x01\x02"),
        (f.ERROR, b"\x00why"),
    ]


@pytest.mark.parametrize("kind", [f.CANCEL, f.REJECT])
def test_other_aborts_drop_what_waits(kind):
    end, stream = served()
    stream.push(b"\x01")
    stream.abort(kind, 1, b"why")
    assert [each[0] for each in end.written()] == [kind]


@pytest.mark.parametrize("kind", [f.CANCEL, f.ERROR, f.REJECT])
def test_nothing_happens_on_a_stream_that_is_over(kind):
    end, stream = served()
    stream.abort(kind)
    end.take_output()
    stream.abort(kind)
    stream.ask_to_stop()
    stream.end()
    assert stream.push(b"\x01") is False or stream.may_push
    assert end.take_output() == b""


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=60), st.integers(4096, 20_000))
def test_credit_that_is_given_back_is_what_was_charged(sizes, window):
    client, server = joined(window=window)
    mine, theirs = opened(client, server)
    granted = theirs.credit
    for size in sizes:
        theirs.push(bytes(size))
        move(client, server)
        if len(mine.inbox) > 2 or not theirs.may_push:
            while mine.inbox:
                mine.read(mine.inbox.popleft()[0])
            move(client, server)
            assert theirs.may_push
    while mine.inbox:
        mine.read(mine.inbox.popleft()[0])
    move(client, server)
    assert theirs.credit + mine._credit_due == granted


TIMES = bytes(range(f.TIMES_BYTES))


@pytest.mark.parametrize("items", [(), (b"\x01",), (b"\x01", b"\x02")], ids=["no item", "one item", "two items"])
def test_times_travel_at_the_end_of_an_answer(items):
    client, server = joined()
    stream, answer = opened(client, server)
    for item in items:
        answer.push(item)
    answer.end(TIMES)
    move(server, client)
    assert stream.times == TIMES
    payloads = [bytes(payload) for _, _, _, payload, _ in stream.inbox]
    assert payloads == ([] if not items else [items[0]] if len(items) == 1 else [b"\x92" + b"".join(items)])
    assert all(not flags & f.TIMES for _, _, flags, _, _ in stream.inbox)
    assert stream.told == ["readable"]


@pytest.mark.parametrize(
    ("flags", "payload"), [(f.TIMES, bytes(99)), (f.TIMES | f.END, bytes(f.TIMES_BYTES - 1))], ids=["not last", "short"]
)
def test_a_flag_that_promises_times_must_keep_its_word(flags, payload):
    client, server = joined()
    opened(client, server)
    with pytest.raises(RemoteProtocolError, match="has no times"):
        client.receive(f.frame(f.DATA, 1, payload, flags))

"""One end of a session: what it takes, what it refuses, and with which words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.joined import WINDOW, End, greeted, joined, move, opened, receive_all, request, three_ways
from triton_distributed.errors import LocalProtocolError, RemoteProtocolError
from triton_distributed.wire import frames as f
from triton_distributed.wire.connection import DIRECT
from triton_distributed.wire.frames import GoawayCode, RejectCode
from triton_distributed.wire.hello import Hello, hello_frame
from triton_distributed.wire.states import State

HELLO = hello_frame(Hello(window=WINDOW))
DRAINING = f.coded(f.GOAWAY, 0, GoawayCode.DRAINING, b"see you")


# --- well-formed -----------------------------------------------------------------------------------------------------

LIFE = b"".join(
    (
        HELLO,
        request(1, b"first"),
        request(2, bytes(5000), flags=0, timeout=1.5, window=99, metadata=b"meta"),
        f.frame(f.DATA, 2, b"\x01"),
        f.frame(f.BATCH, 2, b"\x92\x01\x02"),
        f.frame(f.PING, 0, b"12345678"),
        f.frame(f.CREDIT, 2, f.UINT32.pack(1000)),
        f.frame(f.DATA, 2, f.UINT64.pack(30) + bytes(10), f.MORE),
        f.frame(f.CANCEL, 1),
        f.frame(f.DATA, 2, bytes(20), f.END),
        DRAINING,
        f.frame(f.PONG, 0, b"pong"),
    )
)


@pytest.mark.parametrize(("way", "pieces"), [*three_ways(LIFE)], ids=lambda each: each if isinstance(each, str) else "")
def test_a_session_in_any_pieces(way, pieces):
    end = End()
    assert receive_all(end, pieces) is None
    (first, second) = end.requests
    assert first[1:] == (1, 2, float("inf"), b"", b"first", None)
    assert second[1:] == (1, 2, 1.5, b"meta", bytes(5000), None)
    assert first[0].state == State.CLOSED
    assert second[0].state == State.RECEIVED
    assert second[0].credit == 99 + 1000
    assert [(kind, bytes(body)) for _, kind, _, body, _ in second[0].inbox] == [
        (f.DATA, b"\x01"),
        (f.BATCH, b"\x92\x01\x02"),
        (f.DATA, bytes(30)),
    ]
    assert [(kind, payload) for kind, _, _, payload in end.written()] == [(f.PONG, b"12345678")]
    assert end.goaways == [(GoawayCode.DRAINING, "see you")]
    assert end.pongs == [b"pong"]
    assert end.version == 1


def test_a_hello_comes_before_everything_else():
    client = End()
    with pytest.raises(LocalProtocolError, match="before the hellos"):
        client.open_stream(True)
    client.greet()
    assert client.take_output() == HELLO


def test_output_is_asked_for_once_a_turn():
    client, server = joined()
    before = server.scheduled
    client.send(request(1))
    client.send(request(2))
    server.receive(client.take_output())
    for stream, *_ in server.requests:
        stream.push(b"\x01")
        stream.push(b"\x02")
    assert server.scheduled == before + 1


def test_a_request_arrives_as_it_was_sent():
    client, server = joined()
    mine = client.request(7, 2**63, 1.5, b"metadata", b"body")
    assert client.scheduled == 2  # the hello was the first time
    server.take(client.take_output())
    stream, *request = server.requests[-1]
    assert request == [7, 2**63, 1.5, b"metadata", b"body", None]
    assert (stream.id, stream.credit) == (mine.id, mine.window)
    assert (mine.state, stream.state) == (State.SENT, State.RECEIVED)


def test_accepts_leave_in_one_frame():
    client, server = joined()
    mine = [opened(client, server)[0] for _ in range(3)]
    server.announce([each.id for each in mine])
    assert len(server.out) == 1
    client.receive(server.take_output())
    assert all(each.accepted for each in mine)


def test_more_accepts_than_fit_one_frame():
    server = greeted()
    server.announce([*range(1, f.MAX_FRAME // 8 + 2)])
    assert [len(each[3]) for each in server.written()] == [f.MAX_FRAME, 8]


def test_an_accept_of_what_is_over_is_ignored():
    client = greeted()
    client.receive(f.frame(f.ACCEPT, 0, f.UINT64.pack(77)))
    assert client.take_output() == b""


def test_frames_that_crossed_an_abort_are_ignored():
    client, server = joined()
    mine, theirs = opened(client, server, end=False)
    theirs.push(b"\x01")
    mine.push(b"\x02")
    mine.abort(f.CANCEL)
    server.receive(client.take_output())
    client.receive(
        f.frame(f.DATA, 1, b"\x01") + f.frame(f.CREDIT, 1, bytes(4)) + f.frame(f.ERROR, 1, b"\0") + f.frame(f.CANCEL, 1)
    )
    client.receive(f.frame(f.DATA, 1, f.UINT64.pack(1 << 40), f.MORE))
    assert client.streams == server.streams == {}
    assert client.take_output() == b""


# --- malformed -------------------------------------------------------------------------------------------------------

OUT_OF_ORDER = [
    pytest.param(HELLO, "kind 1 came on the session itself", id="a second hello"),
    pytest.param(f.frame(f.REQUEST, 0, bytes(40)), "kind 2 came on the session itself", id="a request without stream"),
    pytest.param(f.frame(f.DATA, 0, b"\x01"), "kind 3 came on the session itself", id="an item without stream"),
    pytest.param(f.frame(0, 0), "kind 0 came on the session itself", id="kind 0"),
    pytest.param(f.frame(255, 0), "kind 255 came on the session itself", id="kind 255"),
    pytest.param(f.frame(f.PING, 0, bytes(65)), "PING has at most 64 bytes", id="a large ping"),
    pytest.param(f.frame(f.GOAWAY, 0), "kind 11 came on the session itself", id="a goaway without code"),
    pytest.param(
        f.frame(f.AUTH, 0, bytes(99)), "kind 14 came on the session itself", id="a proof that nobody asked for"
    ),
    pytest.param(f.frame(f.ACCEPT, 0, bytes(7)), "ACCEPT frame holds 8 bytes", id="half an accept"),
    pytest.param(f.frame(f.ASK, 0, bytes(9)), "ASK frame holds 8 bytes", id="an ask and a bit"),
    pytest.param(f.frame(f.ASK, 0), "ASK frame holds 8 bytes", id="an ask for nothing"),
    pytest.param(f.frame(f.ASK, 0, bytes(8)), "serves no endpoints", id="an ask to an end that serves none"),
    pytest.param(f.frame(f.LOAD, 0, bytes(16)), "has not asked for it", id="a load that was not asked for"),
    pytest.param(f.frame(f.ASK, 1, bytes(8)), "kind 15 came on stream 1", id="an ask on a stream"),
    pytest.param(f.frame(f.DATA, 5, b"\x01"), "stream 5, which was never opened", id="an item from nowhere"),
    pytest.param(f.frame(f.CANCEL, 5), "stream 5, which was never opened", id="a cancel from nowhere"),
    pytest.param(f.frame(f.CREDIT, 2**64 - 1, bytes(4)), "which was never opened", id="credit from nowhere"),
    pytest.param(request(1) + request(1), "stream 1 in state|opened twice", id="opened twice"),
    pytest.param(request(7) + request(6), "stream 6 was opened twice or out of order", id="ids that go down"),
    pytest.param(request(1) + f.frame(f.DATA, 1, b"\x01"), "stream 1 in state RECEIVED", id="an item behind the end"),
    pytest.param(request(1) + f.frame(f.END_OF_STREAM, 1), "stream 1 in state RECEIVED", id="a second end"),
    pytest.param(request(1) + f.frame(99, 1), "kind 99 came on stream 1", id="an unknown kind on a stream"),
    pytest.param(request(1) + f.frame(f.PING, 1), "kind 12 came on stream 1", id="a ping on a stream"),
    pytest.param(request(1) + f.frame(f.CREDIT, 1, bytes(3)), "CREDIT frame holds 4 bytes", id="half a credit"),
    pytest.param(request(1) + f.frame(f.ERROR, 1), "kind 6 came without its code", id="an error without code"),
    pytest.param(request(1) + f.frame(f.REJECT, 1), "kind 10 came without its code", id="a reject without code"),
    pytest.param(f.frame(f.REQUEST, 1, bytes(31), f.END), "shorter than its fixed part", id="half a request"),
    pytest.param(f.frame(f.REQUEST, 1, b"", f.END), "shorter than its fixed part", id="a request of nothing"),
    pytest.param(request(1, announced=1), "shorter than the metadata it announces", id="metadata that is not there"),
    pytest.param(request(1, announced=2**32 - 1), "shorter than the metadata", id="metadata of 4 GiB"),
    pytest.param(request(1, flags=f.MORE | f.END), "in the middle of a message", id="a request that ends and goes on"),
    pytest.param(f.HEADER.pack(f.MAX_FRAME + 1, f.DATA, 0, 1), "the limit is 262,144", id="a frame above the limit"),
    pytest.param(f.HEADER.pack(2**32 - 1, f.DATA, 0, 1), "the limit is 262,144", id="a frame of 4 GiB"),
    pytest.param(f.frame(f.REQUEST, 1, f.UINT64.pack(2**40), f.MORE), "the limit is", id="a message above the limit"),
]


@pytest.mark.parametrize(("data", "says"), OUT_OF_ORDER)
def test_what_breaks_the_protocol(data, says):
    for _, pieces in three_ways(data):
        end = greeted()
        words = receive_all(end, pieces)
        assert words is not None
        with pytest.raises(RemoteProtocolError, match=says):
            raise RemoteProtocolError(words)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(request(1), "first frame is not a hello", id="a request"),
        pytest.param(f.frame(f.PING, 0), "first frame is not a hello", id="a ping"),
        pytest.param(f.frame(f.DATA, 3), "first frame is not a hello", id="an item"),
        pytest.param(f.frame(f.HELLO, 1), "first frame is not a hello", id="a hello on a stream"),
        pytest.param(f.frame(f.GOAWAY, 0), "first frame is not a hello", id="a goaway without code"),
        pytest.param(f.coded(f.GOAWAY, 0, 1, b"no \x1b[31m\xff\n!"), r"^no \?\[31m.\?!$", id="a goaway at once"),
        pytest.param(f.coded(f.GOAWAY, 0, 1, b"w" * 4000), "^w{500}$", id="a long goaway at once"),
        pytest.param(f.frame(f.AUTH, 0, bytes(99)), "first frame is not a hello", id="a proof"),
        pytest.param(f.frame(f.HELLO, 0, b"NATS"), "does not speak this protocol", id="a hello of somebody else"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", "not this protocol", id="HTTP"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(20), "the peer speaks TLS", id="TLS"),
        pytest.param(hello_frame(Hello(version=7, lowest=5)), r"speaks 1 to 1, the peer 5 to 7", id="a later version"),
        pytest.param(
            hello_frame(Hello(version=0, lowest=0)), r"speaks 1 to 1, the peer 0 to 0", id="an earlier version"
        ),
    ],
)
def test_what_is_said_instead_of_a_hello(data, says):
    for _, pieces in three_ways(data):
        end = End()
        with pytest.raises(RemoteProtocolError, match=says):
            raise RemoteProtocolError(receive_all(end, pieces) or "nothing")
        assert end.hellos == []


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param(f.frame(f.DATA, 1, b"", f.END | f.BUFFERS), id="no head"),
        pytest.param(
            f.frame(f.DATA, 1, bytes(WINDOW))
            + f.frame(f.DATA, 1, bytes(f.MAX_FRAME)) * 2
            + f.frame(f.DATA, 1, bytes(f.MAX_FRAME), f.END),
            id="above its credit",
        ),
        pytest.param(
            f.frame(f.DATA, 1, f.UINT64.pack(1 << 20), f.MORE) + f.frame(f.DATA, 1, bytes(DIRECT), f.END),
            id="bytes missing",
        ),
    ],
)
def test_a_stream_whose_last_frame_is_bad_is_still_open(frames):
    """Its reader learns of the lost session like those of the other streams."""
    for step in (len(frames), 999):
        pieces = [frames[at : at + step] for at in range(0, len(frames), step)]
        end = greeted(Hello(window=WINDOW, max_frame=f.LARGE_FRAME))
        stream = end.open_stream(True)
        assert receive_all(end, pieces) is not None
        assert end.over() == [stream]


def test_frames_before_the_bad_one_were_served():
    end = greeted()
    with pytest.raises(RemoteProtocolError):
        end.receive(request(1) + request(2) + f.frame(99, 1) + request(3))
    assert [stream.id for stream, *_ in end.requests] == [1, 2]


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_stream_above_the_limit_is_refused_alone():
    server = greeted(Hello(max_streams=2, window=WINDOW))
    server.receive(request(1) + request(2) + request(3) + request(4, flags=f.MORE))
    assert [stream.id for stream, *_ in server.requests] == [1, 2]
    refusals = server.written()
    assert [(kind, number, payload[0]) for kind, _, number, payload in refusals] == [
        (f.REJECT, 3, RejectCode.OVERLOADED),
        (f.REJECT, 4, RejectCode.OVERLOADED),
    ]
    assert b"2 streams are open on this session, see TRD_MAX_STREAMS" in refusals[0][3]
    server.receive(f.frame(f.DATA, 4, bytes(1000), f.MORE) + f.frame(f.DATA, 4, b"", f.END) + f.frame(f.CANCEL, 1))
    server.receive(request(5))
    assert [stream.id for stream, *_ in server.requests] == [1, 2, 5]
    assert server._budget._left == server.session_window - sum(each.window for each in server.streams.values())


def test_a_pong_a_ping():
    end = greeted()
    end.receive(f.frame(f.PING, 0) + f.frame(f.PING, 0, bytes(64)))
    assert [each[3] for each in end.written()] == [b"", bytes(64)]


def test_words_that_are_no_text_are_shown_as_well_as_can_be():
    end = greeted()
    end.receive(f.coded(f.GOAWAY, 0, GoawayCode.BUSY, b"\xff\xfe full"))
    assert end.goaways == [(GoawayCode.BUSY, "\ufffd\ufffd full")]


@pytest.mark.parametrize("stop", [1, 20, 100_000])
def test_a_fragment_whose_stream_is_aborted_meanwhile(stop):
    """What is under way is read to its end and dropped, and the frames behind it are read as frames."""
    client, server = joined(window=1 << 20)
    mine, _theirs = opened(client, server)
    size = 200_000
    data = f.frame(f.DATA, 1, f.UINT64.pack(size * 2 - 8) + bytes(size - 8), f.MORE) + f.frame(
        f.DATA, 1, bytes(size), f.END
    )
    at = size + f.HEADER_BYTES * 2 + stop
    client.take(data[:at])
    fragment = client.direct
    assert fragment is not None
    mine.abort(f.CANCEL)
    client.take(data[at:] + DRAINING)
    assert fragment.missing == 0
    assert client.goaways == [(GoawayCode.DRAINING, "see you")]
    assert not mine.inbox
    assert client.streams == {}


def test_fragments_of_two_streams_interleave():
    client, server = joined(window=1 << 20)
    opened(client, server)
    opened(client, server)
    parts = {1: b"a", 2: b"b"}
    data = b""
    for at in range(3):
        for number, letter in parts.items():
            start = f.UINT64.pack(300_000) if not at else b""
            data += f.frame(f.DATA, number, start + letter * 100_000, f.MORE if at < 2 else f.END)
    for size in (1 << 20, 7919, 100):
        receiver = greeted(window=1 << 20)
        streams = [receiver.open_stream(True), receiver.open_stream(True)]
        assert receive_all(receiver, (data[at : at + size] for at in range(0, len(data), size))) is None
        assert [bytes(stream.inbox[0][3]) for stream in streams] == [b"a" * 300_000, b"b" * 300_000]
        assert receiver.streams == {}


@given(st.lists(st.binary(max_size=60), max_size=12))
def test_garbage_after_the_hello(pieces):
    end = greeted()
    receive_all(end, pieces)
    assert len(end.streams) <= len(pieces) * 5


frames = st.builds(
    f.frame,
    st.one_of(st.sampled_from(list(f.Kind)), st.integers(0, 255)),
    st.one_of(st.integers(0, 4), st.integers(0, 2**64 - 1)),
    st.one_of(
        st.binary(max_size=50),
        st.just(f.REQUEST_PREFIX.pack(1, 2, 1.0, 100, 0)),
        st.builds(lambda size: f.UINT64.pack(size) + bytes(10), st.integers(0, 2**20)),
    ),
    st.one_of(st.integers(0, 31), st.integers(0, 255)),
)


@given(st.lists(frames, max_size=20), st.integers(1, 64))
def test_any_frames_in_any_pieces_end_in_the_same_way(some, step):
    data = b"".join(some)
    ways = []
    for pieces in ([data], [data[at : at + step] for at in range(0, len(data), step)]):
        end = greeted()
        words = receive_all(end, pieces)
        states = {number: (stream.state, len(stream.inbox)) for number, stream in end.streams.items()}
        ways.append((words, states, end.take_output(), end.goaways))
    assert ways[0] == ways[1]


def test_two_connections_come_to_rest():
    client, server = joined()
    mine, theirs = opened(client, server)
    theirs.push(b"\x01")
    theirs.end()
    move(client, server)
    assert (mine.state, theirs.state) == (State.CLOSED, State.CLOSED)
    assert client.streams == server.streams == {}


# --- load ------------------------------------------------------------------------------------------------------------

KNOWS = Hello(window=WINDOW, features=["load"])


def test_a_load_is_asked_for_and_reported() -> None:
    client, server = joined(hello=KNOWS)
    asked: list[list[int]] = []
    server.on_ask = lambda connection, keys: asked.append(keys)
    loads: list[tuple[int, int]] = []
    client.ask_load(7, lambda running, waiting: loads.append((running, waiting)))
    server.receive(client.take_output())
    assert asked == [[7]]
    server.report_load([(7, 3, 2), (8, 1, 1)])  # of 8 it has not asked: it may have stopped meanwhile
    server.report_load([(7, 2**32 - 1, 0)])
    client.receive(server.take_output())
    assert loads == [(3, 2), (2**32 - 1, 0)]


def test_a_peer_that_does_not_know_it_is_not_asked() -> None:
    client = greeted(KNOWS)
    client.ask_load(7, lambda running, waiting: None)
    assert client.written() == []


def test_half_a_load_is_refused() -> None:
    client = greeted(KNOWS, peer=KNOWS)
    client.ask_load(7, lambda running, waiting: None)
    with pytest.raises(RemoteProtocolError, match="LOAD frame holds 16 bytes"):
        client.receive(f.frame(f.LOAD, 0, bytes(17)))


def test_a_lost_session_refers_to_no_program() -> None:
    client = greeted(KNOWS, peer=KNOWS)
    client.ask_load(7, lambda running, waiting: None)
    client.on_ask = lambda connection, keys: None
    lost = [client.lost]
    client.over()
    assert [*lost, client.lost] == [False, True]
    with pytest.raises(RemoteProtocolError, match="has not asked"):
        client.receive(f.frame(f.LOAD, 0, bytes(16)))
    with pytest.raises(RemoteProtocolError, match="serves no endpoints"):
        client.receive(f.frame(f.ASK, 0, bytes(8)))

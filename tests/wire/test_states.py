"""Any state × any input, against what the words of wire.states say."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.joined import End, Noted, greeted, request
from triton_distributed.errors import RemoteProtocolError
from triton_distributed.wire import frames as f
from triton_distributed.wire.frames import Kind
from triton_distributed.wire.states import ILLEGAL, MIRROR, RECEIVING, SENDING, Input, State, input_of

HALVES = {
    State.OPEN: (True, True),
    State.SENT: (False, True),
    State.RECEIVED: (True, False),
    State.CLOSED: (False, False),
}
STATE_OF = {halves: state for state, halves in HALVES.items()}


def said(state: State, what: Input) -> int:
    """The state after this end sends `what`: a stream is two halves, an abort closes both."""
    if state == State.IDLE:
        return {Input.OPEN: State.OPEN, Input.OPEN_END: State.SENT}.get(what, ILLEGAL)
    sending, receiving = HALVES[state]
    if what in (Input.OPEN, Input.OPEN_END) or state == State.CLOSED:
        return ILLEGAL
    if what == Input.ABORT:
        return State.CLOSED
    if what == Input.NOTE:
        return state
    if not sending:
        return ILLEGAL
    return STATE_OF[(what == Input.DATA, receiving)]


@pytest.mark.parametrize(("state", "what"), [*itertools.product(State, Input)], ids=lambda each: each.name)
def test_sending(state, what):
    assert SENDING[state][what] == said(state, what)


@pytest.mark.parametrize(("state", "what"), [*itertools.product(State, Input)], ids=lambda each: each.name)
def test_receiving_is_the_mirror(state, what):
    if state == State.CLOSED:  # the peer could not know yet
        expected = ILLEGAL if what in (Input.OPEN, Input.OPEN_END) else State.CLOSED
    else:
        theirs = said(State(MIRROR[state]), what)
        expected = theirs if theirs == ILLEGAL else MIRROR[theirs]
    assert RECEIVING[state][what] == expected


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(Input)), max_size=30))
def test_two_ends_that_talk_in_turn_agree(script):
    ends = [State.IDLE, State.IDLE]
    for first, what in script:
        sender, receiver = (0, 1) if first else (1, 0)
        if (after := SENDING[ends[sender]][what]) == ILLEGAL:
            continue
        ends[sender] = State(after)
        received = RECEIVING[ends[receiver]][what]
        assert received != ILLEGAL
        ends[receiver] = State(received)
        assert ends[receiver] == MIRROR[ends[sender]]


@given(st.integers(0, 255), st.integers(0, 255))
def test_every_frame_has_an_input_or_none(kind, flags):
    what = input_of(kind, flags)
    on_streams = {
        Kind.REQUEST,
        Kind.DATA,
        Kind.BATCH,
        Kind.END,
        Kind.ERROR,
        Kind.REJECT,
        Kind.CANCEL,
        Kind.CREDIT,
        Kind.ACCEPT,
    }
    assert (what != ILLEGAL) == (kind in on_streams)
    if kind == Kind.CANCEL:
        assert what == (Input.NOTE if flags & f.GRACEFUL else Input.ABORT)


PAYLOADS = {
    Kind.REQUEST: f.REQUEST_PREFIX.pack(1, 2, 1.0, 65536, 0),
    Kind.DATA: b"\x01",
    Kind.BATCH: b"\x91\x01",
    Kind.ERROR: b"\x00",
    Kind.REJECT: b"\x00",
    Kind.CREDIT: bytes(4),
}


def in_state(end: End, state: State) -> Noted | None:
    """Stream 1 in a state; one that the peer has opened where it is to be closed, so that its id is used up."""
    if state == State.IDLE:
        return None
    if state == State.CLOSED:
        end.receive(request(1))
        stream: Noted = end.requests.pop()[0]
        stream.end()
        end.take_output()
        return stream
    stream = end.open_stream(state == State.SENT)
    if state == State.RECEIVED:
        end.receive(f.frame(f.END_OF_STREAM, stream.id, b"", f.END))
    return stream


@pytest.mark.parametrize("state", State, ids=lambda each: each.name)
@pytest.mark.parametrize("flags", [0, f.END, f.GRACEFUL, f.END | f.GRACEFUL, f.ANNOTATED], ids=hex)
@pytest.mark.parametrize("kind", [*Kind, 0, 17, 255], ids=str)
def test_a_connection_does_what_the_table_says(state, kind, flags):
    end = greeted()
    stream: Any = in_state(end, state)
    before = State(stream.state) if stream else State.IDLE
    assert before == state
    what = input_of(kind, flags)
    after = ILLEGAL if what == ILLEGAL else RECEIVING[state][what]
    number = 1
    data = f.frame(kind, number, PAYLOADS.get(kind, b""), flags)
    if after == ILLEGAL:
        with pytest.raises(RemoteProtocolError, match=rf"stream {number}\b|kind {kind}\b|opened twice|never opened"):
            end.receive(data)
        return
    end.receive(data)
    if state == State.IDLE:
        stream = end.requests[-1][0]
    assert stream.state == after
    assert (number in end.streams) == (after != State.CLOSED)
    if state == State.CLOSED:
        assert stream.told == []
        assert end.take_output() == b""
    elif what in (Input.DATA, Input.DATA_END):
        assert stream.told[-1] == "readable"
        assert bool(stream.inbox) == (kind != Kind.END)
    elif what == Input.ABORT:
        assert stream.told[-1] == "closed"
        assert stream.failure == (None if kind == Kind.CANCEL else (kind, 0, b""))
    elif kind == Kind.CANCEL:
        assert stream.told[-1] == "stop"

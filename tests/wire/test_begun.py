"""ACCEPT on a stream: the caller asks whether the handler has begun, and the worker answers once it has."""

from __future__ import annotations

import pytest

from tests.wire.joined import greeted, joined, opened
from triton_distributed.wire import frames as f


@pytest.mark.parametrize("end", [True, False])
def test_the_answer_waits_until_the_handler_has_begun(end: bool) -> None:
    client, server = joined()
    mine, theirs = opened(client, server, end=end)
    mine.ask_begun()
    mine.ask_begun()
    server.receive(client.take_output())
    assert server.take_output() == b""
    assert (mine.begun, theirs.begun, theirs.asked) == (False, False, True)
    theirs.begun = True
    theirs.tell_begun()
    client.receive(server.take_output())
    assert mine.begun
    assert mine.told == ["readable"]  # It wakes the caller.
    assert not mine.inbox


def test_a_question_after_the_beginning_is_answered_at_once_and_once() -> None:
    client, server = joined()
    mine, theirs = opened(client, server)
    theirs.begun = True
    mine.ask_begun()
    question = client.take_output()
    for _ in range(1000):
        server.receive(question)
    answers = server.written()
    assert [(kind, number) for kind, _, number, _ in answers] == [(f.ACCEPT, mine.id)]


def test_questions_about_closed_streams_are_ignored() -> None:
    client, server = joined()
    mine, theirs = opened(client, server)
    mine.ask_begun()
    theirs.abort(f.ERROR, f.ErrorCode.INVALID)
    server.take_output()
    server.receive(client.take_output())
    assert server.take_output() == b""
    theirs.tell_begun()
    mine.abort(f.CANCEL)
    client.take_output()
    mine.tell_begun()
    assert server.take_output() == client.take_output() == b""


def test_an_answer_without_a_question_is_harmless() -> None:
    end = greeted()
    stream = end.open_stream(True)
    end.take_output()
    end.receive(f.frame(f.ACCEPT, stream.id) * 3)
    assert stream.begun
    assert end.take_output() == b""

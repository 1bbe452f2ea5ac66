"""Who knows the token: both ends prove it, nothing is served before, and nobody learns more than that he is refused."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.joined import WINDOW, End, frames_of, move, opened, receive_all, request, three_ways
from triton_distributed.errors import RemoteProtocolError
from triton_distributed.wire import frames as f
from triton_distributed.wire.authentication import CHALLENGE_BYTES, PROOF_BYTES, REFUSED, Authentication
from triton_distributed.wire.hello import MAGIC, Hello, hello_frame, hello_payload

TOKEN = b"correct horse battery staple"
OF_CLIENT, OF_WORKER = b"c" * CHALLENGE_BYTES, b"w" * CHALLENGE_BYTES
REAL = Hello(agent="it", window=WINDOW, nonce=7)


def client(token: bytes = TOKEN, challenge: bytes = OF_CLIENT, hello: Hello = REAL) -> End:
    return End(hello, authentication=Authentication(token, challenge, True) if token else None)


def worker(token: bytes = TOKEN, challenge: bytes = OF_WORKER, hello: Hello = REAL) -> End:
    return End(hello, authentication=Authentication(token, challenge, False) if token else None)


def greet(*ends: End) -> list[bytes]:
    """The first bytes of each."""
    for each in ends:
        each.greet()
    return [each.take_output() for each in ends]


def proof_for(to: End, token: bytes = TOKEN, hello: bytes | None = None) -> tuple[bytes, bytes]:
    """What a client with this token says to a worker that has greeted: its hello and its AUTH."""
    (said,) = greet(to)
    one = client(token)
    (opening,) = greet(one)
    one.receive(said)
    ((kind, _, _, payload),) = one.written()
    assert kind == f.AUTH
    if hello is not None:
        payload = payload[:PROOF_BYTES] + hello
    return opening, f.frame(f.AUTH, 0, payload)


def refused(end: End, *data: bytes) -> None:
    """It ends with the words that everybody gets, and nothing was served."""
    assert receive_all(end, data) == REFUSED
    unserved(end)


def unserved(end: End) -> None:
    assert end.peer is None
    assert [*end.requests, *end.hellos, *end.streams, *end.goaways, *end.pongs] == []
    assert {each[0] for each in end.written()} <= {f.HELLO, f.AUTH}


def test_both_prove_it_and_then_say_who_they_are():
    one, other = client(), worker()
    from_client, from_worker = greet(one, other)
    one.receive(from_worker)
    other.receive(from_client)
    assert one.peer is other.peer is None
    proof = one.take_output()
    assert other.take_output() == b""  # the dialer goes first
    other.receive(proof)
    assert other.hellos == [REAL]
    assert one.hellos == []
    answer = other.take_output()
    assert [each[0] for each in frames_of(answer)] == [f.AUTH]
    one.receive(answer)
    assert one.hellos == [REAL]
    assert one.version == other.version == 1
    mine, theirs = opened(one, other)
    theirs.push(b"\x01")
    move(one, other)
    assert len(mine.inbox) == 1
    for said in (from_client, from_worker, proof, answer):
        assert TOKEN not in said


@pytest.mark.parametrize("end", [client, worker])
def test_the_first_hello_says_nothing_of_interest(end):
    (said,) = greet(end(hello=Hello(agent="secret", max_message=1 << 20, max_streams=5, window=9, nonce=3)))
    ((kind, _, _, payload),) = frames_of(said)
    assert kind == f.HELLO
    fields = msgspec.msgpack.decode(payload[len(MAGIC) :])
    assert fields == {"features": ["token"], "challenge": OF_CLIENT if end is client else OF_WORKER}
    later = Authentication(TOKEN, OF_CLIENT, True).opening(Hello(version=9, lowest=4, agent="secret"))
    assert later == Hello(version=9, lowest=4, features=["token"], challenge=OF_CLIENT)


def test_in_any_pieces_and_with_a_request_behind_it():
    for _, pieces in three_ways(b"".join((*proof_for(worker()), request(1, b"body")))):
        end = worker()
        greet(end)
        assert receive_all(end, pieces) is None
        assert end.hellos == [REAL]
        assert len(end.requests) == 1
    one, other = client(), worker()
    from_client, from_worker = greet(one, other)
    one.receive(from_worker)
    other.receive(from_client + one.take_output())
    for _, pieces in three_ways(from_worker + other.take_output()):
        end = client()
        greet(end)
        assert receive_all(end, pieces) is None
        assert end.hellos == [REAL]


@pytest.mark.parametrize("token", [b"wrong", TOKEN + b" ", TOKEN[:-1], b"\0"], ids=str)
def test_a_client_with_another_token(token):
    end = worker()
    refused(end, *proof_for(end, token))


def test_a_worker_with_another_token():
    """It cannot verify the client's proof; and where it pretends to, its own is wrong."""
    one = client()
    opening, said = greet(one, worker(b"wrong"))
    one.receive(said)
    one.take_output()
    liar = Authentication(b"wrong", OF_WORKER, False)
    liar.hear(Hello(features=["token"], challenge=OF_CLIENT))
    refused(one, f.frame(f.AUTH, 0, liar.prove(hello_payload(REAL))))
    assert opening


def test_a_token_on_one_side_only():
    for one, other in ((client(), worker(b"")), (client(b""), worker())):
        of_client, of_worker = greet(one, other)
        for end, said in ((one, of_worker), (other, of_client)):
            refused(end, said)


def test_two_ends_without_a_token_know_nothing_of_it():
    one, other = client(b""), worker(b"")
    from_client, from_worker = greet(one, other)
    one.receive(from_worker)
    other.receive(from_client)
    assert one.hellos == other.hellos == [REAL]


@pytest.mark.parametrize("end", [client, worker])
def test_ones_own_challenge_sent_back(end):
    mirrored = end()
    (said,) = greet(mirrored)
    refused(mirrored, said)


def test_ones_own_proof_sent_back():
    """A mirror that gives a challenge of its own: the client's proof is one of a dialer, and is no acceptor's."""
    one = client()
    greet(one)
    one.receive(hello_frame(Hello(features=["token"], challenge=OF_WORKER)))
    refused(one, one.take_output())


def test_two_dialers_do_not_take_each_other_for_workers():
    one, other = client(), client(challenge=OF_WORKER)
    from_one, from_other = greet(one, other)
    one.receive(from_other)
    other.receive(from_one)
    proofs = one.take_output(), other.take_output()
    refused(one, proofs[1])
    refused(other, proofs[0])


def test_two_acceptors_wait_for_each_other():
    one, other = worker(), worker(challenge=OF_CLIENT)
    from_one, from_other = greet(one, other)
    one.receive(from_other)
    other.receive(from_one)
    unserved(one)
    unserved(other)


def test_a_conversation_that_is_played_again():
    end = worker()
    opening, proof = proof_for(end)
    end.receive(opening + proof)
    assert end.hellos == [REAL]
    again = worker(challenge=b"n" * CHALLENGE_BYTES)
    greet(again)
    refused(again, opening, proof)


def test_a_hello_that_was_changed_under_way():
    end = worker()
    refused(end, *proof_for(end, hello=hello_payload(Hello(window=WINDOW, max_message=1 << 40))))


@pytest.mark.parametrize("at", range(0, PROOF_BYTES, 5))
def test_a_proof_that_was_changed_under_way(at):
    end = worker()
    opening, proof = proof_for(end)
    bad = bytearray(proof)
    bad[f.HEADER_BYTES + at] ^= 1
    refused(end, opening, bytes(bad))


OPENING = hello_frame(Hello(features=["token"], challenge=OF_CLIENT))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(request(1), id="a request at once"),
        pytest.param(f.frame(f.AUTH, 0, bytes(80)), id="a proof at once"),
        pytest.param(f.frame(f.PING, 0, b"x"), id="a ping at once"),
        pytest.param(f.coded(f.GOAWAY, 0, 1, b"hear my words"), id="a goaway at once"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="HTTP"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(20), id="TLS"),
        pytest.param(f.frame(f.HELLO, 0, b"NATS"), id="another protocol"),
        pytest.param(f.frame(f.HELLO, 0, MAGIC + b"\xc1"), id="a hello that is none"),
        pytest.param(hello_frame(Hello(window=0)), id="a hello with impossible limits"),
        pytest.param(hello_frame(Hello(features=["token"])), id="no challenge"),
        pytest.param(hello_frame(Hello(features=["token"], challenge=bytes(31))), id="a short challenge"),
        pytest.param(hello_frame(Hello(challenge=bytes(32))), id="a challenge without the feature"),
        pytest.param(OPENING + OPENING, id="two hellos"),
        pytest.param(OPENING + request(1), id="a request before the proof"),
        pytest.param(OPENING + f.frame(f.DATA, 1, b"\x01"), id="an item before the proof"),
        pytest.param(OPENING + f.frame(f.ACCEPT, 0, bytes(8)), id="an accept before the proof"),
        pytest.param(OPENING + f.frame(f.PING, 0, b"x"), id="a ping before the proof"),
        pytest.param(OPENING + f.coded(f.GOAWAY, 0, 0, b"hear my words"), id="a goaway before the proof"),
        pytest.param(OPENING + f.frame(f.AUTH, 0), id="an empty proof"),
        pytest.param(OPENING + f.frame(f.AUTH, 0, bytes(PROOF_BYTES - 1)), id="a short proof"),
        pytest.param(OPENING + f.frame(f.AUTH, 0, bytes(PROOF_BYTES)), id="a proof without a hello"),
        pytest.param(OPENING + f.frame(f.AUTH, 1, bytes(80)), id="a proof on a stream"),
        pytest.param(OPENING + f.HEADER.pack(f.MAX_HELLO + 1, f.AUTH, 0, 0), id="a proof beyond what is read"),
        pytest.param(OPENING + f.HEADER.pack(2**32 - 1, f.AUTH, 0, 0), id="a proof of 4 GiB"),
    ],
)
def test_a_worker_says_no_more_than_that_it_refuses(data):
    for _, pieces in three_ways(data):
        end = worker()
        greet(end)
        refused(end, *pieces)


def test_the_right_proof_of_a_hello_that_is_none():
    end = worker()
    opening, _ = proof_for(end)
    right = Authentication(TOKEN, OF_CLIENT, True)
    right.hear(Hello(features=["token"], challenge=OF_WORKER))
    refused(end, opening, f.frame(f.AUTH, 0, right.prove(b"no hello")))


def test_versions_that_do_not_meet_are_still_named():
    end = worker()
    greet(end)
    words = receive_all(end, [hello_frame(Hello(version=7, lowest=5, features=["token"], challenge=OF_CLIENT))])
    assert words == "no common protocol version: this end speaks 1 to 1, the peer 5 to 7"
    unserved(end)


@pytest.mark.parametrize(
    "after", [b"", hello_frame(Hello(features=["token"], challenge=OF_WORKER))], ids=["-", "hello"]
)
def test_a_client_repeats_why_the_worker_left(after):
    one = client()
    greet(one)
    words = receive_all(one, [after, f.coded(f.GOAWAY, 0, f.GoawayCode.BUSY, b"full\x00 house")])
    assert words == "full? house"
    unserved(one)


def test_behind_the_proofs_frames_have_their_usual_size():
    end = worker()
    end.receive(b"".join(proof_for(end)))
    end.take_output()
    end.receive(request(1, bytes(f.MAX_FRAME - f.REQUEST_PREFIX_BYTES)))
    assert len(end.requests) == 1
    assert receive_all(end, [f.frame(f.AUTH, 0, bytes(80))]) == "a frame of kind 14 came on the session itself"


@pytest.mark.parametrize(("token", "challenge"), [(b"", OF_CLIENT), (TOKEN, b""), (TOKEN, bytes(31))])
def test_what_proves_nothing_is_not_begun(token, challenge):
    with pytest.raises(ValueError, match="at least a byte"):
        Authentication(token, challenge, True)


@given(st.binary(max_size=300), st.booleans(), st.booleans())
def test_any_bytes_are_refused(data, heard, dialer):
    for each in (data, f.frame(f.AUTH, 0, data), f.frame(f.HELLO, 0, MAGIC + data)):
        end = client() if dialer else worker()
        greet(end)
        other = OF_WORKER if dialer else OF_CLIENT
        try:
            end.receive((hello_frame(Hello(features=["token"], challenge=other)) if heard else b"") + each)
        except RemoteProtocolError as error:
            assert dialer or str(error) == REFUSED or "no common protocol version" in str(error)
        unserved(end)

"""One end of a session over NATS without a server: order, windows, beats, and what ends it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from triton_distributed.transport.leftovers import read_remainder
from triton_distributed.transport.nats import messages as m
from triton_distributed.transport.nats.transport import GRACE_BEATS, SILENT_BEATS, NatsTransport

WINDOW = 64 * 1024


def message(data: bytes, reply: str, headers: dict[str, str] | None = None) -> Any:
    """What the client library hands over."""
    return SimpleNamespace(data=data, reply=reply, headers=headers)


GONE = message(b"", "", {"Status": "503"})


class Noted(asyncio.Protocol):
    def __init__(self) -> None:
        self.told: list[str] = []
        self.data = b""

    def connection_made(self, transport: Any) -> None:
        self.told.append("made")

    def data_received(self, data: bytes) -> None:
        self.data += data

    def pause_writing(self) -> None:
        self.told.append("paused")

    def resume_writing(self) -> None:
        self.told.append("resumed")

    def connection_lost(self, error: Exception | None) -> None:
        self.told.append(f"lost: {error}")


class Wires:
    """Carries messages between two ends when a test says so."""

    def __init__(self, largest: int = 1024, window: int = WINDOW) -> None:
        self.largest = largest
        self.connected = True
        self.under_way: list[tuple[str, bytes, str]] = []
        self.sizes: list[int] = []
        self.waiting: list[NatsTransport] = []
        self.gone: list[NatsTransport] = []
        loop = asyncio.get_running_loop()
        self.noted = {subject: Noted() for subject in "ab"}
        self.ends = {subject: NatsTransport(loop, self, self.noted[subject], subject, window) for subject in "ab"}
        self.a, self.b = self.ends["a"], self.ends["b"]
        self.a.begin("b", window)
        self.b.begin("a", window)

    def publish(self, subject: str, data: bytes, reply: str) -> bool:
        if not self.connected:
            return False
        self.sizes.append(len(data))
        self.under_way.append((subject, data, reply))
        return True

    def blocked(self, transport: NatsTransport) -> None:
        self.waiting.append(transport)

    def left(self, transport: NatsTransport) -> None:
        self.gone.append(transport)

    def carry(self, count: int | None = None) -> list[int]:
        """Deliver so many messages, or all and what answers them; returns their kinds."""
        kinds: list[int] = []
        while self.under_way and (count is None or len(kinds) < count):
            subject, data, reply = self.under_way.pop(0)
            kinds.append(data[0])
            self.ends[subject].take(message(data, reply))
        return kinds

    def say(self, subject: str, data: bytes, reply: str) -> None:
        """Somebody publishes on the subject of an end."""
        self.ends[subject].take(message(data, reply))


async def lost(noted: Noted) -> str:
    await asyncio.sleep(0)
    assert noted.told[-1].startswith("lost: ")
    return noted.told[-1].removeprefix("lost: ")


async def test_bytes_arrive_in_order_and_closing_delivers_what_was_written():
    wires = Wires()
    wires.a.write(b"one ")
    wires.a.writelines([b"two ", memoryview(b"three")])
    wires.a.close()
    assert wires.a.is_closing()
    assert wires.carry() == [m.DATA, m.DATA, m.CLOSE]
    assert wires.noted["b"].data == b"one two three"
    assert await lost(wires.noted["a"]) == await lost(wires.noted["b"]) == "None"
    assert wires.gone == [wires.a, wires.b]


async def test_large_writes_are_cut_to_what_the_server_takes():
    wires = Wires(largest=100)
    data = bytes(range(256)) * 100
    wires.a.write(data)
    wires.carry()
    assert wires.noted["b"].data == data
    assert max(wires.sizes) == 100
    assert wires.a.get_write_buffer_size() == 0


async def test_a_full_window_pauses_the_writer_and_acknowledgements_resume_it():
    wires = Wires()
    for _ in range(70):
        wires.a.write(bytes(1000))
    assert wires.noted["a"].told == ["made", "paused"]
    under_way = len(wires.under_way)
    assert WINDOW <= sum(wires.sizes) < WINDOW + 1024
    wires.carry(under_way - 1)  # acknowledgements are under way, and not here yet
    assert wires.a.get_write_buffer_size() > 0
    assert m.ACK in wires.carry()
    assert wires.noted["a"].told == ["made", "paused", "resumed"]
    assert len(wires.noted["b"].data) == 70_000


async def test_the_smallest_window_moves_messages_of_any_size():
    wires = Wires(window=1)
    wires.a.write(bytes(10_000))
    assert len(wires.under_way) == 1
    wires.carry()
    assert len(wires.noted["b"].data) == 10_000


async def test_answers_carry_the_acknowledgements():
    wires = Wires()
    for _ in range(200):
        wires.a.write(bytes(1000))
        wires.carry(1)
        wires.b.write(b"answer")
        assert wires.carry() == [m.DATA]
    assert len(wires.noted["b"].data) == 200_000


@pytest.mark.parametrize("end", ["close", "abort"])
async def test_ends_that_wait_for_their_window(end):
    wires = Wires()
    wires.a.write(bytes(2 * WINDOW))
    getattr(wires.a, end)()
    wires.a.write(b"too late")
    wires.carry()
    assert len(wires.noted["b"].data) == (2 * WINDOW if end == "close" else pytest.approx(WINDOW, abs=2048))
    assert await lost(wires.noted["b"]) == "None"


@pytest.mark.parametrize("index", [0, 1, 2])
async def test_a_lost_message_ends_the_session(index):
    wires = Wires()
    for _ in range(3):
        wires.a.write(b"x")
    del wires.under_way[index]
    wires.a.tick()  # had it been the last, nothing behind it would tell
    wires.a.tick()
    wires.carry()
    assert wires.noted["b"].data == b"x" * index
    assert "were lost on their way through NATS" in await lost(wires.noted["b"])
    assert "were lost" in await lost(wires.noted["a"])


async def test_a_message_that_comes_twice_ends_the_session():
    wires = Wires()
    wires.a.write(b"x")
    wires.under_way *= 2
    wires.carry()
    assert wires.noted["b"].data == b"x"
    assert "came twice" in await lost(wires.noted["b"])


def all_arrived(end: NatsTransport) -> bool:
    """Whether a session over this end knows all that its peer has said: what it accepted, above all."""
    return read_remainder(end, ConnectionResetError())[1]


async def test_who_has_missed_messages_knows_it_and_who_is_told_so_has_not():
    wires = Wires()
    for _ in range(2):
        wires.a.write(b"x")
    del wires.under_way[0]
    wires.carry()
    assert "were lost" in await lost(wires.noted["a"])
    assert not all_arrived(wires.b)
    assert all_arrived(wires.a)


async def test_whose_peer_fell_silent_may_have_missed_its_last_words():
    wires = Wires()
    for _ in range(SILENT_BEATS + 1):
        wires.a.tick()
    assert "nothing was heard" in await lost(wires.noted["a"])
    assert not all_arrived(wires.a)


async def test_what_a_peer_said_comes_before_the_news_that_it_is_gone_but_for_an_outage():
    for outage in (False, True):
        wires = Wires()
        if outage:
            wires.a.reconnected()
            for _ in range(GRACE_BEATS):
                wires.a.tick()
        wires.a.take(GONE)
        assert "is gone" in await lost(wires.noted["a"])
        assert all_arrived(wires.a) == (not outage)


async def test_whose_connection_is_closed_may_have_missed_something():
    wires = Wires()
    wires.a.fail("the connection to NATS was closed")
    assert not all_arrived(wires.a)


async def test_messages_of_others_are_ignored():
    wires = Wires()
    good = m.HEADER.pack(m.DATA, 0, 0) + b"x"
    for data, reply in ((b"", ""), (b"hello", "a"), (good, ""), (good, "stranger"), (bytes(17), "stranger")):
        wires.say("b", data, reply)
    wires.ends["b"].take(message(good, "a", {"x": "y"}))
    wires.a.write(b"mine")
    wires.carry()
    assert wires.noted["b"].data == b"mine"
    assert wires.noted["b"].told == ["made"]


async def test_an_idle_session_lives_by_its_beats():
    wires = Wires()
    for _ in range(3 * SILENT_BEATS):
        wires.a.tick()
        wires.b.tick()
        assert wires.carry() == [m.BEAT, m.BEAT]
    wires.a.write(b"x")
    wires.carry()
    wires.a.tick()
    assert wires.carry() == []  # what is sent says as much as a beat


async def test_a_silent_end_is_given_up():
    wires = Wires()
    for _ in range(SILENT_BEATS):
        assert wires.noted["a"].told == ["made"]
        wires.a.tick()
    wires.a.tick()
    assert f"nothing was heard from the other end for {SILENT_BEATS} beats" in await lost(wires.noted["a"])


async def test_no_subscriber_means_that_the_other_end_is_gone():
    wires = Wires()
    wires.a.ask()
    wires.a.take(GONE)
    assert "nothing listens on its subject" in await lost(wires.noted["a"])


async def test_asking_is_answered_at_once():
    wires = Wires()
    wires.a.ask()
    assert wires.carry() == [m.ASK, m.BEAT]
    wires.a.abort()


async def test_while_there_is_no_connection_what_is_written_waits():
    wires = Wires()
    wires.connected = False
    wires.a.write(b"later")
    assert wires.noted["a"].told == ["made", "paused"]
    assert wires.waiting == [wires.a]
    wires.connected = True
    wires.a.push()
    wires.carry()
    assert wires.noted["b"].data == b"later"
    assert wires.noted["a"].told == ["made", "paused", "resumed"]


async def test_after_a_reconnection_nothing_is_sent_before_the_other_end_is_heard():
    wires = Wires()
    wires.a.reconnected()
    wires.a.write(b"later")
    assert wires.noted["a"].told == ["made", "paused"]
    wires.under_way.clear()  # the other end was not back yet
    wires.a.take(GONE)
    wires.a.tick()
    wires.under_way.clear()
    wires.b.reconnected()
    assert wires.carry() == [m.ASK, m.BEAT, m.DATA]
    wires.b.write(b"back")
    wires.carry()
    assert (wires.noted["a"].data, wires.noted["b"].data) == (b"back", b"later")


async def test_who_does_not_come_back_is_given_up_after_the_grace():
    wires = Wires()
    wires.a.reconnected()
    for _ in range(GRACE_BEATS):
        wires.a.take(GONE)
        assert not wires.gone
        wires.a.tick()
    wires.a.take(GONE)
    assert wires.gone == [wires.a]


async def test_words_of_a_close_reach_the_other_end():
    wires = Wires()
    wires.say("b", m.HEADER.pack(m.CLOSE, 0, 0) + b"because", "a")
    assert await lost(wires.noted["b"]) == "because"
    wires.b.write(b"too late")
    wires.b.close()
    wires.b.abort()
    wires.b.tick()
    wires.b.ask()
    wires.b.push()
    wires.b.reconnected()
    assert wires.under_way == []


async def test_it_is_no_socket():
    wires = Wires()
    assert wires.a.get_extra_info("socket") is None
    assert wires.a.get_protocol() is wires.noted["a"]
    for call in (wires.a.pause_reading, wires.a.resume_reading, lambda: wires.a.set_protocol(Noted())):
        with pytest.raises(NotImplementedError):
            call()

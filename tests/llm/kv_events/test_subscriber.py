"""Events over a real ZeroMQ: in their order, whole or known to be unknown, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from triton_distributed.llm.contract.cache import BlocksStored, CacheCleared, CacheEvents
from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.contract.request import unpacked
from triton_distributed.llm.engines.mock.publisher import EventPublisher
from triton_distributed.llm.kv_events import subscriber as subscriber_module
from triton_distributed.llm.kv_events.subscriber import EventSubscriber

FREE = "tcp://127.0.0.1:*"


def batch(token: int, rank: int | None = None) -> bytes:
    event = {"type": "BlockStored", "block_hashes": [token], "parent_block_hash": None, "token_ids": [token]}
    return msgspec.msgpack.encode([1.0, [{**event, "block_size": 1}], rank])


class Heard:
    """What a subscriber has given: tokens, and None for a clear."""

    def __init__(self) -> None:
        self.found: list[int | None] = []
        self.ranks: list[int] = []
        self._more = asyncio.Event()

    def __call__(self, events: CacheEvents) -> None:
        for event in events.events:
            if isinstance(event, BlocksStored):
                self.found += unpacked(event.tokens)
            else:
                assert isinstance(event, CacheCleared)
                self.found.append(None)
        self.ranks.append(events.rank)
        self._more.set()

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not done():
                self._more.clear()
                await self._more.wait()


class Lossy(EventPublisher):
    """Numbers all batches and keeps them, and does not send some."""

    def lose(self, payload: bytes) -> None:
        events, self._events = self._events, self
        self.publish(payload)
        self._events = events

    def send_multipart(self, frames: object) -> None:
        """In the place of a socket, while a batch is lost."""


async def connected(publisher: EventPublisher, subscriber: EventSubscriber, heard: Heard, first: int = 0) -> None:
    """Publish until the subscriber has heard something by itself: a new subscription takes a moment."""
    async with asyncio.timeout(20):
        while subscriber._last < 0 or not heard.found:
            publisher.publish(batch(first))
            await asyncio.sleep(0.005)
    heard.found.clear()


def with_both(check: Callable[[Lossy, EventSubscriber, Heard], Any], replay: str = "", **options: Any) -> None:
    async def program() -> None:
        publisher = Lossy(FREE, replay)
        publisher.start()
        heard = Heard()
        subscriber = EventSubscriber(publisher.endpoint, heard, replay=publisher.replay, **options)
        subscriber.start()
        try:
            await check(publisher, subscriber, heard)
        finally:
            await subscriber.close()
            await publisher.close()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(program())


def test_a_gap_is_filled_from_the_replay_in_order() -> None:
    async def check(publisher: Lossy, subscriber: EventSubscriber, heard: Heard) -> None:
        await connected(publisher, subscriber, heard)
        before = subscriber.gaps
        for token in range(1, 1001):  # One of a hundred is lost.
            (publisher.lose if token % 100 == 50 else publisher.publish)(batch(token))
            if token % 100 == 51:
                await heard.until(lambda: heard.found[-1:] == [token])  # noqa: B023 (it is called in this round)
        await heard.until(lambda: 1000 in heard.found)
        assert [each for each in heard.found if each] == list(range(1, 1001))
        assert (subscriber.gaps - before, subscriber.lost) == (10, 0)

    with_both(check, FREE)


def test_a_gap_without_a_replay_makes_the_cache_unknown(caplog: pytest.LogCaptureFixture) -> None:
    async def check(publisher: Lossy, subscriber: EventSubscriber, heard: Heard) -> None:
        await connected(publisher, subscriber, heard)
        publisher.publish(batch(1))
        publisher.lose(batch(2))
        publisher.publish(batch(3))
        await heard.until(lambda: 3 in heard.found)
        assert heard.found[-3:] == [1, None, 3]
        assert set(heard.ranks) == {5}
        assert (subscriber.gaps, subscriber.lost) == (1, 1)

    with_both(check, rank=5)
    assert "1 batches are missing" in caplog.text


def test_a_replay_that_does_not_answer_makes_the_cache_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriber_module, "REPLAY_S", 0.05)

    async def check(publisher: Lossy, subscriber: EventSubscriber, heard: Heard) -> None:
        subscriber.replay = "tcp://127.0.0.1:1"
        await connected(publisher, subscriber, heard)
        publisher.publish(batch(1))
        publisher.lose(batch(2))
        publisher.publish(batch(3))
        await heard.until(lambda: 3 in heard.found)
        assert heard.found[-3:] == [1, None, 3]

    with_both(check, FREE)


def test_batches_that_are_too_old_for_the_replay_make_the_cache_unknown() -> None:
    async def check(publisher: Lossy, subscriber: EventSubscriber, heard: Heard) -> None:
        await connected(publisher, subscriber, heard)
        publisher.publish(batch(1))
        for token in (2, 3, 4):
            publisher.lose(batch(token))
        while len(publisher._kept) > 2:
            publisher._kept.popleft()
        publisher.publish(batch(5))
        await heard.until(lambda: 5 in heard.found)
        assert heard.found[-5:] == [1, None, 3, 4, 5]

    with_both(check, FREE)


def test_what_was_published_before_the_subscriber_came_is_heard() -> None:
    async def program() -> None:
        publisher = EventPublisher(FREE, FREE)
        publisher.start()
        for token in range(5):
            publisher.publish(batch(token, rank=token % 2))
        heard = Heard()
        subscriber = EventSubscriber(publisher.endpoint, heard, replay=publisher.replay)
        subscriber.start()
        await heard.until(lambda: len(heard.found) >= 5)
        assert (heard.found, heard.ranks) == ([0, 1, 2, 3, 4], [0, 1, 0, 1, 0])
        await subscriber.close()
        await publisher.close()

    asyncio.run(program())


def test_an_engine_that_starts_again_has_another_cache() -> None:
    async def check(publisher: Lossy, subscriber: EventSubscriber, heard: Heard) -> None:
        await connected(publisher, subscriber, heard)
        publisher.publish(batch(1))
        await heard.until(lambda: 1 in heard.found)
        await publisher.close()
        await heard.until(lambda: heard.found[-1] is None)  # At once, not with the next event.
        again = EventPublisher(publisher.endpoint, publisher.replay)
        again.start()
        for token in range(100, 130):  # More than before: the numbers alone do not tell.
            again.publish(batch(token))
        await heard.until(lambda: 129 in heard.found)
        assert heard.found[heard.found.index(None) + 1 :] == list(range(100, 130))
        assert subscriber.lost == 1
        await again.close()

    with_both(check, FREE)


def test_numbers_that_begin_anew_clear_the_cache() -> None:
    async def check(publisher: Lossy, subscriber: EventSubscriber, heard: Heard) -> None:
        await connected(publisher, subscriber, heard)
        publisher.publish(batch(1))
        publisher._next = 0
        publisher.publish(batch(2))
        await heard.until(lambda: 2 in heard.found)
        assert heard.found[-3:] == [1, None, 2]

    with_both(check)


def test_frames_that_are_not_batches_and_a_failing_receiver_do_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    async def check(publisher: Lossy, subscriber: EventSubscriber, heard: Heard) -> None:
        await connected(publisher, subscriber, heard)
        for frames in ((b"x",), (b"", b"short", b""), (b"", b"1" * 8, b"", b"")):
            publisher._events.send_multipart(frames)
        publisher.publish(b"no msgpack")
        subscriber._publish = lambda events: 1 / 0
        publisher.publish(batch(1))
        await asyncio.sleep(0)
        async with asyncio.timeout(20):
            while "could not be used" not in caplog.text:
                await asyncio.sleep(0.005)
        subscriber._publish = heard
        publisher.publish(batch(2))
        await heard.until(lambda: 2 in heard.found)
        assert subscriber.decoder.malformed == 4
        assert (subscriber.gaps, subscriber.lost) == (0, 0)

    with_both(check)


def test_many_batches_do_not_hold_the_loop() -> None:
    async def check(publisher: Lossy, subscriber: EventSubscriber, heard: Heard) -> None:
        await connected(publisher, subscriber, heard)
        for token in range(1, 5001):
            publisher.publish(batch(token))
        turns = 0
        async with asyncio.timeout(60):
            while heard.found[-1:] != [5000]:
                await asyncio.sleep(0)
                turns += 1
        assert turns > 5

    with_both(check)


def test_nothing_is_left_after_the_end() -> None:
    def resources() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(list(Path("/proc/self/task").iterdir()))

    async def check(publisher: Lossy, subscriber: EventSubscriber, heard: Heard) -> None:
        await connected(publisher, subscriber, heard)

    with_both(check, FREE)
    before = resources()
    for _ in range(3):
        with_both(check, FREE)
    assert resources() == before


def test_an_invalid_endpoint_is_refused() -> None:
    async def program() -> None:
        for endpoint, replay in (("no endpoint", ""), ("tcp://127.0.0.1:1", "what://x"), ("tcp://127.0.0.1:*", "")):
            subscriber = EventSubscriber(endpoint, lambda events: None, replay=replay)
            with pytest.raises(InvalidParameter, match="cannot connect to"):
                subscriber.start()
            await subscriber.close()

    asyncio.run(program())


def test_without_pyzmq_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)
    subscriber = EventSubscriber("tcp://127.0.0.1:1", lambda events: None)
    with pytest.raises(ImportError, match=r"pip install 'triton-distributed\[kv\]'"):
        subscriber.start()

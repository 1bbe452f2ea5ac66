"""Conformance tests of event planes, which a plane's own test suite runs.

    class TestMine(EventConformance):
        @pytest.fixture
        async def pair(self):
            one, other = MyEvents(…), MyEvents(…)  # two planes of the same system, as in two processes
            yield one, other
            await one.close()
            await other.close()

The code does not import pytest: the tests are methods with names that begin with `test_`, and they take `pair`.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from triton_distributed.errors import DecodeError, RuntimeClosed, SubscriptionClosed
from triton_distributed.events import EventPlane, Subscription

Planes = tuple[EventPlane, EventPlane]


class EventConformance:
    """The tests. Each takes `pair`: two open planes of one system that no other test uses.

    Attributes:
        patience_s: seconds to wait for an expected event; only a failure takes that long.
        large: size in bytes of the largest event that the plane must carry.
    """

    patience_s: ClassVar[float] = 20.0
    large: ClassVar[int] = 900_000

    async def take(self, subscription: Subscription[Any], count: int) -> list[Any]:
        """Return the next `count` events."""
        return [await subscription.get(self.patience_s) for _ in range(count)]

    async def take_until(self, subscription: Subscription[Any], last: bytes) -> list[Any]:
        """Return the events that come before `last`."""
        got: list[Any] = []
        while (event := await subscription.get(self.patience_s)) != last:
            got.append(event)
        return got

    async def test_what_is_published_reaches_every_subscription_once(self, pair: Planes) -> None:
        one, other = pair
        subscriptions = [await plane.subscribe("a.events.x") for plane in (one, other, one, other)]
        await one.publish("a.events.x", b"first")
        await one.publish("a.events.x", b"")
        await one.publish("a.events.x", b"last")
        for each in subscriptions:
            assert await self.take(each, 3) == [b"first", b"", b"last"]

    async def test_whatever_is_published_after_it_is_live_arrives(self, pair: Planes) -> None:
        one, other = pair
        kept = []
        for turn in range(20):  # The publisher has connections by then, and must not rely on old knowledge.
            kept.append(await other.subscribe(f"a.events.{turn % 3}"))
            await one.publish(f"a.events.{turn % 3}", str(turn).encode())
            assert await self.take(kept[-1], 1) == [str(turn).encode()]

    async def test_what_was_published_before_is_gone(self, pair: Planes) -> None:
        one, other = pair
        for _ in range(100):
            await one.publish("a.events.x", b"no subscriber")
        heard = await other.subscribe("a.events.x")
        await one.publish("a.events.x", b"on its way")
        await self.take_until(heard, b"on its way")
        late = await other.subscribe("a.events.x")
        await one.publish("a.events.x", b"heard")
        assert await self.take_until(late, b"heard") in ([], [b"on its way"])

    async def test_exactly_this_subject(self, pair: Planes) -> None:
        one, other = pair
        subjects = [
            "a.events.x",
            "a.events.x2",
            "a.events.X",
            "a.events.x%2Ey",
            "a.events",
            "a",
            "a.events.%2A",
            "events",
        ]
        subscriptions = [await other.subscribe(each) for each in subjects]
        for mark in ("1", "2"):
            for each in subjects:
                await one.publish(each, f"{each} {mark}".encode())
        for each, subscription in zip(subjects, subscriptions, strict=True):
            assert await self.take(subscription, 2) == [f"{each} 1".encode(), f"{each} 2".encode()]

    async def test_a_burst_keeps_each_publishers_order(self, pair: Planes) -> None:
        one, other = pair
        subscriptions = [await plane.subscribe("a.events.x") for plane in pair]

        async def publishes(plane: EventPlane, name: bytes) -> None:
            for number in range(1000):
                await plane.publish("a.events.x", name + b"%d" % number)
                if not number % 100:
                    await asyncio.sleep(0)

        await asyncio.gather(publishes(one, b"a"), publishes(other, b"b"))
        for each in subscriptions:
            got = await self.take(each, 2000)
            for name in (b"a", b"b"):
                assert [event for event in got if event[:1] == name] == [name + b"%d" % n for n in range(1000)]
            assert each.dropped == 0

    async def test_leaving_the_loop_ends_it(self, pair: Planes) -> None:
        one, other = pair
        subscription = await other.subscribe("a.events.x")
        await one.publish("a.events.x", b"1")
        async for event in subscription:
            assert event == b"1"
            break
        assert subscription.closed
        await one.publish("a.events.x", b"2")
        assert [event async for event in subscription] == []
        await _raises(SubscriptionClosed, subscription.get())
        again = await other.subscribe("a.events.x")
        await one.publish("a.events.x", b"3")
        assert await self.take_until(again, b"3") in ([], [b"2"])  # The earlier event may have been on its way.

    async def test_the_last_reference_ends_it(self, pair: Planes) -> None:
        one, other = pair
        dropped, kept = await other.subscribe("a.events.x"), await other.subscribe("a.events.x")
        inbox = dropped._inbox
        del dropped
        assert inbox.closed
        await one.publish("a.events.x", b"1")
        assert await self.take(kept, 1) == [b"1"]

    async def test_a_block_holds_it(self, pair: Planes) -> None:
        one, other = pair
        async with other.subscribe("a.events.x") as subscription:
            for turn in (b"1", b"2"):
                await one.publish("a.events.x", turn)
                async for event in subscription:
                    assert event == turn
                    break
            assert not subscription.closed
        assert subscription.closed

    async def test_it_begins_with_the_call(self, pair: Planes) -> None:
        one, other = pair
        never_awaited = other.subscribe("a.events.x")
        awaited = await other.subscribe("a.events.y")
        await one.publish("a.events.x", b"1")
        await one.publish("a.events.y", b"1")
        assert await self.take(awaited, 1) == [b"1"]
        assert await self.take(never_awaited, 1) == [b"1"]

    async def test_it_can_end_before_it_is_live(self, pair: Planes) -> None:
        one, other = pair
        early = other.subscribe("a.events.x")
        await early.aclose()
        await early
        kept = await other.subscribe("a.events.x")
        await one.publish("a.events.x", b"1")
        assert await self.take(kept, 1) == [b"1"]
        await _raises(SubscriptionClosed, early.get())

    async def test_the_oldest_give_way_to_the_newest(self, pair: Planes) -> None:
        one, _ = pair
        for plane in pair:
            slow = await plane.subscribe("a.events.x", max_events=10)
            witness = await plane.subscribe("a.events.x")
            for number in range(100):
                await one.publish("a.events.x", b"%d" % number)
            await self.take(witness, 100)
            await self.until(lambda slow=slow: slow.dropped == 90)
            assert await self.take(slow, 10) == [b"%d" % number for number in range(90, 100)]
            assert witness.dropped == 0
            slow.close()
            witness.close()

    async def test_bytes_are_bounded_and_one_event_always_fits(self, pair: Planes) -> None:
        one, other = pair
        slow = await other.subscribe("a.events.x", max_bytes=1000)
        for number in range(4):
            await one.publish("a.events.x", b"%d" % number * 400)
        await self.until(lambda: slow.dropped == 2)
        assert await self.take(slow, 2) == [b"2" * 400, b"3" * 400]
        await one.publish("a.events.x", b"4" * 5000)
        assert await self.take(slow, 1) == [b"4" * 5000]

    async def test_a_large_event(self, pair: Planes) -> None:
        one, _ = pair
        subscriptions = [await plane.subscribe("a.events.x") for plane in pair]
        large = bytes(range(256)) * (self.large // 256)
        for data in (b"before", large, b"between", large, b"after"):
            await one.publish("a.events.x", data)
        for each in subscriptions:
            assert await self.take(each, 5) == [b"before", large, b"between", large, b"after"]

    async def test_what_cannot_be_read_is_left_out(self, pair: Planes) -> None:
        one, other = pair

        def read(data: bytes) -> str:
            if data.startswith(b"?"):
                raise DecodeError("it is a question")
            return data.decode()

        subscription = await other.subscribe("a.events.x", read=read)
        for data in (b"1", b"?", b"??", b"2"):
            await one.publish("a.events.x", data)
        assert await self.take(subscription, 2) == ["1", "2"]
        assert (subscription.unreadable, subscription.dropped) == (2, 0)

    async def test_waiting_has_an_end(self, pair: Planes) -> None:
        _, other = pair
        subscription = await other.subscribe("a.events.x")
        error = await _raises(TimeoutError, subscription.get(0.001))
        assert "a.events.x" in str(error)
        assert not subscription.closed

    async def test_a_plane_that_is_closed_ends_its_subscriptions(self, pair: Planes) -> None:
        one, other = pair
        subscription, waiting = await other.subscribe("a.events.x"), await other.subscribe("a.events.y")
        reader = asyncio.ensure_future(_all(waiting))
        await one.publish("a.events.x", b"1")
        await self.until(lambda: subscription.waiting == 1)
        await other.close()
        await other.close()
        assert await asyncio.wait_for(reader, self.patience_s) == []
        assert [event async for event in subscription] == [b"1"]  # Events that have arrived can still be read.
        await _raises(RuntimeClosed, other.publish("a.events.x", b"2"))
        try:
            other.subscribe("a.events.x")
        except RuntimeClosed:
            pass
        else:
            raise AssertionError("a closed plane accepts subscriptions")
        await one.publish("a.events.x", b"3")

    async def until(self, true: Any) -> None:
        """Wait until a condition holds."""
        async with asyncio.timeout(self.patience_s):
            while not true():  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.001)


async def _all(subscription: Subscription[Any]) -> list[Any]:
    return [event async for event in subscription]


async def _raises(kind: type[BaseException], awaitable: Any) -> BaseException:
    try:
        await awaitable
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")

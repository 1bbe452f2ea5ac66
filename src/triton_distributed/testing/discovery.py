"""Conformance tests of discovery backends, which a backend's own test suite runs.

    class TestMine(DiscoveryConformance):
        @pytest.fixture
        async def pair(self):
            one, other = MyDiscovery(…), MyDiscovery(…)  # two discoveries of the same system, as in two processes
            yield one, other
            await one.close()
            await other.close()

The code does not import pytest: the tests are methods with names that begin with `test_`, and they take `pair`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, ClassVar

from triton_distributed.discovery import Added, Change, Discovery, Removed, Snapshot
from triton_distributed.errors import DiscoveryError
from triton_distributed.names import MAX_INSTANCE_ID, MAX_NAME_LENGTH, EndpointName, Instance

Pair = tuple[Discovery, Discovery]


class ChangeLog:
    """A sink that keeps all changes, and lets a test wait for an expected result.

    Attributes:
        changes: all changes, in order.
        present: the instances that exist after the last change, by endpoint and id.
    """

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.present: dict[tuple[EndpointName, int], Instance] = {}
        self._changed = asyncio.Event()

    def __call__(self, change: Change) -> None:
        self.changes.append(change)
        if isinstance(change, Snapshot):
            self.present = {(each.endpoint, each.id): each for each in change.instances}
        elif isinstance(change, Added):
            self.present[change.instance.endpoint, change.instance.id] = change.instance
        else:
            del self.present[change.endpoint, change.instance_id]  # Only a present instance may be removed.
        self._changed.set()

    @property
    def ids(self) -> list[int]:
        """The ids of the present instances, sorted."""
        return sorted(id for _, id in self.present)

    async def until(self, condition: Callable[[], bool], patience_s: float = 20.0) -> None:
        """Wait until `condition` holds. It is checked after each change.

        Raises:
            AssertionError: the condition did not hold within `patience_s` seconds.
        """
        try:
            async with asyncio.timeout(patience_s):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"not within {patience_s:g} s; last changes: {self.changes[-5:]}") from None

    async def until_ids(self, ids: Iterable[int], patience_s: float = 20.0) -> None:
        """Wait until exactly these ids are present."""
        wanted = sorted(ids)
        await self.until(lambda: self.ids == wanted, patience_s)


class DiscoveryBasics:
    """The tests for every backend, also one whose instances are fixed. They take `pair`, as below.

    Attributes:
        patience_s: seconds to wait for an expected change; only a failure takes that long.
    """

    patience_s: ClassVar[float] = 20.0

    name: ClassVar[EndpointName] = EndpointName("room/é", "comp.onent", "generate")

    def instance(self, id: int, endpoint: EndpointName | None = None, **metadata: Any) -> Instance:
        """Make an instance like those that a runtime registers."""
        return Instance(endpoint or self.name, id, (f"tcp://127.0.0.1:{id % 60_000 + 1}",), "a-host", metadata)

    async def test_an_endpoint_without_instances(self, pair: Pair) -> None:
        for discovery in pair:
            log = ChangeLog()
            watch = await discovery.watch(EndpointName("no", "such", "endpoint"), log)
            assert log.changes == [Snapshot(())]
            watch.close()
            watch.close()

    async def test_a_sink_that_raises_ends_no_other_watch(self, pair: Pair) -> None:
        one, _ = pair

        def raises(change: Change) -> None:
            raise RuntimeError("a defect in a sink")

        log = ChangeLog()
        await one.watch(None, raises)
        await one.watch(None, log)
        assert [type(each) for each in log.changes] == [Snapshot]

    async def test_a_closed_one_says_so(self, pair: Pair) -> None:
        one, _ = pair
        await one.close()
        await one.close()
        for attempt in (one.register(self.instance(1)), one.watch(self.name, ChangeLog())):
            error = await _refusal(attempt)
            assert "closed" in str(error)
            assert error.where == one.where
        await one.withdraw(self.instance(1))


class FixedDiscoveryConformance(DiscoveryBasics):
    """The tests for a backend whose instances are fixed. Each takes `pair`: two open discoveries of one list.

    Attributes:
        listed: the list: at least two instances of `name`, and one of another endpoint.
    """

    listed: ClassVar[tuple[Instance, ...]]

    async def test_each_watch_gets_the_listed_instances_of_its_endpoint(self, pair: Pair) -> None:
        for discovery in pair:
            for name in (self.name, None, *{each.endpoint for each in self.listed}):
                log = ChangeLog()
                await discovery.watch(name, log)
                assert log.changes == [Snapshot(tuple(each for each in self.listed if name in (None, each.endpoint)))]

    async def test_no_worker_changes_the_list(self, pair: Pair) -> None:
        one, other = pair
        mine = next(each for each in self.listed if each.endpoint == self.name)
        log, later = ChangeLog(), ChangeLog()
        await other.watch(self.name, log)
        await one.register(mine)
        await one.register(self.instance(7))
        await one.withdraw(mine)
        await other.watch(self.name, later)
        await one.close()
        assert log.changes == later.changes
        assert mine in log.present.values()
        assert (self.name, 7) not in log.present


class DiscoveryConformance(DiscoveryBasics):
    """The tests for a backend in which workers register. `pair` is empty, and no other test uses its system."""

    async def test_what_is_registered_is_in_a_later_snapshot(self, pair: Pair) -> None:
        one, _ = pair
        instance = self.instance(7, gpu="a", nested={"list": [1, 2.5, None, True, "é"]})
        await one.register(instance)
        for discovery in pair:
            log = ChangeLog()
            await discovery.watch(self.name, log)
            assert log.changes == [Snapshot((instance,))]
            assert log.present[self.name, 7].metadata == instance.metadata

    async def test_what_is_registered_reaches_a_watch(self, pair: Pair) -> None:
        one, _ = pair
        logs = ChangeLog(), ChangeLog()
        for discovery, log in zip(pair, logs, strict=True):
            await discovery.watch(self.name, log)
            assert log.changes == [Snapshot(())]
        instance = self.instance(7, gpu="a")
        await one.register(instance)
        for log in logs:
            await log.until_ids([7], self.patience_s)
            assert log.changes[1:] == [Added(instance)]
            assert log.present[self.name, 7].metadata == {"gpu": "a"}

    async def test_the_snapshot_comes_before_watch_returns_and_before_all_changes(self, pair: Pair) -> None:
        one, other = pair
        logs: list[ChangeLog] = []

        async def registers() -> None:
            for id in range(1, 21):
                await one.register(self.instance(id))
                await asyncio.sleep(0)

        async def watches() -> None:
            for _ in range(20):
                log = ChangeLog()
                await other.watch(self.name, log)
                assert isinstance(log.changes[0], Snapshot)
                logs.append(log)
                await asyncio.sleep(0)

        await asyncio.gather(registers(), watches())
        for log in logs:
            await log.until_ids(range(1, 21), self.patience_s)
            assert [type(each) for each in log.changes[1:]] == [Added] * (20 - len(log.changes[0].instances))  # type: ignore[union-attr]

    async def test_what_is_withdrawn_goes(self, pair: Pair) -> None:
        one, other = pair
        log, own = ChangeLog(), ChangeLog()
        await other.watch(self.name, log)
        await one.watch(self.name, own)
        await one.register(self.instance(7))
        await one.register(self.instance(8))
        await log.until_ids([7, 8], self.patience_s)
        await one.withdraw(self.instance(7))
        for each in (log, own):
            await each.until_ids([8], self.patience_s)
            assert each.changes[-1] == Removed(self.name, 7)
        later = ChangeLog()
        await other.watch(self.name, later)
        assert later.ids == [8]

    async def test_it_can_come_back_under_the_same_id(self, pair: Pair) -> None:
        one, other = pair
        log = ChangeLog()
        await other.watch(self.name, log)
        for turn in range(3):
            await one.register(self.instance(7, turn=turn))
            await log.until_ids([7], self.patience_s)
            assert log.present[self.name, 7].metadata == {"turn": turn}
            await one.withdraw(self.instance(7))
            await log.until_ids([], self.patience_s)

    async def test_registering_again_replaces(self, pair: Pair) -> None:
        one, other = pair
        log = ChangeLog()
        await other.watch(self.name, log)
        await one.register(self.instance(7, version=1))
        await log.until_ids([7], self.patience_s)
        await one.register(self.instance(7, version=2))
        await log.until(lambda: log.present[self.name, 7].metadata == {"version": 2}, self.patience_s)
        assert log.ids == [7]
        await one.withdraw(self.instance(7))
        await log.until_ids([], self.patience_s)

    async def test_what_somebody_else_has_replaced_is_not_withdrawn(self, pair: Pair) -> None:
        one, other = pair
        log = ChangeLog()
        await one.watch(self.name, log)
        await one.register(self.instance(7, by="one"))
        await other.register(self.instance(7, by="other"))
        await log.until(lambda: log.present[self.name, 7].metadata == {"by": "other"}, self.patience_s)
        await one.withdraw(self.instance(7))
        later = ChangeLog()
        await other.watch(self.name, later)
        assert later.present[self.name, 7].metadata == {"by": "other"}

    async def test_the_callers_metadata_may_change_afterwards(self, pair: Pair) -> None:
        one, _ = pair
        metadata: dict[str, Any] = {"list": [1]}
        instance = Instance(self.name, 7, ("tcp://127.0.0.1:1",), "", metadata)
        await one.register(instance)
        metadata["list"].append(2)
        for discovery in pair:
            log = ChangeLog()
            await discovery.watch(self.name, log)
            assert log.present[self.name, 7].metadata == {"list": [1]}

    async def test_metadata_that_is_not_json_is_refused(self, pair: Pair) -> None:
        one, other = pair
        error = await _refusal(one.register(self.instance(7, value=object())))
        assert "metadata" in str(error)
        log = ChangeLog()
        await other.watch(self.name, log)
        assert log.ids == []

    async def test_only_the_endpoint_that_is_watched(self, pair: Pair) -> None:
        one, other = pair
        long = "é" * MAX_NAME_LENGTH
        names = [
            EndpointName("ns", "comp", "generate"),
            EndpointName("ns", "comp", "generate2"),
            EndpointName("ns", "comp", "Generate"),
            EndpointName("ns", "comp", "generate/x"),
            EndpointName("ns", "comp", "generate.x"),
            EndpointName("ns", "comp", "generate x"),
            EndpointName("ns", "comp.generate", "x"),
            EndpointName("ns.comp", "generate", "x"),
            EndpointName("ns/comp", "generate", "x"),
            EndpointName("ns", "comp", "../generate"),
            EndpointName("ns", "comp", "."),
            EndpointName("ns", "comp", "генерировать"),
            EndpointName("ns", "comp", "生成"),
            EndpointName("ns", "comp", "\N{PILE OF POO}"),
            EndpointName("ns", "comp", "e\N{COMBINING ACUTE ACCENT}"),
            EndpointName("ns", "comp", "é"),
            EndpointName(long, long, long),
            EndpointName(long, long, long[:-1] + "è"),
        ]
        logs = [ChangeLog() for _ in names]
        for name, log in zip(names, logs, strict=True):
            await other.watch(name, log)
        for id, name in enumerate(names, 1):
            await one.register(self.instance(id, name))
        for id, (name, log) in enumerate(zip(names, logs, strict=True), 1):
            await log.until_ids([id], self.patience_s)
            later = ChangeLog()
            await other.watch(name, later)
            assert later.changes == [Snapshot((self.instance(id, name),))]
        for id, name in enumerate(names, 1):
            await one.withdraw(self.instance(id, name))
            await logs[id - 1].until_ids([], self.patience_s)
        assert [len(log.changes) for log in logs] == [3] * len(names)

    async def test_every_endpoint(self, pair: Pair) -> None:
        one, other = pair
        names = [EndpointName("a", "b", "c"), EndpointName("a", "b", "d"), EndpointName("x/y", "z.z", "c")]
        await one.register(self.instance(1, names[0]))
        log = ChangeLog()
        await other.watch(None, log)
        assert log.present.keys() == {(names[0], 1)}
        await one.register(self.instance(1, names[1]))
        await other.register(self.instance(2, names[2]))
        await log.until(lambda: log.present.keys() == {(names[0], 1), (names[1], 1), (names[2], 2)}, self.patience_s)
        await one.withdraw(self.instance(1, names[0]))
        await log.until(lambda: log.present.keys() == {(names[1], 1), (names[2], 2)}, self.patience_s)

    async def test_one_endpoints_watch_does_not_end_with_anothers(self, pair: Pair) -> None:
        one, other = pair
        every, exact, twice = ChangeLog(), ChangeLog(), ChangeLog()
        watches = [await other.watch(name, log) for name, log in ((None, every), (self.name, exact))]
        last = await other.watch(self.name, twice)
        await one.register(self.instance(1))
        for log in (every, exact, twice):
            await log.until_ids([1], self.patience_s)
        for watch in watches:
            watch.close()
        await one.register(self.instance(2))
        await one.withdraw(self.instance(1))
        await twice.until_ids([2], self.patience_s)
        last.close()
        again = ChangeLog()
        await other.watch(self.name, again)
        assert again.ids == [2]

    async def test_a_closed_watch_gets_nothing_more(self, pair: Pair) -> None:
        one, other = pair
        closed, open_ = ChangeLog(), ChangeLog()
        watch = await other.watch(self.name, closed)
        await other.watch(self.name, open_)
        await one.register(self.instance(1))
        await closed.until_ids([1], self.patience_s)
        watch.close()
        watch.close()
        before = list(closed.changes)
        await one.register(self.instance(2))
        await one.withdraw(self.instance(1))
        await open_.until_ids([2], self.patience_s)
        assert closed.changes == before

    async def test_a_sink_may_close_watches(self, pair: Pair) -> None:
        one, other = pair
        log, after = ChangeLog(), ChangeLog()

        def sink(change: Change) -> None:
            log(change)
            if isinstance(change, Added):
                watch.close()

        watch = await other.watch(self.name, sink)
        await other.watch(self.name, after)
        await one.register(self.instance(1))
        await one.register(self.instance(2))
        await after.until_ids([1, 2], self.patience_s)
        assert len(log.changes) == 2

    async def test_ids_survive(self, pair: Pair) -> None:
        one, other = pair
        ids = [1, 2**31, 2**53 + 1, MAX_INSTANCE_ID - 1, MAX_INSTANCE_ID]
        early, late = ChangeLog(), ChangeLog()
        await other.watch(self.name, early)
        for id in ids:
            await one.register(self.instance(id))
        await early.until_ids(ids, self.patience_s)
        await other.watch(self.name, late)
        assert late.ids == ids

    async def test_many_at_once(self, pair: Pair) -> None:
        one, other = pair
        early, late = ChangeLog(), ChangeLog()
        await other.watch(self.name, early)
        ids = range(1, 201)
        await asyncio.gather(*(pair[id % 2].register(self.instance(id)) for id in ids))
        await early.until_ids(ids, self.patience_s)
        await one.watch(self.name, late)
        assert late.ids == list(ids)
        await asyncio.gather(*(pair[id % 2].withdraw(self.instance(id)) for id in ids))
        for log in (early, late):
            await log.until_ids([], self.patience_s)

    async def test_what_is_done_twice_is_done(self, pair: Pair) -> None:
        one, other = pair
        log = ChangeLog()
        await other.watch(self.name, log)
        await one.withdraw(self.instance(7))
        await one.register(self.instance(7))
        await one.register(self.instance(7))
        await log.until_ids([7], self.patience_s)
        await other.withdraw(self.instance(7))  # It has registered nothing, so this does nothing.
        await one.register(self.instance(8))
        await log.until_ids([7, 8], self.patience_s)
        await one.withdraw(self.instance(7))
        await one.withdraw(self.instance(7))
        await log.until_ids([8], self.patience_s)

    async def test_close_withdraws(self, pair: Pair) -> None:
        one, other = pair
        log, own = ChangeLog(), ChangeLog()
        await other.watch(self.name, log)
        await one.watch(self.name, own)
        for id in (1, 2, 3):
            await one.register(self.instance(id))
        await other.register(self.instance(4))
        await log.until_ids([1, 2, 3, 4], self.patience_s)
        await own.until_ids([1, 2, 3, 4], self.patience_s)
        before = list(own.changes)
        await one.close()
        await log.until_ids([4], self.patience_s)
        assert own.changes == before
        await one.close()
        await one.withdraw(self.instance(1))

    async def test_a_sink_that_raises_costs_nobody_else_a_change(self, pair: Pair) -> None:
        one, other = pair

        def raises(change: Change) -> None:
            raise RuntimeError("a defect in a sink")

        log = ChangeLog()
        await other.watch(self.name, raises)
        await other.watch(self.name, log)
        await one.register(self.instance(1))
        await log.until_ids([1], self.patience_s)


async def _refusal(attempt: Awaitable[object]) -> DiscoveryError:
    try:
        await attempt
    except DiscoveryError as error:
        return error
    raise AssertionError("the operation was not refused")

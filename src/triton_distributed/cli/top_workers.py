"""The workers as `trd top` sees them: what each one answered last, or why it does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import msgspec

from triton_distributed.cli.arguments import endpoint as read_name
from triton_distributed.cli.cluster import Cluster
from triton_distributed.discovery import Added, Change, Removed, Snapshot
from triton_distributed.names import INSPECT, Instance
from triton_distributed.runtime.rates import Counters, EndpointRates, WorkerRates, rates

GONE_S = 10.0
"""Seconds for which an instance is shown that discovery lists no longer: long enough to be noticed."""


class Row(NamedTuple):
    """One endpoint of one worker.

    Attributes:
        endpoint: its name, with dots.
        instance_id: the worker.
        state: `new` (not asked for long enough), `starting`, `serving`, `full` (it refuses requests), `paused`,
            `draining`; `unhealthy` (it serves, and a health check or canary has failed); `stuck` (it does not answer,
            and its watchdog reported a stuck event loop), `silent` (it does not answer in time), `unreachable`,
            `unreadable` (it runs another version), `not served` (the worker does not serve what discovery lists) or
            `gone` (discovery lists it no longer).
        reason: why there are no rates; empty if there are.
        rates: of the endpoint; None without an answer.
        worker: of the whole worker; None without an answer.
        problems: why it is not healthy, although it answers.
    """

    endpoint: str
    instance_id: int
    state: str
    reason: str
    rates: EndpointRates | None
    worker: WorkerRates | None
    problems: str = ""

    @property
    def well(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.reason and not self.problems and self.state != "full"


class _Worker:
    """One worker that discovery lists, or listed until lately."""

    def __init__(self) -> None:
        self.listed: dict[str, Instance] = {}  # By the endpoint's path.
        self.withdrawn: dict[str, tuple[Instance, float]] = {}  # What is listed no longer, and since when.
        self.asked: asyncio.Task[None] | None = None
        self.silent_since: float | None = None  # When the first question was asked that has no answer.
        self.answered_at = 0.0
        self.counters: Counters | None = None
        self.rates: WorkerRates | None = None
        self.state = self.reason = ""

    @property
    def busy(self) -> bool:
        return any(each.busy for each in self.listed.values())


class Workers:
    """Asks the workers again and again.

    Args:
        cluster: how they are asked.
        limit_s: seconds after which a worker that has not answered is shown as such. Its question stays open.
        changed: called after a change that the table should show at once: of discovery, or a late answer.
    """

    def __init__(self, cluster: Cluster, limit_s: float, changed: Callable[[], None]) -> None:
        self._cluster = cluster
        self._limit_s = limit_s
        self._changed = changed
        self._workers: dict[int, _Worker] = {}
        self._clock = asyncio.get_running_loop().time

    async def look(self) -> None:
        """Ask each worker that has no open question, and wait until all have answered or the limit is over."""
        now = self._clock()
        for worker in self._workers.values():
            worker.withdrawn = {path: each for path, each in worker.withdrawn.items() if now - each[1] < GONE_S}
        self._workers = {id: each for id, each in self._workers.items() if each.listed or each.withdrawn}
        for id, worker in self._workers.items():
            if worker.listed and (worker.asked is None or worker.asked.done()):
                worker.silent_since = worker.silent_since or now
                worker.asked = asyncio.create_task(self._ask(id, worker))
        if asked := [each.asked for each in self._workers.values() if each.asked is not None]:
            await asyncio.wait(asked, timeout=self._limit_s)

    async def _ask(self, id: int, worker: _Worker) -> None:
        (answer,) = await self._cluster.ask([id], "counters")
        if answer.timed_out:
            return
        if worker.silent_since is not None and self._clock() - worker.silent_since >= self._limit_s:
            self._changed()
        worker.silent_since = None
        worker.state = worker.reason = ""
        if answer.reason:
            worker.state, worker.reason = "unreachable", answer.reason
            worker.counters = worker.rates = None
            return
        try:
            self._learn(worker, msgspec.convert(answer.items[0], Counters))
        except (msgspec.ValidationError, IndexError) as error:
            worker.counters = worker.rates = None
            worker.state, worker.reason = "unreadable", f"its version of this package differs: {error}"

    def _learn(self, worker: _Worker, counters: Counters) -> None:
        now, before = self._clock(), worker.counters
        if before is not None and before.instance_id == counters.instance_id:
            worker.rates = rates(before, counters, max(now - worker.answered_at, 1e-3))
        else:
            worker.rates = None
        worker.counters, worker.answered_at = counters, now

    def rows(self) -> list[Row]:
        """The picture at this moment, in no order."""
        return [row for id, worker in self._workers.items() for row in self._rows(id, worker)]

    def _rows(self, id: int, worker: _Worker) -> Iterator[Row]:
        state, reason = self._trouble(worker)
        problems = "; ".join(worker.counters.problems) if worker.counters else ""
        found = {each.name: each for each in worker.counters.endpoints} if worker.counters else {}
        for path, instance in worker.listed.items():
            if instance.endpoint == INSPECT:  # Listed so that `trd` finds a worker that has paused another, or drains.
                continue
            name = str(instance.endpoint)
            if reason:
                yield Row(name, id, state, reason, None, None)
            elif worker.rates is None or path not in worker.rates.endpoints:
                lacks = bool(found) and path not in found
                words = "it does not serve what discovery lists" if lacks else ""
                yield Row(name, id, "not served" if lacks else "new", words, None, None)
            else:
                each, served = worker.rates.endpoints[path], found[path].state
                full = each.refused_per_s > 0 and served == "serving"
                served = "unhealthy" if problems and served == "serving" else served
                yield Row(name, id, "full" if full else served, "", each, worker.rates, problems)
        gone = {path: each for path, each in worker.withdrawn.items() if path != INSPECT.path}
        if worker.listed and not reason and worker.rates is not None:
            for path, endpoint in found.items():  # What is paused is not listed.
                if path in worker.listed or path not in worker.rates.endpoints:
                    continue
                if gone.pop(path, None) is not None or endpoint.state != "serving":
                    yield Row(str(read_name(path)), id, endpoint.state, "", worker.rates.endpoints[path], worker.rates)
        for instance, since in gone.values():
            words = f"discovery has not listed it for {self._clock() - since:.0f} s: it was stopped or killed"
            yield Row(str(instance.endpoint), id, "gone", words, None, None)

    def _trouble(self, worker: _Worker) -> tuple[str, str]:
        """What is wrong with a worker, as state and reason; both are empty if nothing is."""
        now = self._clock()
        if worker.silent_since is not None and now - worker.silent_since >= self._limit_s:
            silent = f"no answer for {now - worker.silent_since:.1f} s"
            if worker.busy:
                url = next((each.status_url for each in worker.listed.values() if each.status_url), "")
                return "stuck", f"{silent}: its event loop is stuck; its log has the line{url and f', as has {url}'}"
            return "silent", f"{silent}: its event loop may be stuck, or its process stopped"
        return worker.state, worker.reason

    def apply(self, change: Change) -> None:
        """Take a change of discovery."""
        if isinstance(change, Snapshot):
            listed = {(each.id, each.endpoint.path): each for each in change.instances}
            for id, worker in self._workers.items():
                for path in [path for path in worker.listed if (id, path) not in listed]:
                    self._removed(id, path)
            for each in change.instances:
                self._added(each)
        elif isinstance(change, Added):
            self._added(change.instance)
        else:
            assert isinstance(change, Removed)
            self._removed(change.instance_id, change.endpoint.path)
        self._changed()

    def _added(self, instance: Instance) -> None:
        worker = self._workers.setdefault(instance.id, _Worker())
        worker.listed[instance.endpoint.path] = instance
        worker.withdrawn.pop(instance.endpoint.path, None)

    def _removed(self, id: int, path: str) -> None:
        worker = self._workers.get(id)
        if worker is not None and (instance := worker.listed.pop(path, None)) is not None:
            worker.withdrawn[path] = instance, self._clock()

    async def close(self) -> None:
        """Give up the open questions."""
        asked = [each.asked for each in self._workers.values() if each.asked is not None]
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


@asynccontextmanager
async def workers(cluster: Cluster, limit_s: float, changed: Callable[[], None]) -> AsyncIterator[Workers]:
    """Follow the workers of a cluster; see `Workers`.

    Raises:
        DiscoveryError: discovery cannot be read.
    """
    found = Workers(cluster, limit_s, changed)
    watch = await cluster.runtime.discovery.watch(None, found.apply)
    try:
        yield found
    finally:
        watch.close()
        await found.close()

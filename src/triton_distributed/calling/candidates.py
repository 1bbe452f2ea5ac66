"""What one runtime knows about one endpoint: its instances, and which of them are candidates for a call."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Collection, Coroutine
from dataclasses import replace
from typing import Any

from triton_distributed.calling.ejection import Ejector
from triton_distributed.calling.load_watch import LoadWatch
from triton_distributed.compiled import caused
from triton_distributed.discovery import Added, Change, Removed, Snapshot, Watch
from triton_distributed.discovery.table import EndpointTable
from triton_distributed.errors import DiscoveryError, RuntimeClosed
from triton_distributed.names import EndpointName, Instance
from triton_distributed.routing.load import LoadBook
from triton_distributed.routing.rotation import Rotation
from triton_distributed.transport.session import Session

logger = logging.getLogger("triton_distributed.runtime")

SILENCE_S = 1.0  # Seconds of waiting for a first instance before the wait is logged.
ELSEWHERE_S = 5.0  # Seconds between searches for workers that have started in another folder.


class Candidates:
    """The instances of an endpoint, shared by every client of it in this runtime.

    Args:
        watch: begins to watch the endpoint; it passes each change to a function, the first one before it returns.
        on_removed: called with the addresses of an instance that discovery no longer reports.
        session: returns the live session to these addresses, or None.
        ejection_s: see `TRD_EJECTION_S`.

    Attributes:
        instances: those that a call may be sent to. They are the instances in rotation, or all instances if none is in
            rotation. Busy ones are left out unless all are busy. Ejected ones are left out, at most half. If discovery
            lists no instance, they are the formerly listed ones that still have a live connection.
        table: the instances that discovery reports.
        rotation: which instances cannot be reached, and when to try them again.
        ejector: which instances are left out because they fail far more often than others.
        load: the number of streams that this runtime has open on each instance, and the workers' reports.
    """

    def __init__(
        self,
        name: EndpointName,
        loop: asyncio.AbstractEventLoop,
        rng: random.Random,
        watch: Callable[[Callable[[Change], None]], Coroutine[Any, Any, Watch]],
        on_removed: Callable[[tuple[str, ...]], None] = lambda addresses: None,
        session: Callable[[tuple[str, ...]], Session | None] = lambda addresses: None,
        ejection_s: float = 0.0,
    ) -> None:
        self.name = name
        self.table = EndpointTable(name)
        self.rotation = Rotation(rng)
        self.ejector = Ejector(name, loop, rng, ejection_s, self._refresh)
        self.load = LoadBook(loop.time)
        self._load_watch = LoadWatch(name.key, loop, self.load, self.table, session)
        self.instances: tuple[Instance, ...] = ()
        self._loop = loop
        self._on_removed = on_removed
        self._session = session
        self._known: tuple[Instance, ...] = ()
        self._unlisted: tuple[Instance, ...] = ()  # Removed from the table, but still connected.
        self._begin_watch = watch
        self._watch: Watch | None = None
        self._opening: asyncio.Task[None] | None = None
        self._closed = False
        self._waiting: list[asyncio.Future[None]] = []  # At most one for each caller of `wait_for_instances`.
        self.table.listeners.append(self._changed)

    @property
    def is_open(self) -> bool:
        """Whether the endpoint is watched, so its present instances are known."""
        return self._watch is not None

    @property
    def is_empty(self) -> bool:
        """Whether no instance of the endpoint is registered, as far as is known."""
        return self._watch is not None and not self.table.instances

    async def open(self) -> None:
        """Watch the endpoint. Its present instances are known when this returns. It may be called repeatedly.

        Raises:
            DiscoveryError: the place of discovery cannot be read; the next call tries again.
            RuntimeClosed: the runtime was closed meanwhile.
        """
        if self._watch is not None:
            return
        if self._opening is None:
            self._opening = self._loop.create_task(self._open())
            self._opening.add_done_callback(self._opened)
        try:
            await asyncio.shield(self._opening)
        except asyncio.CancelledError:
            if self._closed:
                raise caused(RuntimeClosed("client"), None)
            raise

    async def _open(self) -> None:
        try:
            watch = await self._begin_watch(self.table.apply)
        except DiscoveryError:
            if self._closed:
                raise caused(RuntimeClosed("client"), None)
            raise
        if self._closed:
            watch.close()
            raise RuntimeClosed("client")
        self._watch = watch

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening = None
        if not task.cancelled():
            task.exception()  # Reading the exception prevents asyncio's warning if the last waiter was cancelled.

    def close(self) -> None:
        """Stop watching. Tasks that wait for an instance get RuntimeClosed."""
        self._closed = True
        if self._opening is not None:
            self._opening.cancel()
        if self._watch is not None:
            self._watch.close()
        self.ejector.close()
        self._load_watch.close()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(RuntimeClosed("wait_for_instances"))

    def _changed(self) -> None:
        self.rotation.forget(self.table.by_id.keys())
        self.ejector.outliers.forget(self.table.by_id.keys())
        known, self._known = self._known, self.table.instances
        # A worker that has lost etcd, but that is still connected, is unlisted and not gone: the connection is better
        # evidence than the record. A worker that stops sends GOAWAY.
        gone = tuple(each for each in known if each.id not in self.table.by_id)
        self._unlisted = () if self._known else gone + self._unlisted
        self._refresh()
        for each in known:
            if each.id not in self.table.by_id:
                self._load_watch.forget(each.id)
                self._on_removed(each.addresses)

    def _refresh(self) -> None:
        if self.table.instances:
            # Also instances that are out of rotation count as peers: a lost connection is a failure of one of them.
            self.ejector.changed(self.table.instances)
            self.instances = self.ejector.outliers.available(_free(self.rotation.available(self.table.instances)))
        else:
            self.ejector.changed(())
            self._unlisted = tuple(each for each in self._unlisted if self._session(each.addresses) is not None)
            self.instances = self._unlisted
        if self.instances:
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_result(None)

    def mark_down(self, addresses: tuple[str, ...]) -> float | None:
        """Note that the connection to these addresses was lost or could not be made.

        Returns:
            when to try again, on the loop's clock; None if no instance has these addresses.
        """
        found = None
        for instance in self.table.instances:
            if instance.addresses == addresses:
                self.rotation.mark_down(instance.id, self._loop.time())
                self._load_watch.forget(instance.id)
                found = self.rotation.next_probe(instance.id)
        if found is not None or self._unlisted:
            self._refresh()
        return found

    def has_others(self, ids: Collection[int]) -> bool:
        """Whether an instance other than these is in rotation."""
        down = self.rotation.down
        return any(each.id not in ids and each.id not in down for each in self.instances)

    def disowned(self, instance_id: int) -> None:
        """Note that the worker has answered that it does not have this instance."""
        if self._unlisted:
            self._unlisted = tuple(each for each in self._unlisted if each.id != instance_id)
            self._refresh()

    def mark_up(self, addresses: tuple[str, ...]) -> None:
        """Note that the worker at these addresses answers again."""
        for instance in self.table.instances:
            if instance.addresses == addresses:
                self.rotation.mark_up(instance.id)
        self._refresh()

    async def wait(self, where: str, elsewhere: Callable[[], str] | None = None, count: int = 1) -> None:
        """Wait until there are `count` instances; log the wait after a while.

        Args:
            where: the place of discovery, for the log.
            elsewhere: returns a text about other folders in which the endpoint is served; it is logged once.
        """
        words = '"%s": %s; waiting for a worker that serves it to register in %s%s'
        timer = self._loop.call_later(SILENCE_S, lambda: say(False))

        def say(again: bool) -> None:
            nonlocal timer
            found = len(self.table.instances)
            others = "" if elsewhere is None or found else elsewhere()
            if others or not again:
                so_far = f"{found} of {count} instances yet" if found else "no instance yet"
                logger.warning(words, self.name, so_far, where, others)
            if elsewhere is not None and not others:
                timer = self._loop.call_later(ELSEWHERE_S, say, True)

        try:
            await self._at_least(count)
        finally:
            timer.cancel()

    async def _at_least(self, count: int) -> None:
        while len(self.table.instances) < count:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)


def _free(instances: tuple[Instance, ...]) -> tuple[Instance, ...]:
    """The instances whose event loops are not stuck, or all if all are stuck: waiting is better than failing."""
    free = tuple(each for each in instances if not each.busy)
    return free if free and len(free) < len(instances) else instances


def dialable(change: Change, host: str) -> Change:
    """The change without addresses that cannot be dialled from this host."""
    if isinstance(change, Removed):
        return change
    if isinstance(change, Added):
        return Added(_local(change.instance, host))
    return Snapshot(tuple(_local(each, host) for each in change.instances))


def _local(instance: Instance, host: str) -> Instance:
    if not instance.host or instance.host == host:
        return instance
    return replace(instance, addresses=tuple(each for each in instance.addresses if not each.startswith("unix:")))

"""Follows one worker: reads its stream `watch`, and keeps what the router knows of it."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Final, Protocol

from triton_distributed.api.connection import Connection
from triton_distributed.api.contracts import Stream
from triton_distributed.calling.candidates import Candidates
from triton_distributed.errors import RuntimeClosed
from triton_distributed.llm.contract.watching import WatchRequest, WatchUpdate, keys_of
from triton_distributed.llm.routing.bookings import Booking
from triton_distributed.llm.routing.router import Router
from triton_distributed.routing.policies import Direct

logger = logging.getLogger("triton_distributed.llm")

RETRY_S: Final = (0.05, 5.0)
"""Seconds until a stream that has ended is opened again: the first wait and the longest one. They double."""

PATIENCE: Final = 3
"""Failures in a row after which what was known of the worker's cache counts no more."""

PACED_KEYS: Final = 512
"""Keys that are applied at once: they take less than 0.2 ms. The update with the next one waits for its turn."""


class Pace:
    """Lets the feeds of a router apply large updates in turn, one in each turn of the loop."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> None:
        await self._lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        try:
            await asyncio.sleep(0)
        finally:
            self._lock.release()


class Followed(Protocol):
    """What a feed needs of its router."""

    id: int
    core: Router
    block_tokens: int

    def ranks(self, instance_id: int, count: int) -> None:
        """Note how many ranks an instance has."""

    def changed(self) -> None:
        """Note that held requests may leave."""

    def lost(self) -> None:
        """Note that a stream has ended: perhaps the worker is gone."""

    def learned(self) -> None:
        """Note that the cache of a worker is known."""

    def tidy(self) -> None:
        """Note that the index has entries to remove."""


class Feed:
    """What one worker tells.

    Args:
        connection: calls the worker.
        endpoint: `watch` of the model.
        candidates: the instances of that endpoint.
        instance_id: the worker.
        router: learns.
        pace: shared by the feeds of the router.

    Attributes:
        whole: the stream is open, and the snapshot complete.
    """

    def __init__(
        self,
        connection: Connection,
        endpoint: Stream[WatchRequest, WatchUpdate],
        candidates: Candidates,
        instance_id: int,
        router: Followed,
        pace: Pace,
    ) -> None:
        self.whole = False
        self._connection, self._endpoint, self._candidates = connection, endpoint, candidates
        self._instance_id, self._router, self._pace = instance_id, router, pace
        self._loop = asyncio.get_running_loop()
        self._bookings: dict[int, Booking] = {}  # Requests of other routers, by the worker's numbers.
        self._failures = self._unpaced = 0
        self._reason = ""

    async def run(self) -> None:
        """Follow until the task is cancelled."""
        policy = Direct(self._instance_id, self._endpoint.name.path, lambda: self._candidates.table.by_id)
        asked = WatchRequest(router=self._router.id)
        try:
            while True:
                try:
                    reason = "it is not listed"
                    if self._instance_id in self._candidates.table.by_id:
                        async for update in self._connection.stream(self._endpoint, asked, policy=policy):
                            await self._take(update)
                        reason = "the stream has ended"
                except RuntimeClosed:
                    return
                except Exception as error:  # A worker of another version may send anything.
                    reason = str(error) or type(error).__name__
                self._lost(reason)
                await asyncio.sleep(min(RETRY_S[1], RETRY_S[0] * 2**self._failures) * random.uniform(0.5, 1.0))
        finally:
            self._release()

    async def _take(self, update: WatchUpdate) -> None:
        self._unpaced += sum(len(each.keys) for each in update.blocks) // 8
        if self._unpaced > PACED_KEYS:
            self._unpaced = 0
            async with self._pace:
                self._apply(update)
        else:
            self._apply(update)

    def _apply(self, update: WatchUpdate) -> None:
        router, id = self._router, self._instance_id
        core = router.core
        router.ranks(id, update.ranks)
        if update.begins:
            self._release()
            for rank in range(update.ranks):
                core.index.clear((id, rank))
            router.tidy()
        usable = update.block_tokens == router.block_tokens
        if not usable and update.begins:
            logger.warning(
                "instance %d has blocks of %d tokens, and this router of %d: it is routed by load only",
                id, update.block_tokens, router.block_tokens,
            )  # fmt: skip
        for rank in range(update.ranks):
            known = core.workers.get((id, rank))
            if known is not None:
                known.mode = update.mode if usable else "off"
                known.silent, known.kv_used = update.silent, update.kv_used
        if usable:
            for each in update.blocks:
                worker = (id, each.rank)
                if worker not in core.workers:
                    continue
                if each.change == "stored":
                    core.index.store(worker, keys_of(each.keys))
                elif each.change == "removed":
                    core.index.discard(worker, keys_of(each.keys))
                else:
                    core.index.clear(worker)
                    router.tidy()
        if update.begun or update.computed or update.ended:
            self._requests(update, usable)
        if not update.more and not self.whole:
            self.whole, self._failures, self._reason = True, 0, ""
            router.learned()
        router.changed()

    def _requests(self, update: WatchUpdate, usable: bool) -> None:
        """Keep the bookings of the requests of other routers."""
        core, now = self._router.core, self._loop.time()
        for each in update.begun:
            worker = (self._instance_id, each.rank)
            if worker not in core.workers:
                worker = (self._instance_id, 0)
                if worker not in core.workers:
                    continue
            if each.computed:
                self._bookings[each.number] = core.book_computed(worker, each.tokens, now)
                continue
            keys = keys_of(each.keys) if usable else ()
            depth = core.index.depths(keys).get(worker, 0) if keys else 0
            cached = min(depth * self._router.block_tokens, each.tokens - 1)
            booking = core.book_reported(worker, each.tokens, cached, now - each.age_s, keys)
            self._bookings[each.number] = booking
        for done in update.computed:
            if (known := self._bookings.get(done.number)) is not None:
                core.first_output(known, now, None if done.cached_tokens < 0 else done.cached_tokens)
        for number in update.ended:
            if (known := self._bookings.pop(number, None)) is not None:
                known.release()

    def _lost(self, reason: str) -> None:
        """The stream has ended. The requests of others are not known any more, and the cache only for a while."""
        self.whole = False
        self._release()
        self._failures = min(self._failures + 1, 10)
        core = self._router.core
        if self._failures >= PATIENCE:
            for worker, known in core.workers.items():
                if worker[0] == self._instance_id and known.mode != "off":
                    known.mode = "off"
                    core.index.clear(worker)
                    self._router.tidy()
        if reason != self._reason:
            self._reason = reason
            logger.info("instance %d is not followed now: %s", self._instance_id, reason)
        self._router.lost()

    def _release(self) -> None:
        for each in self._bookings.values():
            each.release()
        self._bookings.clear()

    def __repr__(self) -> str:
        state = "follows" if self.whole else f"not yet: {self._reason}" if self._reason else "begins"
        return f"<Feed of instance {self._instance_id}: {state}>"

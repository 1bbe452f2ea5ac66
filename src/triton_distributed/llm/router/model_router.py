"""`ModelRouter`: gives each request of one model its worker."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import secrets
from threading import get_ident
from typing import Final

import msgspec

from triton_distributed.api.connection import Connection
from triton_distributed.api.contracts import Stream
from triton_distributed.calling.candidates import Candidates
from triton_distributed.errors import DiscoveryError, Overloaded, RuntimeClosed
from triton_distributed.llm.contract.records import GENERATE, WATCH, role_of
from triton_distributed.llm.contract.watching import WatchRequest, WatchUpdate
from triton_distributed.llm.router.feed import RETRY_S, Feed, Pace
from triton_distributed.llm.router.placement import Placement
from triton_distributed.llm.routing.bookings import Booking
from triton_distributed.llm.routing.router import Router
from triton_distributed.llm.routing.view import Decision, Mode, PolicyFailed, Question, Worker
from triton_distributed.names import EndpointName, Instance

logger = logging.getLogger("triton_distributed.llm")

MAX_HELD: Final = 4096
"""Requests that the router holds at most. A prompt of 12,000 tokens has 48 KB, so they take up to some 200 MB."""

LOOK_S: Final = 0.25
"""Seconds after which held requests are looked at again although nothing has happened: a worker that stalls, and one
that can be reached again, tell nothing."""

SWEEP_S: Final = 0.005
"""Seconds between two parts of the index that are swept. A part takes about 1 ms for a million keys."""


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """What a router knows of a worker.

    Attributes:
        instance_id, rank: the worker.
        mode: how its cache is known.
        silent: its engine should report its cache's blocks, and has not.
        watched: the worker reports to this router now.
        wait_s: seconds of prefill that are booked there.
        waiting, running: requests there without a first output, and with one.
        kv_used: the part of its KV cache that requests hold, from 0 to 1.
    """

    instance_id: int
    rank: int
    mode: Mode
    silent: bool
    watched: bool
    wait_s: float
    waiting: int
    running: int
    kv_used: float


class ModelRouter:
    """Chooses and books the workers of one model.

    Args:
        connection: calls the workers.
        component: the model's endpoints, as `namespace.component`.
        core: the index, the bookings and the policy.
        block_tokens: tokens in a block of the index; see `indexed_tokens`.
        endpoint: the one that the requests are for.

    Attributes:
        id: names this router in the requests that it places.
        core: the index, the bookings and the policy.
        takers: the instances that can go on with a prompt that another worker has computed.
    """

    def __init__(
        self,
        connection: Connection,
        component: tuple[str, str],
        core: Router,
        *,
        block_tokens: int = 64,
        endpoint: str = GENERATE,
    ) -> None:
        self.id = secrets.randbits(63) | 1
        self.core, self.block_tokens = core, block_tokens
        self._connection, self._loop, self._thread = connection, asyncio.get_running_loop(), get_ident()
        self._candidates: Candidates = connection.runtime.candidates(EndpointName(*component, endpoint))
        self._watch = Stream[WatchRequest, WatchUpdate](".".join((*component, WATCH)))
        self._watchable: Candidates = connection.runtime.candidates(self._watch.name)
        for each in (self._candidates, self._watchable):
            each.table.listeners.append(self._listed)
        self._feeds: dict[int, tuple[Feed, asyncio.Task[None]]] = {}  # By instance.
        self._ending: set[asyncio.Task[None]] = set()
        self._pace = Pace()
        self._learned = asyncio.Event()  # Another one after each use.
        self._sweep: asyncio.TimerHandle | None = None
        self.takers: set[int] = set()
        self._known: dict[int, int] = {}  # Instances, and how many ranks each has.
        self._ready: tuple[Instance, ...] = ()
        self._among: tuple[Worker, ...] = ()  # The workers of `_ready`.
        self._held: dict[Question, Placement] = {}
        self._look: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._listed()
        # An empty context: if a handler makes this router, the router's calls must not end with the handler's request.
        self._opening = self._loop.create_task(self._open(), name="router opens", context=contextvars.Context())

    async def close(self) -> None:
        """End everything that this router has begun. Held requests get `CancelledError`."""
        if self._closed:
            return
        self._closed = True
        for each in (self._candidates, self._watchable):
            each.table.listeners.remove(self._listed)
        for handle in (self._look, self._timer, self._sweep):
            if handle is not None:
                handle.cancel()
        for placement in [*self._held.values()]:
            placement.release()
        tasks = [self._opening, *self._ending, *(task for _, task in self._feeds.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Places.

    async def place(self, question: Question) -> Placement:
        """Choose a worker for a request and book it, perhaps after the request was held for some time.

        Args:
            question: the request. `since` is set.

        Returns:
            The placement. Without any worker it has no booking, and the policy chooses when the call has found one.

        Raises:
            Overloaded: `MAX_HELD` requests are held already.
            PolicyFailed: a user's policy cannot decide.
            DiscoveryError: discovery cannot be read.
        """
        candidates = self._candidates
        if not candidates.is_open:
            await candidates.open()
            self._listed()
        placement = self.submit(question)
        if placement.waiter is not None:
            try:
                await placement.waiter
            except BaseException:
                placement.release()
                raise
        return placement

    @property
    def empty(self) -> bool:
        """Whether there is no worker now."""
        return not self._known

    def submit(self, question: Question, placement: Placement | None = None) -> Placement:
        """Choose a worker for a request and book it, or hold the request.

        Args:
            question: the request. `since` is set.
            placement: the request's, if it was held before for another reason; None for a new one.

        Returns:
            The placement. If it has a `waiter`, the request is held, or a user's policy has failed, which the waiter
            raises. Without any worker it has neither that nor a booking.

        Raises:
            Overloaded: `MAX_HELD` requests are held already.
        """
        core, now = self.core, self._loop.time()
        question.since = now
        among = self._among if self._candidates.instances is self._ready else self._workers()
        if self._closed or not among:
            if placement is None:
                return Placement(self, question)
            placement.leave()
            return placement
        try:
            placed = core.place(question, now, among)
        except PolicyFailed as error:
            placement = placement or Placement(self, question)
            placement.failed(error)
            return placement
        if placed is not None:
            if placement is None:
                return Placement(self, question, *placed)
            placement.booked(*placed)
            return placement
        placement = placement or Placement(self, question)
        if core.held >= MAX_HELD:
            path = self._candidates.name.path
            raise Overloaded(path, self._ready[0].id, f"{core.held} requests wait for a worker", 1, 1.0)
        self._held[question] = placement
        core.hold(question)
        if core.held == 1:
            self._give()
        else:
            self.changed()
        if placement.booking is None and placement.waiter is None:
            placement.waiter = self._loop.create_future()
        return placement

    def explain(self, question: Question) -> Decision | None:
        """What would be chosen now, and why. Nothing is booked. None if there is no worker."""
        question.since = self._loop.time()
        return self.core.weigh(question, question.since, self._workers())

    async def until_whole(self, timeout_s: float) -> None:
        """Wait until the caches of all workers are known that report them, or until the time is over.

        Args:
            timeout_s: seconds.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.wait([self._opening])
                while not all(feed.whole for feed, _ in self._feeds.values()):
                    await self._learned.wait()

    def states(self) -> list[WorkerState]:
        """What is known of each worker, ordered by instance and rank."""
        found = []
        for (instance_id, rank), known in sorted(self.core.workers.items()):
            work = known.work
            feed = self._feeds[instance_id][0] if instance_id in self._feeds else None
            found.append(
                WorkerState(
                    instance_id=instance_id,
                    rank=rank,
                    mode=known.mode,
                    silent=known.silent,
                    watched=feed is not None and feed.whole,
                    wait_s=work.wait_s,
                    waiting=len(work.waiting),
                    running=work.running,
                    kv_used=known.kv_used,
                )
            )
        return found

    # What placements and feeds call.

    def book_among(
        self, question: Question, instances: tuple[Instance, ...], rank: int, computed: bool = False
    ) -> tuple[Decision, Booking] | None:
        """Choose one of the instances now, and book it; None if this router knows none of them.

        Args:
            question: the request.
            instances: those that may be chosen.
            rank: of the worker, as far as an instance has it.
            computed: another worker has computed the prompt. One of `takers` is chosen, if there is one, and is booked
                for the rest.
        """
        known = self._known
        if computed:
            takers = tuple(each for each in instances if each.id in self.takers)
            computed, instances = bool(takers), takers or instances
        among = tuple((each.id, rank if rank < known[each.id] else 0) for each in instances if each.id in known)
        now = self._loop.time()
        decision = self.core.weigh(question, now, among)
        if decision is None:
            return None
        if computed:
            return decision, self.core.book_computed(decision.chosen.worker, question.tokens, now)
        return decision, self.core.book(question, decision, now)

    def book_computed(self, worker: Worker, tokens: int) -> Booking:
        """Book a worker for the rest of a request whose prompt another one has computed."""
        return self.core.book_computed(worker, tokens, self._loop.time())

    def withdraw(self, question: Question) -> None:
        """Hold a request no longer. Nothing happens if it is not held."""
        if self._held.pop(question, None) is not None:
            self.core.withdraw(question)

    def computed(self, booking: Booking, cached_tokens: int | None) -> None:
        """Note a first output."""
        self.core.first_output(booking, self._loop.time(), cached_tokens)
        if self._held:
            self.changed()

    def released(self, booking: Booking) -> None:
        """Release a booking."""
        booking.release()
        if self._held:
            self.changed()

    def dropped(self, booking: Booking) -> None:
        """Release a booking; the garbage collector may call this in any thread."""
        if get_ident() == self._thread:
            self.released(booking)
        else:
            with contextlib.suppress(RuntimeError):  # The loop is closed.
                self._loop.call_soon_threadsafe(self.released, booking)

    def ranks(self, instance_id: int, count: int) -> None:
        """Note how many ranks an instance has."""
        before = self._known.get(instance_id)
        if before is None or before == count:
            return
        self._known[instance_id] = count
        instance = self.core.workers[instance_id, 0].instance
        for rank in range(before, count):
            self.core.add((instance_id, rank), instance)
        for rank in range(count, before):
            self.core.remove((instance_id, rank))
        self._ready = ()
        self._listed()

    def changed(self) -> None:
        """Look at the held requests, once in this turn of the loop."""
        if self._held and self._look is None and not self._closed:
            self._look = self._loop.call_soon(self._give)

    def learned(self) -> None:
        """Note that the cache of a worker is known."""
        self._learned.set()
        self._learned = asyncio.Event()

    def lost(self) -> None:
        """Note that a stream from a worker has ended: perhaps the worker is gone."""
        if not self._closed:
            self._listed()

    def tidy(self) -> None:
        """Free the memory of what workers held that are gone, or that begin anew."""
        if self._sweep is None and not self._closed:
            self._sweep = self._loop.call_later(SWEEP_S, self._sweep_on)

    def _sweep_on(self) -> None:
        self._sweep = self._loop.call_later(SWEEP_S, self._sweep_on) if self.core.index.sweep() else None

    # Held requests.

    def _give(self) -> None:
        """Give their places to the held requests whose workers have room."""
        if self._look is not None:
            self._look.cancel()
            self._look = None
        core, now = self.core, self._loop.time()
        among = self._workers()
        while True:
            try:
                found = core.leaving(now, among)
            except PolicyFailed as error:
                self._held.pop(error.question).failed(error)
                continue
            if found is None:
                break
            question, decision = found
            self._held.pop(question).booked(decision, core.book(question, decision, now))
        if self._held and self._timer is None:
            self._timer = self._loop.call_later(LOOK_S, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self.changed()

    # Instances.

    def _workers(self) -> tuple[Worker, ...]:
        """The workers to which a request may be sent now."""
        if self._candidates.instances is not self._ready:
            self._listed()
        return self._among

    def _listed(self) -> None:
        """Follow the instances that discovery lists, and those that it does not list now and that are connected."""
        self._ready = ready = self._candidates.instances
        known = self._known
        present = {each.id: each for each in (*ready, *self._candidates.table.instances)}
        for id in [each for each in known if each not in present]:
            self.takers.discard(id)
            for rank in range(known.pop(id)):
                self.core.remove((id, rank))
            if id in self._feeds:
                _, task = self._feeds.pop(id)
                self._ending.add(task)
                task.add_done_callback(self._ending.discard)
                task.cancel()
            self.tidy()
        for id, instance in present.items():
            if id not in known:
                self._add(instance)
        for id in self._watchable.table.by_id:
            if id in known and id not in self._feeds and not self._closed:
                feed = Feed(self._connection, self._watch, self._watchable, id, self, self._pace)
                name = f"router follows {id}"
                self._feeds[id] = feed, self._loop.create_task(feed.run(), name=name, context=contextvars.Context())
        self._among = tuple((each.id, rank) for each in ready for rank in range(known[each.id]))
        self.changed()

    async def _open(self) -> None:
        """Begin to follow discovery."""
        wait_s = RETRY_S[0]
        while True:
            try:
                await self._candidates.open()
                await self._watchable.open()
            except RuntimeClosed:
                return
            except DiscoveryError as error:
                logger.warning("the workers of %s cannot be found now: %s", self._candidates.name, error)
                await asyncio.sleep(wait_s)
                wait_s = min(RETRY_S[1], 2 * wait_s)
            else:
                self._listed()
                return

    def _add(self, instance: Instance) -> None:
        self._known[instance.id] = 1
        if role_of(instance) == "decode":
            self.takers.add(instance.id)
        self.core.add((instance.id, 0), instance)

    def __repr__(self) -> str:
        return f"<ModelRouter of {self._candidates.name}, {len(self._known)} workers, {self.core.held} requests held>"

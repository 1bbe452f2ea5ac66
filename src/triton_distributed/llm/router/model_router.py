"""`ModelRouter`: gives each request of one model its worker."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Final

import msgspec

from triton_distributed.api.connection import Connection
from triton_distributed.calling.candidates import Candidates
from triton_distributed.errors import Overloaded
from triton_distributed.llm.router.placement import Placement
from triton_distributed.llm.routing.bookings import Booking
from triton_distributed.llm.routing.router import Router
from triton_distributed.llm.routing.view import Decision, Mode, Question, RoutingPolicy, Worker
from triton_distributed.names import EndpointName, Instance

logger = logging.getLogger("triton_distributed.llm")

MAX_HELD: Final = 4096
"""Requests that the router holds at most. A prompt of 12,000 tokens has 48 KB, so they take up to some 200 MB."""

LOOK_S: Final = 0.25
"""Seconds after which held requests are looked at again although nothing has happened: a worker that stalls, and one
that can be reached again, tell nothing."""


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
        policy: chooses among candidates.
        name: the policy's name.
        block_tokens: tokens in a block of the index; see `indexed_tokens`.
        core: the index, the bookings and the policy; by default new ones with `policy`.

    Attributes:
        id: names this router in the requests that it places.
        core: the index, the bookings and the policy.
    """

    def __init__(
        self,
        connection: Connection,
        component: tuple[str, str],
        policy: RoutingPolicy,
        name: str,
        *,
        block_tokens: int = 64,
        core: Router | None = None,
    ) -> None:
        self.id = secrets.randbits(63) | 1
        self.core = Router(policy, name) if core is None else core
        self.block_tokens = block_tokens
        self._loop = asyncio.get_running_loop()
        self._candidates: Candidates = connection.runtime.candidates(EndpointName(*component, "generate"))
        self._candidates.table.listeners.append(self._listed)
        self._known: dict[int, int] = {}  # Instances, and how many ranks each has.
        self._ready: tuple[Instance, ...] = ()
        self._among: tuple[Worker, ...] = ()  # The workers of `_ready`.
        self._held: dict[Question, Placement] = {}
        self._look: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._listed()

    async def close(self) -> None:
        """End everything that this router has begun. Held requests get `CancelledError`."""
        self._closed = True
        self._candidates.table.listeners.remove(self._listed)
        for handle in (self._look, self._timer):
            if handle is not None:
                handle.cancel()
        for placement in [*self._held.values()]:
            placement.release()

    # Places.

    async def place(self, question: Question) -> Placement:
        """Choose a worker for a request and book it, perhaps after the request was held for some time.

        Args:
            question: the request. `since` is set.

        Returns:
            The placement. Without any worker it has no booking, and the policy chooses when the call has found one.

        Raises:
            Overloaded: `MAX_HELD` requests are held already.
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

    def submit(self, question: Question) -> Placement:
        """Choose a worker for a request and book it, or hold the request.

        Args:
            question: the request. `since` is set.

        Returns:
            The placement. If it has a `waiter`, the request is held. Without any worker it has neither that nor a
            booking.

        Raises:
            Overloaded: `MAX_HELD` requests are held already.
        """
        placement = Placement(self, question)
        core = self.core
        question.since = self._loop.time()
        if self._closed or not self._workers():
            return placement
        if core.held >= MAX_HELD:
            path = self._candidates.name.path
            raise Overloaded(path, self._ready[0].id, f"{core.held} requests wait for a worker", 1, 1.0)
        self._held[question] = placement
        core.hold(question)
        if core.held == 1:
            self._give()
        else:
            self._changed()
        if placement.booking is None:
            placement.waiter = self._loop.create_future()
        return placement

    def explain(self, question: Question) -> Decision | None:
        """What would be chosen now, and why. Nothing is booked. None if there is no worker."""
        question.since = self._loop.time()
        return self.core.weigh(question, question.since, self._workers())

    def states(self) -> list[WorkerState]:
        """What is known of each worker, ordered by instance and rank."""
        found = []
        for (instance_id, rank), known in sorted(self.core.workers.items()):
            work = known.work
            found.append(
                WorkerState(
                    instance_id=instance_id,
                    rank=rank,
                    mode=known.mode,
                    silent=False,
                    watched=False,
                    wait_s=work.wait_s,
                    waiting=len(work.waiting),
                    running=work.running,
                    kv_used=known.kv_used,
                )
            )
        return found

    # What placements call.

    def book_among(
        self, question: Question, instances: tuple[Instance, ...], rank: int
    ) -> tuple[Decision, Booking] | None:
        """Choose one of the instances now, and book it; None if this router knows none of them.

        Args:
            question: the request.
            instances: those that may be chosen.
            rank: of the worker, as far as an instance has it.
        """
        known = self._known
        among = tuple((each.id, rank if rank < known[each.id] else 0) for each in instances if each.id in known)
        now = self._loop.time()
        decision = self.core.weigh(question, now, among)
        return None if decision is None else (decision, self.core.book(question, decision, now))

    def withdraw(self, question: Question) -> None:
        """Hold a request no longer. Nothing happens if it is not held."""
        if self._held.pop(question, None) is not None:
            self.core.withdraw(question)

    def computed(self, booking: Booking, cached_tokens: int | None) -> None:
        """Note a first output."""
        self.core.first_output(booking, self._loop.time(), cached_tokens)
        self._changed()

    def released(self, booking: Booking) -> None:
        """Release a booking."""
        booking.release()
        self._changed()

    # Held requests.

    def _changed(self) -> None:
        """Look at the held requests, once in this turn of the loop."""
        if self._held and self._look is None and not self._closed:
            self._look = self._loop.call_soon(self._give)

    def _give(self) -> None:
        """Give their places to the held requests whose workers have room."""
        if self._look is not None:
            self._look.cancel()
            self._look = None
        core, now = self.core, self._loop.time()
        among = self._workers()
        while (found := core.leaving(now, among)) is not None:
            question, decision = found
            self._held.pop(question).booked(decision, core.book(question, decision, now))
        if self._held and self._timer is None:
            self._timer = self._loop.call_later(LOOK_S, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._changed()

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
            for rank in range(known.pop(id)):
                self.core.remove((id, rank))
        for id, instance in present.items():
            if id not in known:
                self._add(instance)
        self._among = tuple((each.id, rank) for each in ready for rank in range(known[each.id]))
        self._changed()

    def _add(self, instance: Instance) -> None:
        self._known[instance.id] = 1
        self.core.add((instance.id, 0), instance)

    def __repr__(self) -> str:
        return f"<ModelRouter of {self._candidates.name}, {len(self._known)} workers, {self.core.held} requests held>"

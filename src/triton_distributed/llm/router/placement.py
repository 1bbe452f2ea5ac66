"""The place of one request: the worker that was chosen and booked, and after a failed attempt the next one."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from triton_distributed.llm.routing.bookings import Booking
from triton_distributed.llm.routing.view import Decision, Question
from triton_distributed.names import Instance
from triton_distributed.routing.load import LoadBook


class Handover(Protocol):
    """What a placement needs of the hand-over of a computed prompt."""

    cached_tokens: int | None

    def first_output(self) -> None:
        """Note the first output of the worker that has got the prompt."""

    def unused(self) -> None:
        """Note that the request goes on without the computed prompt, or without its worker, and end it."""

    def end(self) -> None:
        """Cancel what the prefill worker still does for the request; any thread may call this."""


class Placer(Protocol):
    """What a placement needs of its router."""

    def book_among(
        self, question: Question, instances: tuple[Instance, ...], rank: int, computed: bool
    ) -> tuple[Decision, Booking] | None:
        """Choose one of the instances now, and book it; see `ModelRouter.book_among`."""

    def withdraw(self, question: Question) -> None:
        """Hold a request no longer. Nothing happens if it is not held."""

    def computed(self, booking: Booking, cached_tokens: int | None) -> None:
        """Note a first output."""

    def released(self, booking: Booking) -> None:
        """Release a booking."""

    def dropped(self, booking: Booking) -> None:
        """Release a booking; the garbage collector may call this in any thread."""


class Placement:
    """Where one request goes. `ModelRouter` makes it.

    It is the policy of the request's call: its first use returns the booked instance. A later use comes after that one
    has refused the request or could not be reached, and then another one is chosen and booked. Tell `first_output`, and
    `release` at the end of the answer, whatever way it ends.

    Attributes:
        question: the request.
        decision: which worker was chosen, and why; None while the router knows no worker.
        booking: what is booked there; None before a choice and after the release.
        rank: the data-parallel rank that the request is for. It is sent with the request, so it stays.
        waiter: done when the router does not hold the request any more, and cancelled if it was released or the router
            was closed meanwhile; None if it was not held.
        handover: of a prompt that another worker computes; the request is held meanwhile. None for no such prompt.
        kv_transfer: where the prompt's blocks are, for the chosen worker; None if that computes the prompt.
    """

    trusted = True  # See `policy_named`.

    __slots__ = (
        "__weakref__", "_over", "_router", "_sent", "booking", "decision", "handover", "kv_transfer", "question",
        "rank", "waiter",
    )  # fmt: skip

    def __init__(
        self, router: Placer, question: Question, decision: Decision | None = None, booking: Booking | None = None
    ) -> None:
        self._router = router
        self.question, self.decision, self.booking = question, decision, booking
        self.rank = 0 if decision is None else decision.chosen.worker[1]
        self.waiter: asyncio.Future[None] | None = None
        self.handover: Handover | None = None
        self.kv_transfer: dict[str, Any] | None = None
        self._sent = self._over = False

    @property
    def instance_id(self) -> int | None:
        """The instance that was chosen last; None if there is no choice yet."""
        return None if self.decision is None else self.decision.chosen.worker[0]

    @property
    def over(self) -> bool:
        """Whether the answer has ended, or nothing waits for it any more."""
        return self._over

    def booked(self, decision: Decision, booking: Booking) -> None:
        """Note the choice. The router calls this."""
        self.decision, self.booking = decision, booking
        self.rank = decision.chosen.worker[1]
        self.leave()

    def leave(self) -> None:
        """Hold the request no longer. The router calls this."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def failed(self, error: Exception) -> None:
        """Note that there is no choice. The router calls this."""
        if self.waiter is None:
            self.waiter = asyncio.get_running_loop().create_future()
        if not self.waiter.done():
            self.waiter.set_exception(error)

    def again(self, question: Question | None = None) -> None:
        """Let the next call choose anew, since the worker was lost or has stalled. Nothing stays booked.

        Args:
            question: the rest of the request, as it is sent then; None if it is the same.
        """
        if question is not None:
            self.question = question
        self._free()
        self._sent = True
        self._without_transfer()

    def first_output(self, cached_tokens: int | None = None) -> None:
        """Note that the worker has computed the prompt. Only the first call of each attempt has an effect.

        Args:
            cached_tokens: tokens of the prompt that needed no computing, if the engine has told.
        """
        if (booking := self.booking) is not None:
            self._router.computed(booking, cached_tokens)
            if self.kv_transfer is not None and self.handover is not None:
                self.handover.first_output()

    def release(self) -> None:
        """End the booking, or hold the request no longer. A second call has no effect."""
        self._over = True
        if self.handover is not None:
            self.handover.end()
        if self.waiter is not None:
            self._router.withdraw(self.question)
            self.waiter.cancel()
        booking = self.booking
        if booking is not None:
            self.booking = None
            self._router.released(booking)

    def _without_transfer(self) -> None:
        self.kv_transfer = None
        if self.handover is not None:
            self.handover.unused()

    def _free(self) -> None:
        booking, self.booking = self.booking, None
        if booking is not None:
            self._router.released(booking)

    def __call__(self, request: Any, instances: tuple[Instance, ...], load: LoadBook) -> Instance:
        """Choose an instance for the call."""
        if not self._sent and self.decision is not None:
            self._sent = True
            wanted = self.decision.chosen.worker[0]
            for each in instances:
                if each.id == wanted:
                    return each
        self._sent = True
        self._free()
        computed = self.kv_transfer is not None
        found = self._router.book_among(self.question, instances, self.rank, computed)
        if found is None:
            return min(instances, key=lambda each: load[each.id])
        decision, booking = found
        self.decision = decision
        if computed and booking.state == Booking.WAITING:  # It cannot take the computed prompt.
            self._without_transfer()
        if self._over:  # The answer has ended meanwhile, e.g. because its reader left.
            self._router.released(booking)
        else:
            self.booking = booking
        wanted = decision.chosen.worker[0]
        return next(each for each in instances if each.id == wanted)

    def __del__(self) -> None:
        # A dropped answer cancels its call without telling.
        if (booking := self.booking) is not None:
            self.booking = None
            self._router.dropped(booking)
        if self.handover is not None:
            self.handover.end()

    def __repr__(self) -> str:
        state = "over" if self._over else "booked" if self.booking is not None else "without a booking"
        return f"<Placement at instance {self.instance_id}, rank {self.rank}, {state}>"

"""One call, from the choice of an instance to its last item; a request that no handler began moves to another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from triton_distributed.calling import failures
from triton_distributed.calling.dispatch import Dispatch
from triton_distributed.calling.reader import LEFT, Receiving
from triton_distributed.calling.resume import Resumption
from triton_distributed.context import Context
from triton_distributed.errors import DeadlineExceeded
from triton_distributed.names import Instance
from triton_distributed.observe import Outcome
from triton_distributed.payload.codec import Message
from triton_distributed.routing.policies import Policy
from triton_distributed.transport.stream import Stream
from triton_distributed.wire import frames as f

if TYPE_CHECKING:
    from triton_distributed.runtime.client import Client

_OK = int(Outcome.OK)
_INFINITE = float("inf")
_NOTHING: Iterator[Any] = iter(())
_NO_ITEM: Any = object()
_FIXED = f.REQUEST_PREFIX_BYTES


class Call(Receiving):
    """A call under way: how it is sent, and how it ends. `calling.failures` says what a failed stream means for it.

    Attributes:
        body: the encoded request.
        more: the further requests of a caller that streams them.
        metadata: what goes with the request, encoded.
        policy: chooses the instance; it may look at `request`.
        idempotent: the request may be given to a second instance.
        instances: how many have been given the request, or were about to be.
        stopping: the handler is to be asked to stop as soon as there is one.
        timeout_s: seconds for the whole call.
        deadline: when they are over, on the loop's clock.
    """

    __slots__ = (
        "_context",
        "_timer",
        "body",
        "deadline",
        "idempotent",
        "instances",
        "metadata",
        "more",
        "policy",
        "request",
        "stopping",
        "timeout_s",
    )

    def __init__(
        self,
        client: Client,
        request: Any,
        body: bytes | Message,
        more: AsyncIterator[Any] | None,
        policy: Policy,
        annotated: bool,
        context: Context | None,
        timeout_s: float | None,
        deadline: float | None,
        metadata: bytes,
        request_id: str | None,
        idempotent: bool,
        unary: bool,
        resumption: Resumption | None,
    ) -> None:
        self.client = client
        self.request = request
        self.body = body
        self.more = more
        self.policy = policy
        self._annotated = annotated
        self._context = context
        self.metadata = metadata
        self._request_id = request_id
        self.idempotent = idempotent
        self.unary = unary
        self.resumption = resumption
        self._closed = self._error = self._told = self._unsent_reader = None
        self.stopping = False
        self._outcome = None
        self._timer: asyncio.TimerHandle | None = None
        self.timeout_s = timeout_s
        self.deadline = deadline
        self.dispatch = None
        self.stream = None
        self.instance = None
        self.items = _NOTHING
        self.received = self.instances = 0
        self.done = self.reading = self.read_whole = False
        client.stats.inflight += 1
        if deadline is not None:
            self._timer = client.loop.call_at(deadline, self._expire)
        if context is not None:
            context.attach(self)

    # dispatch

    def start(self) -> None:
        """Send the request now where that needs no waiting, else from a task."""
        if self.done:
            return
        client = self.client
        candidates = client.view.candidates
        body, metadata = self.body, self.metadata
        if not candidates or self.more is not None or body.__class__ is not bytes:
            self._dispatch()
            return
        try:
            instance = self.policy(self.request, candidates, client.load)
        except Exception as error:  # a user's policy, or `direct` with an id that nobody has
            self.fail(error, Outcome.UNREACHABLE)
            return
        session = client.pool.get(instance.addresses)
        if session is None or session.paused or session.full or _FIXED + len(metadata) + len(body) > f.SMALL:
            self._dispatch(instance)
            return
        timeout = _INFINITE if self.deadline is None else self.deadline - client.loop.time()
        stream = session.request(instance.id, client.key, timeout, metadata, body)
        self.own(stream, instance)
        if self.stopping:
            stream.ask_to_stop()

    def own(self, stream: Stream, instance: Instance) -> None:
        """`stream` carries the call to `instance`."""
        self.instances += 1
        stream.owner = self
        self.stream = stream
        self.instance = instance
        self.client.load.acquire(instance.id)

    def _dispatch(self, chosen: Instance | None = None) -> None:
        """Send the request from a task: it needs a connection first, or more than one frame, or another instance."""
        if self.dispatch is None:
            self.dispatch = Dispatch(self, self.client)
        self.dispatch.start(chosen)

    @property
    def moved(self) -> bool:
        """Other instances had the request before: this one has only the time that they left."""
        return self.dispatch is not None and bool(self.dispatch.tried)

    @property
    def towards(self) -> Instance | None:
        """The instance that has the request or is about to get it: it may still be dialled."""
        return self.instance if self.dispatch is None else self.dispatch.towards

    @property
    def began(self) -> float | None:
        """When the call began, where it has a deadline."""
        return self.deadline - self.timeout_s if self.deadline is not None and self.timeout_s is not None else None

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; infinite where there is none."""
        return _INFINITE if self.deadline is None else self.deadline - self.client.loop.time()

    # the owner of a stream

    def stream_ended(self) -> None:
        """The last item has arrived, though perhaps nobody has read it."""
        if self._outcome is None:
            self._settle(_OK)
            if self.more is not None and self.stream is not None:
                self.stream.abort(f.CANCEL)
                if self.dispatch is not None:
                    self.dispatch.cancel()

    def stream_closed(self, stream: Stream) -> None:
        """The stream failed, was refused, or its session is gone."""
        if self._outcome is None and stream is self.stream and self.instance is not None:
            failures.closed(self, stream, self.instance)

    def stream_silent(self, stream: Stream, words: str) -> None:
        """Its worker says nothing."""
        if self._outcome is None and stream is self.stream and self.instance is not None and self.more is None:
            failures.silent(self, stream, self.instance, words)

    def go_on(self, resumption: Resumption) -> None:
        failures.go_on(self, resumption)

    def stream_stopped(self) -> None:
        """Only handlers are asked to stop."""

    # its end

    def fail(self, error: BaseException, outcome: Outcome) -> None:
        if self._outcome is not None:
            return
        self._error = error
        self._settle(outcome)
        if self.dispatch is not None:
            self.dispatch.cancel()  # also where it streams requests, which nobody takes any more
        if self.stream is not None:
            self.stream.wake()

    def release(self) -> None:
        """Let go of the stream: another instance is to be asked."""
        if self.stream is not None and self.instance is not None and self._outcome is None:
            self.client.load.release(self.instance.id)
            self.stream.owner = None
            self.stream = None

    def _settle(self, outcome: int) -> None:
        """The call is over on the wire: give back what it held."""
        self._outcome = outcome
        client = self.client
        if self.stream is not None and self.instance is not None:
            client.load.release(self.instance.id)
            self.stream.owner = None
            if client.ejector.counting and outcome == _OK:
                client.ejector.answered(self.instance.id)
        stats = client.stats
        stats.inflight -= 1
        stats.ended[outcome] += 1
        if self._timer is not None:
            self._timer.cancel()
        if self._context is not None:
            self._context.detach(self)
        self.request = None

    def _expire(self) -> None:
        if self._outcome is None:
            if self.stream is not None:
                self.stream.abort(f.CANCEL)
                if self.instance is not None and not self.moved:
                    self.client.ejector.failed(self.instance.id, began=self.began)
            attempts = self.dispatch.attempts if self.dispatch is not None else ()
            self.fail(DeadlineExceeded(self.target, self.timeout_s or 0.0, attempts), Outcome.DEADLINE)

    def cancel(self) -> None:
        """Cancel the handler and drop what was received; whoever reads, or comes to, gets CancelledError."""
        self.client.check_loop("cancel")
        if self._outcome is None:
            self._error = asyncio.CancelledError(f"{self.target} was cancelled by this process")
        self.leave("it was cancelled by this process")

    def leave(self, words: str = LEFT) -> None:
        """Cancel the handler and drop what was received: its reader is gone."""
        if not self.done and self._closed is None:
            unread = self.stream is not None and bool(self.stream.inbox)
            if self._outcome == _OK and not unread and next(self.items, _NO_ITEM) is _NO_ITEM:
                self.read_whole = self.reading  # all but the end was read
            else:
                self._closed = words
        self.done = True
        self.items = _NOTHING
        if self.stream is not None:
            self.stream.inbox.clear()
        if self._outcome is None:
            stream = self.stream
            self._settle(Outcome.CANCELLED)
            if stream is not None:
                stream.abort(f.CANCEL)
                stream.wake()
            if self.dispatch is not None:
                self.dispatch.cancel()

    def ask_to_stop(self) -> None:
        """Ask the handler to finish by itself, now or as soon as it has the request."""
        self.client.check_loop("stop_generating")
        self.stopping = True
        if self.stream is not None and self._outcome is None:
            self.stream.ask_to_stop()

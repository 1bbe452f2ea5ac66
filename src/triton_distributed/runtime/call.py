"""One call, from the choice of an instance to its last item; a request that no handler began moves to another."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Set
from threading import get_ident
from typing import TYPE_CHECKING, Any

from triton_distributed.errors import (
    DeadlineExceeded,
    DecodeError,
    InvalidRequest,
    Overloaded,
    Refusal,
    StreamIncomplete,
    TritonError,
)
from triton_distributed.names import Instance
from triton_distributed.observe import Outcome
from triton_distributed.routing.policies import Policy
from triton_distributed.runtime.annotated import Annotated
from triton_distributed.runtime.context import Context
from triton_distributed.runtime.directly import Directly
from triton_distributed.runtime.dispatch import Dispatch
from triton_distributed.runtime.reported import failure, refusal
from triton_distributed.runtime.resuming import Resumption, unpaired
from triton_distributed.wire import frames as f
from triton_distributed.wire.codec import Message, decode

if TYPE_CHECKING:
    from triton_distributed.runtime.client import Client
    from triton_distributed.transport.session import Session
    from triton_distributed.transport.stream import Stream

logger = logging.getLogger("triton_distributed.runtime")

NO_BUDGET = "so many calls failed that this one is not sent again: see routing.budget"
_OK = int(Outcome.OK)
# A handler passes on what it was told of the request, or of a want of room elsewhere.
NOT_ITS_FAULT = (InvalidRequest, Refusal)
_INFINITE = float("inf")
_NOTHING: Iterator[Any] = iter(())
_pack = f.REQUEST_HEADER.pack
_FIXED = f.REQUEST_PREFIX_BYTES


class Call:
    """A call under way.

    Attributes:
        body: the encoded request.
        dispatch: what looks for an instance, where the request could not be sent at once.
        items: decoded items of the message that is being read.
        more: the further requests of a caller that streams them.
        policy: chooses the instance; it may look at `request`.
        stopping: the handler is to be asked to stop as soon as there is one.
        instance: who was asked, the last where there were several.
        stream: the stream to it; None while none is open.
        reading: an `async for` goes over it.
        received: items handed to the caller, of the present instance where only the whole answer counts.
        done: the caller gets nothing more: it has ended, failed or was cancelled.
    """

    __slots__ = (
        "_annotated",
        "_client",
        "_context",
        "_error",
        "_idempotent",
        "_metadata",
        "_outcome",
        "_request_id",
        "_resumption",
        "_timer",
        "_unary",
        "body",
        "deadline",
        "dispatch",
        "done",
        "instance",
        "items",
        "more",
        "policy",
        "reading",
        "received",
        "request",
        "stopping",
        "stream",
        "timeout_s",
    )

    def __init__(
        self,
        client: Client,
        request: Any,
        body: bytes | Message,
        more: AsyncIterator[Any] | None,
        *,
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
        self._client = client
        self.request = request
        self.body = body
        self.more = more
        self.policy = policy
        self._annotated = annotated
        self._context = context
        self._metadata = metadata
        self._request_id = request_id
        self._idempotent = idempotent
        self._unary = unary
        self._resumption = resumption
        self._error: BaseException | None = None  # what ended the call
        self.stopping = False
        self._outcome: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.timeout_s = timeout_s
        self.deadline = deadline
        self.dispatch: Dispatch | None = None
        self.stream: Stream | None = None
        self.instance: Instance | None = None
        self.items: Iterator[Any] = _NOTHING
        self.received = 0
        self.done = self.reading = False
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
        client = self._client
        candidates = client.view.candidates
        body, metadata = self.body, self._metadata
        if not candidates or self.more is not None or body.__class__ is not bytes:
            self._dispatch()
            return
        try:
            instance = self.policy(self.request, candidates, client.load)
        except Exception as error:  # a user's policy, or `direct` with an id that nobody has
            self.fail(error, Outcome.UNREACHABLE)
            return
        size = _FIXED + len(metadata) + len(body)
        session = client.pool.get(instance.addresses)
        if session is None or session.paused or session.full or size > f.SMALL:
            self._dispatch(instance)
            return
        stream = self.open_stream(session, instance, True)
        timeout = _INFINITE if self.deadline is None else self.deadline - client.loop.time()
        key, window = client.key, stream.window
        head = _pack(size, f.REQUEST, f.END, stream.id, instance.id, key, timeout, window, len(metadata))
        session.send(head + metadata + body)
        if self.stopping:
            stream.ask_to_stop()

    def open_stream(self, session: Session, instance: Instance, end: bool) -> Stream:
        """The stream to `instance`; its REQUEST must be written before anything else is."""
        ejector = self._client.ejector
        stream: Stream
        if ejector.samples and self.more is None:  # what a caller streams decides when it is answered
            stream = ejector.timed_stream(session, end, instance.id)
        else:
            stream = session.open_stream(end)
        stream.owner = self
        self.stream = stream
        self.instance = instance
        self._client.load.acquire(instance.id)
        return stream

    def _dispatch(self, chosen: Instance | None = None) -> None:
        """Send the request from a task: it needs a connection first, or more than one frame, or another instance."""
        if self.dispatch is None:
            self.dispatch = Dispatch(self, self._client)
        self.dispatch.start(chosen)

    @property
    def _moved(self) -> bool:
        """Other instances had the request before: this one has only the time that they left."""
        return self.dispatch is not None and bool(self.dispatch.tried)

    @property
    def _began(self) -> float | None:
        """When the call began, where it has a deadline."""
        return self.deadline - self.timeout_s if self.deadline is not None and self.timeout_s is not None else None

    @property
    def metadata_bytes(self) -> int:
        """Bytes of metadata that go with the request."""
        return len(self._metadata)

    def prefix(self, stream: Stream, instance: Instance) -> bytes:
        """The fixed part of a request and its metadata."""
        timeout = _INFINITE if self.deadline is None else self.deadline - self._client.loop.time()
        return (
            f.REQUEST_PREFIX.pack(instance.id, self._client.key, timeout, stream.window, len(self._metadata))
            + self._metadata
        )

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
        if self._outcome is not None or stream is not self.stream or self.instance is None:
            return
        if stream.lost is not None:
            session = stream.connection
            began = bool(stream.accepted or stream.inbox or self.received)
            # What would tell may have been lost with the connection; a request that never left tells it too.
            possible = began or (session.torn and stream.id not in session.unsent)
            if possible:
                self._client.ejector.failed(self.instance.id, session.hello.nonce)
            if possible and self._resumption is not None:
                self._resumption.lost = (session.address, stream.lost)  # see `take`: the inbox comes first
            elif possible:
                self._begun(stream, stream.lost, began)
            else:
                self._elsewhere([(stream.connection.address, stream.lost)])
            return
        if stream.failure is None:
            self._client.ejector.failed(self.instance.id)
            self._fail_incomplete("the worker cancelled the stream")
            return
        kind, code, detail = stream.failure
        if kind == f.REJECT:
            tries = len(self.dispatch.tried) + 1 if self.dispatch is not None else 1
            words, refused = refusal(code, detail, self._client.view.name.path, self.instance.id, tries)
            if code == f.RejectCode.UNKNOWN:
                self._client.view.disowned(self.instance.id)
            if isinstance(refused, Overloaded) and not self._client.may_retry():
                self.fail(refused, Outcome.REFUSED)
                return
            self._elsewhere([(stream.connection.address, words)], refused)
        elif code == f.ErrorCode.CANCELLED and self._resumption is not None:
            self._resumption.lost = (stream.connection.address, detail.decode("utf-8", "replace"))
        elif code == f.ErrorCode.CANCELLED:
            self._begun(stream, detail.decode("utf-8", "replace"), True)
        else:
            error, outcome = self._told(code, detail)
            if (outcome is Outcome.ERROR and not isinstance(error, NOT_ITS_FAULT)) or (
                outcome is Outcome.DEADLINE and not self._moved
            ):
                self._client.ejector.failed(self.instance.id, began=self._began)
            self.fail(error, outcome)

    def _begun(self, stream: Stream, reason: str, began: bool) -> None:
        """The instance is lost to the call, and its handler had begun, or may have."""
        if not self._may_begin_again(stream):
            self._fail_incomplete(reason, began)
        elif not self._client.may_retry():
            self._fail_incomplete(f"{reason}; {NO_BUDGET}", began)
        else:
            error = self._incomplete(reason, began)
            self.received = 0
            self._elsewhere([(stream.connection.address, reason)], error)

    def _may_begin_again(self, stream: Stream) -> bool:
        """The caller allows a second handler and has seen nothing of an answer; what `client.call` has, nobody saw."""
        return self._idempotent and (self._unary or not (self.received or stream.inbox))

    def _told(self, code: int, detail: bytes) -> tuple[BaseException, Outcome]:
        """The error that the worker reports."""
        assert self.instance is not None
        found = failure(code, detail, self.target, self.instance.id, self.request_id, self.timeout_s)
        return found or (self._incomplete(detail.decode("utf-8", "replace")), Outcome.LOST)

    def _elsewhere(self, attempts: list[tuple[str, str]], refusal: Exception | None = None) -> None:
        """No handler has begun, or the caller allows a second one: try another instance."""
        assert self.instance is not None
        self._release()
        if self.dispatch is None:
            self.dispatch = Dispatch(self, self._client)
        self.dispatch.note(self.instance, attempts, refusal)
        if self.more is not None:
            # What was streamed cannot be taken back from the caller's iterator.
            self.dispatch.cancel()
            self.fail(self.dispatch.refused(), Outcome.REFUSED)
        else:
            self._dispatch()

    def stream_silent(self, stream: Stream, words: str) -> None:
        """Its worker says nothing: go elsewhere where the caller allows it and somebody is there, else wait on.

        The stream is cancelled, for the worker may wake.
        """
        resumption, instance = self._resumption, self.instance
        if self._outcome is not None or stream is not self.stream or instance is None or self.more is not None:
            return
        if resumption is None and not self._may_begin_again(stream):
            return
        fresh = resumption is not None and (resumption.progress or stream.inbox)
        if not self.may_leave(instance, set() if fresh or self.dispatch is None else self.dispatch.tried):
            return
        lost = (stream.connection.address, words)
        if resumption is not None and stream.inbox:
            resumption.lost = lost  # see `take`: the inbox comes first
            stream.abort(f.CANCEL)
        elif (resumption is not None and resumption.progress) or self._client.may_retry():
            stream.abort(f.CANCEL)
            if resumption is None:
                self.received = 0
                self._elsewhere([lost])
            else:
                resumption.lost = lost
                self._go_on(resumption, paid=True)

    def may_leave(self, instance: Instance, tried: Set[int]) -> bool:
        """Whether another instance may be tried and is there: one in rotation, beside those that were tried."""
        return (
            not isinstance(self.policy, Directly)
            and len(tried) < self._client.retries
            and self._client.view.others({instance.id, *tried})
        )

    def stream_stopped(self) -> None:
        """Only handlers are asked to stop."""

    # its end

    def _incomplete(self, reason: str, began: bool = True) -> StreamIncomplete:
        assert self.instance is not None
        assert self.stream is not None
        address = self.stream.connection.address
        return StreamIncomplete(self.target, self.instance.id, address, reason, self.received, began)

    def _fail_incomplete(self, reason: str, began: bool = True) -> None:
        self.fail(self._incomplete(reason, began), Outcome.LOST)

    def fail(self, error: BaseException, outcome: Outcome) -> None:
        if self._outcome is not None:
            return
        self._error = error
        self._settle(outcome)
        if self.dispatch is not None:
            self.dispatch.cancel()  # also where it streams requests, which nobody takes any more
        if self.stream is not None:
            self.stream.wake()

    @property
    def target(self) -> str:
        """What was called, for error texts."""
        return f'endpoint "{self._client.view.name.path}"'

    def _release(self) -> None:
        if self.stream is not None and self.instance is not None and self._outcome is None:
            self._client.load.release(self.instance.id)
            self.stream.owner = None
            self.stream = None

    def _settle(self, outcome: int) -> None:
        """The call is over on the wire: give back what it held."""
        self._outcome = outcome
        client = self._client
        if self.stream is not None and self.instance is not None:
            client.load.release(self.instance.id)
            self.stream.owner = None
            if outcome == _OK:
                client.answered[self.instance.id] += 1
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
                if self.instance is not None and not self._moved:
                    self._client.ejector.failed(self.instance.id, began=self._began)
            attempts = self.dispatch.attempts if self.dispatch is not None else ()
            self.fail(DeadlineExceeded(self.target, self.timeout_s or 0.0, attempts), Outcome.DEADLINE)
            if self.dispatch is not None:
                self.dispatch.cancel()

    def cancel(self) -> None:
        """Cancel the handler and drop what was received; whoever reads, or comes to, gets CancelledError."""
        if self._outcome is None:
            self._error = asyncio.CancelledError(f"{self.target} was cancelled by this process")
        self.leave()

    def leave(self) -> None:
        """Cancel the handler and drop what was received: its reader is gone."""
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
        self.stopping = True
        if self.stream is not None and self._outcome is None:
            self.stream.ask_to_stop()

    # reading

    def take(self) -> bool:
        """Make the next message's items the current ones. False: wait first.

        Raises:
            StopAsyncIteration: there are no more.
            Exception: what ended the call.
        """
        stream = self.stream
        if stream is not None and stream.inbox:
            cost, kind, flags, payload, buffers = stream.inbox.popleft()
            stream.read(cost)
            try:
                items = decode(payload, buffers)
                if kind == f.BATCH and type(items) is not list:
                    raise DecodeError("the worker sent a batch that is none")
            except DecodeError:
                self.leave()
                raise
            if flags & f.CHECKPOINT or self._resumption is not None:
                items = self._resumable(items, kind == f.BATCH, flags)
            elif kind != f.BATCH:
                items = (items,)
            if flags & f.ANNOTATED:
                try:
                    items = [Annotated(*each) if self._annotated else each[0] for each in items]
                except (TypeError, LookupError) as fault:
                    self.leave()
                    raise DecodeError(f"the worker sent an annotated item that is none: {fault}") from fault
                self.received += len(items)
                self.items = iter(items)
                return True
            self.received += len(items)
            self.items = map(Annotated, items) if self._annotated else iter(items)
            return True
        if self._outcome is None and self._resumption is not None and self._resumption.lost is not None:
            self._go_on(self._resumption)
        if self._outcome is None:
            return False
        self.done = True
        if self._error is None:
            raise StopAsyncIteration
        # Told once, as a generator does, and not kept: an error knows the frames that know this call.
        error, self._error = self._error, None
        if isinstance(error, StreamIncomplete):
            error.items = 0 if self._unary else self.received
        try:
            raise error
        finally:
            del error

    def _resumable(self, items: Any, batch: bool, flags: int) -> Any:
        """The items of a message that are new to the caller, where they may have tokens or some may be here already."""
        tokens = None
        try:
            if flags & f.CHECKPOINT:
                items, tokens = unpaired(items, batch)
            elif not batch:
                items = (items,)
        except DecodeError:
            self.leave()
            raise
        return items if self._resumption is None else self._resumption.received(items, tokens)

    def _go_on(self, resumption: Resumption, paid: bool = False) -> None:
        """The instance was lost, and what had come from it is read: another goes on behind the last token."""
        assert resumption.lost is not None
        address, reason = resumption.lost
        assert self.instance is not None
        error = StreamIncomplete(self.target, self.instance.id, address, reason, self.received)
        if resumption.progress:
            self.dispatch = None  # who failed before this instance answered may be tried again
        elif not paid and not self._client.may_retry():
            self._fail_incomplete(f"{reason}; {NO_BUDGET}")
            return
        self._metadata = resumption.go_on(self._metadata)
        self._elsewhere([(address, reason)], error)

    def pending(self) -> asyncio.Future[None]:
        """What to await when `take` had nothing to say. Cancelled there, the reader calls `leave`."""
        if self.stream is not None:
            return self.stream.next_readable()
        assert self.dispatch is not None
        return asyncio.shield(self.dispatch.sent)

    async def next_message(self) -> None:
        """Wait for the next message and make its items the current ones.

        Raises:
            As `take` does.
        """
        while not self.take():
            try:
                await self.pending()
            except asyncio.CancelledError:
                self.abandon()
                raise

    def abandon(self) -> None:
        """Whoever read was cancelled: that cancels the handler, and who reads on must not take it for a clean end."""
        if self._outcome is None and self.instance is not None and self.stream is not None:
            self._error = StreamIncomplete(
                self.target,
                self.instance.id,
                self.stream.connection.address,
                "its reader was cancelled, e.g. by a timeout around a single item, which cancels the handler",
                self.received,
            )
        self.leave()

    def discard(self) -> None:
        """Nobody will read: let the request run, and drop what it answers."""
        self._client.spawn(self._discard())

    def from_finalizer(self, what: Callable[[], None]) -> None:
        """Do `what` on the loop's thread: the collector runs finalizers in whichever thread it happens to run."""
        client = self._client
        if client.loop.is_closed():
            return
        if get_ident() == client.thread:
            what()
        else:
            with contextlib.suppress(RuntimeError):  # it was closed this very moment
                client.loop.call_soon_threadsafe(what)

    async def _discard(self) -> None:
        try:
            while True:
                await self.next_message()
        except (StopAsyncIteration, asyncio.CancelledError):
            pass
        except Exception as error:
            logger.info('a call to "%s" that nobody read failed: %s', self._client.view.name.path, error)

    @property
    def dispatching(self) -> asyncio.Future[None] | None:
        """Done when the request was sent or cannot be; None where it was sent at once."""
        return self.dispatch.sent if self.dispatch is not None else None

    @property
    def refusal(self) -> BaseException | None:
        """Why the request could not be sent anywhere."""
        return self._error if self._outcome is not None and self.stream is None else None

    def take_refusal(self) -> BaseException | None:
        """`refusal` to be raised by whoever awaits; reading afterwards raises another of the same."""
        error = self.refusal
        if isinstance(error, TritonError):
            self._error = type(error)(*error.args)
        return error

    @property
    def over(self) -> bool:
        """Nothing more comes from the worker."""
        return self._outcome is not None

    @property
    def request_id(self) -> str:
        """The request's id, as the handler sees it; empty before it was sent."""
        if self._request_id is not None:
            return self._request_id
        if self.stream is None:
            return ""
        return f"{self.stream.connection.hello.nonce:x}-{self.stream.id:x}"

"""One call, from the choice of an instance to its last item. `Call` is the only owner of its state."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from time import monotonic
from typing import Any, Final

from triton_distributed import errors
from triton_distributed.annotated import Annotated
from triton_distributed.calling import attempts, failover
from triton_distributed.calling.conditions import UNCONDITIONAL, Conditions
from triton_distributed.calling.items import SPECIAL, ItemDecoder, new_items, plain_items
from triton_distributed.calling.request_stream import send_requests
from triton_distributed.calling.resume import Resumption
from triton_distributed.calling.services import NotTaken, Services
from triton_distributed.calling.timing import end_of_call

from triton_distributed.calling.state import (  # isort: skip
    AFTER, CLOSED, END, ENDED, FAILED, LAST, LEAVE, NEW, OPEN, PLACE, PLACING, RAISE, SENT, TAKEN, UNREAD, WAIT, WHOLE,
)  # fmt: skip
from triton_distributed.context import AwaitedRequest
from triton_distributed.names import Instance
from triton_distributed.observe import Outcome
from triton_distributed.observe.histogram import MOST_FRESH
from triton_distributed.observe.observer import ObservedCall
from triton_distributed.payload.codec import Message, decode
from triton_distributed.routing.policies import Direct, Policy
from triton_distributed.transport.session import Session
from triton_distributed.transport.shared_memory import Loan
from triton_distributed.transport.stream import Owner, Stream
from triton_distributed.wire import frames as f
from triton_distributed.wire.assembly import request_bytes
from triton_distributed.wire.frames import ANNOTATED, BATCH, SMALL

_OK: Final = int(Outcome.OK)
_INFINITE: Final = float("inf")
_NOTHING: Final[Iterator[Any]] = iter(())
_NO_ITEM: Final[Any] = object()
_FIXED: Final = f.REQUEST_PREFIX_BYTES


class Call(Owner):
    """A call under way.

    Args:
        services: the services that the calls of one client share.
        request: the caller's request, for the policy.
        body: the encoded request.
        request_stream: the further requests of a caller that streams them.
        policy: chooses the instance.
        annotated: items are returned as `Annotated`.
        unary: the caller sees the answer only when it is complete.
        conditions: the options of the call, and what it inherits.
        decoder: decodes items to their declared type; None for plain values.
        waits: the call waits for a first instance.

    Attributes:
        state: one of the states in `calling.state`.
        deadline: the end of the call's time, on the loop's clock; None without a limit.
        metadata: the metadata of the next request, encoded.
        resumption: the position of the stream, if another instance may continue it.
        stream: the stream to the instance; None while none is open.
        instance: the latest instance to which a stream was opened.
        attempts: the failed attempts; None before the first failure.
        sending: done when the request is on its way or cannot be sent; None if it was sent at once.
        stopping: the handler must be asked to stop as soon as there is one.
        error: the error that ended the call, until a reader gets it.
        items: the decoded items of the message that is being read.
        received: the number of items that the reader has; without `resumption`, those of the present attempt.
        reading: an `async for` reads the call.
        began, sent, first, ended: when the call began, its request left (0: at once), its first item arrived (see
            `Timing`), and the call ended, on `time.monotonic`; 0 before.
        observed: tells the observers of the call; None without observers.
    """

    __slots__ = (
        "_broken", "_chosen", "_conditions", "_instances", "_placing", "_reason", "_timer", "_unsent_reader",
        "_waits", "annotated", "attempts", "began", "body", "deadline", "decoder", "ended", "error", "first",
        "instance", "items", "metadata", "observed", "policy", "reading", "received", "request", "request_stream",
        "resumption", "sending", "sent", "services", "state", "stopping", "stream", "unary",
    )  # fmt: skip

    def __init__(
        self,
        services: Services,
        request: Any,
        body: bytes | Message,
        request_stream: AsyncIterator[Any] | None,
        policy: Policy,
        annotated: bool,
        unary: bool,
        conditions: Conditions,
        decoder: ItemDecoder | None = None,
        waits: bool = False,
    ) -> None:
        self.services = services
        self.request = request
        self.body = body
        self.request_stream = request_stream
        self.policy = policy
        self.annotated = annotated
        self.unary = unary
        self._conditions = conditions
        self.metadata = conditions.metadata
        self.decoder = decoder
        self._waits = waits
        self.state: int = NEW
        self.stream: Stream | None = None
        self.instance: Instance | None = None
        self.attempts: attempts.Attempts | None = None
        self.sending: asyncio.Future[None] | None = None
        self.items = _NOTHING
        self.received = self._instances = 0
        self.stopping = self.reading = False
        self._placing: asyncio.Task[None] | None = None  # Sends the request if sending needs waiting.
        self._chosen: Instance | None = None  # The instance that `_placing` is about to send it to.
        self._broken: attempts.AttemptEnd | None = None  # How the attempt ended, while the reader takes the rest.
        self.error: BaseException | None = None
        self._reason: str = ""  # The reason in the StreamClosed of later readers.
        self._unsent_reader: asyncio.Future[None] | None = None  # A reader that waits for a stream to be opened.
        self.deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.resumption: Resumption | None = None
        self.began = monotonic()
        self.sent = self.first = self.ended = 0.0
        self.observed: ObservedCall | None = None
        services.stats.inflight += 1
        if conditions is UNCONDITIONAL:
            return
        self.observed = conditions.observed
        if conditions.timeout_s is not None:
            self.deadline = services.loop.time() + conditions.timeout_s
            self._timer = services.loop.call_at(self.deadline, self._expire)
        if conditions.resume:
            self.resumption = Resumption(services.retries, services.loop.time())
        if conditions.context is not None:
            conditions.context.attach(self)

    # Sending the request.

    def start(self) -> None:
        """Send the request, or send it again: now if that needs no waiting, else from a task."""
        if self.state > OPEN:  # The context was cancelled before.
            return
        services, body, metadata = self.services, self.body, self.metadata
        candidates = services.candidates.instances
        if not candidates or self.request_stream is not None or body.__class__ is not bytes:
            self._place_later()
            return
        try:
            if self.attempts is None and services.limit is None:
                instance = self.policy(self.request, candidates, services.load)
            else:
                instance = services.choose(self.policy, self.request, self.attempts)
        except (Exception, asyncio.CancelledError) as error:  # A user's policy raised, or `direct` has an unknown id.
            self.fail(error, attempts.unplaced(error))
            return
        session, size = services.pool.get(instance.addresses), _FIXED + len(metadata) + len(body)
        if session is None or session.paused or len(session.streams) >= session.max_streams or size > SMALL:
            self._place_later(instance)
            return
        timeout = _INFINITE if self.deadline is None else self.deadline - services.loop.time()
        self.stream = stream = session.connection.request(instance.id, services.key, timeout, metadata, body)
        stream.owner = self
        self.instance = instance
        self.state = AFTER[self.state][SENT]
        self._instances += 1
        services.load.acquire(instance.id)
        if self._instances > 1:
            self.sent = monotonic()
            services.stats.retries += 1
        if self.stopping:
            stream.ask_to_stop()

    def _place_later(self, chosen: Instance | None = None) -> None:
        """Send the request from a task: it needs a connection first, or more than one frame, or another instance."""
        services = self.services
        self.state = AFTER[self.state][PLACE]
        self._chosen = chosen
        if self.sending is None or self.sending.done():
            self.sending = services.loop.create_future()
        self._placing = services.core.spawn(self._place())
        self._placing.add_done_callback(self._placed)

    def _placed(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():  # Before its first step, so `_place` could not see it.
            self.fail(errors.RuntimeClosed("a call"), Outcome.CANCELLED)

    async def _place(self) -> None:
        services = self.services
        try:
            while self.state == PLACING:
                if (instance := self._chosen) is None:
                    if self._waits:
                        await services.first_instance(self.deadline is None, self.attempts)
                    self._chosen = instance = services.choose(self.policy, self.request, self.attempts)
                try:
                    buffers = () if isinstance(self.body, bytes) else self.body.buffers
                    session, loan = await services.prepare(instance, self._decide, buffers)
                except NotTaken as failed:
                    verdict = self._decide(failed.ending, instance)
                    self._chosen = None
                    self._record_attempt(verdict, instance, failed.failures, None)
                else:
                    try:
                        if self.state == PLACING:
                            await self._send_to(session, instance, loan)
                    finally:
                        if loan is not None:
                            loan.drop()
                    return
        except asyncio.CancelledError as error:
            # If the call is over, `fail` does nothing. Else the runtime ends, or the caller's iterator was cancelled.
            closing = services.core.closing
            self.fail(errors.RuntimeClosed("a call") if closing else error, Outcome.CANCELLED)
        except errors.MessageTooLarge as error:
            self.fail(error, Outcome.INVALID)
        except Exception as error:  # The caller sees any error of its policy or its iterator of requests.
            self.fail(error, attempts.unplaced(error))

    async def _send_to(self, session: Session, instance: Instance, loan: Loan | None) -> None:
        body, buffers = (self.body, []) if isinstance(self.body, bytes) else (self.body.body, self.body.buffers)
        size = request_bytes(self.metadata, body, buffers)
        if size > session.send_limit:
            raise errors.MessageTooLarge("the request", size, session.send_limit)
        requests, services = self.request_stream, self.services
        stream = session.connection.open_stream(False)
        stream.owner = self
        self.stream, self.instance, self._chosen = stream, instance, None
        self.state = AFTER[self.state][SENT]
        self._instances += 1
        services.load.acquire(instance.id)
        self.sent = monotonic()
        if self._instances > 1:
            services.stats.retries += 1
        timeout = _INFINITE if self.deadline is None else self.deadline - services.loop.time()
        whole = requests is None
        await stream.send_request(instance.id, services.key, timeout, self.metadata, body, buffers, whole, loan)
        if not _carried_by(self, stream):
            return  # The stream was refused meanwhile, and the request is on its way to another instance.
        self._on_its_way()
        if self.stopping:
            stream.ask_to_stop()
        if requests is not None:
            await send_requests(stream, requests)

    def _on_its_way(self) -> None:
        """Wake the tasks that wait until the request is sent."""
        if self.sending is not None and not self.sending.done():
            self.sending.set_result(None)

    def _stop_placing(self) -> None:
        """Stop sending the request, because the call is over."""
        self._on_its_way()
        if self._placing is not None and self._placing is not asyncio.current_task(self.services.loop):
            self._placing.cancel()

    # Failed attempts.

    def _decide(self, ending: failover.Ending, instance: Instance) -> failover.Verdict:
        """Return the verdict of `failover.decide`, and charge the retry budget for it."""
        services, resumption = self.services, self.resumption
        unread = self.stream is not None and bool(self.stream.inbox)
        advanced = resumption is not None and resumption.advanced
        tried = {instance.id}
        # A stream that advances may return to instances that failed before.
        if self.attempts is not None and not (resumption is not None and (advanced or unread)):
            tried |= self.attempts.tried
        streams = self.request_stream is not None
        terms = failover.Terms(self._conditions.idempotent, self.unary, resumption is not None, streams, self.stopping)
        delivered = failover.Delivered(self.received > 0, unread, advanced)
        means = failover.Remaining(
            attempts_left=len(tried) <= services.retries,
            others=not isinstance(self.policy, Direct) and services.candidates.has_others(tried),
            resumptions_left=resumption is not None and resumption.allowed(services.loop.time()),
            budget=True,
            closed=services.core.unusable,
        )
        verdict = failover.decide(ending, terms, delivered, means)
        if verdict.paid and not services.take_retry():
            verdict = failover.decide(ending, terms, delivered, means._replace(budget=False))
        return verdict

    def _attempt_ended(self, how: attempts.AttemptEnd) -> None:
        """Do what `failover.decide` says after the attempt that has the stream ended."""
        stream, instance, services, resumption = self.stream, self.instance, self.services, self.resumption
        assert stream is not None
        assert instance is not None
        verdict = self._decide(how.ending, instance)
        if isinstance(verdict, failover.Stay | failover.ReadFirst):
            if isinstance(verdict, failover.ReadFirst):
                self._broken = how
                stream.abort(f.CANCEL)
            return
        target, address = services.target, stream.session.address
        kind, note = (verdict.error, verdict.note) if isinstance(verdict, failover.Fail) else (None, "")
        reason = f"{how.reason}; {note}" if note else how.reason
        incomplete = errors.StreamIncomplete(
            target, instance.id, address, reason, self.received, how.began, self._instances
        )
        if kind is failover.Error.INCOMPLETE:
            self.fail(incomplete, Outcome.LOST)
            return
        if kind is failover.Error.REPORTED:
            found = attempts.reported(how, target, instance.id, self.request_id, self._conditions.timeout_s)
            error, outcome = found or (incomplete, Outcome.LOST)
            # A later attempt had only part of the time.
            late = outcome is Outcome.DEADLINE and self.attempts is None
            if late or (outcome is Outcome.ERROR and not isinstance(error, attempts.NOT_ITS_FAULT)):
                services.ejector.failed(instance.id, began=self._conditions.began(self.deadline))
            self.fail(error, outcome)
            return
        last: Exception | None = incomplete  # The error if no instance takes the request.
        if how.ending is failover.Ending.REFUSED or how.ending is failover.Ending.OVERLOADED:
            tries = 1 if self.attempts is None else len(self.attempts.tried) + 1
            last = attempts.refusal(how, services.candidates.name.path, instance.id, tries)
        elif how.ending is failover.Ending.CUT_OFF or (how.ending is failover.Ending.SILENT and resumption is None):
            last = None
        self._release()
        if resumption is None:
            self.received = 0
        elif isinstance(verdict, failover.Resume):
            services.stats.resumes += 1
            if resumption.advanced:
                self.attempts = None
            self.metadata = resumption.resume(self.metadata, services.loop.time())
        self._record_attempt(verdict, instance, [(address, how.reason)], last)
        if kind is None:
            self.start()
            if self.state == OPEN:
                self._on_its_way()

    def _record_attempt(
        self,
        verdict: failover.Verdict,
        instance: Instance,
        failures: Sequence[tuple[str, str]],
        error: Exception | None,
    ) -> None:
        """Record a failed attempt, and fail the call if no other attempt follows."""
        if self.attempts is None:
            self.attempts = attempts.Attempts()
        self.attempts.record(instance.id, failures, error, isinstance(verdict, failover.Retry) and verdict.redial)
        if self.observed is not None:
            self.observed.attempt_failed(instance.id, failures, not isinstance(verdict, failover.Fail))
        if not isinstance(verdict, failover.Fail):
            return
        if verdict.error is failover.Error.CLOSED:
            self.fail(errors.RuntimeClosed("a call"), Outcome.CANCELLED)
        else:
            refused = verdict.error is failover.Error.REFUSED
            self.fail(self.attempts.error(self.services.target), Outcome.REFUSED if refused else Outcome.UNREACHABLE)

    def _release(self) -> None:
        """Release the stream: another instance is tried, or the call ends."""
        if self.stream is not None and self.instance is not None:
            self.state = AFTER[self.state][PLACE]
            self.services.load.release(self.instance.id)
            self.stream.owner = None
            self.stream.abort(f.CANCEL)
            self.stream = None

    # Methods that the stream calls on its owner.

    def stream_ended(self) -> None:
        """The last item has arrived. The reader may not have taken it yet."""
        if self.state == OPEN:
            self._settle(_OK)
            if self.request_stream is not None and self.stream is not None:
                self.stream.abort(f.CANCEL)
                self._stop_placing()

    def stream_closed(self, stream: Stream) -> None:
        """The stream failed or was refused, or its session is lost."""
        if self.state != OPEN or stream is not self.stream or self._broken is not None or self.instance is None:
            return
        services, instance_id = self.services, self.instance.id
        how = attempts.end_of(stream, self.received > 0)
        if how.ending is failover.Ending.LOST:  # Streams of one lost connection are one event.
            services.ejector.failed(instance_id, stream.connection.hello.nonce)
        elif how.ending is failover.Ending.CANCELLED:
            services.ejector.failed(instance_id)
        elif attempts.disowned(how):
            services.candidates.disowned(instance_id)
        _follow(self, how)

    def stream_silent(self, stream: Stream, words: str) -> None:
        """The worker has sent nothing for a long time."""
        if self.state == OPEN and stream is self.stream and self._broken is None:
            _follow(self, attempts.AttemptEnd(failover.Ending.SILENT, words))

    def stream_stopped(self) -> None:
        """Do nothing: only handlers are asked to stop."""

    # The end of the call.

    def fail(self, error: BaseException, outcome: Outcome) -> None:
        """End the call with an error. Nothing happens if the call is over."""
        if self.state > OPEN:
            return
        self.error = error
        self._settle(outcome)
        self._stop_placing()  # Also stops streaming requests, which no handler reads any more.
        if self.stream is not None:
            self.stream.wake()

    def _settle(self, outcome: int) -> None:
        """Release what the call holds, because it is over on the wire."""
        self.state = AFTER[self.state][END]
        services = self.services
        stats, stream = services.stats, self.stream
        fresh = stats.duration.fresh
        if stream is not None and self.instance is not None:
            services.load.release(self.instance.id)
            stream.owner = None
            if services.ejector.counting and outcome == _OK:
                services.ejector.answered(self.instance.id)
        if outcome == _OK and stream is not None:
            now = stream.connection.read_at  # The end of the answer has just been read.
            if not self.first:
                fresh = stats.whole
        else:
            now = monotonic()
        stats.inflight -= 1
        stats.ended[outcome] += 1
        self.ended = now
        fresh.append(now - self.began)
        if len(fresh) >= MOST_FRESH:
            stats.try_count()
        if self._timer is not None:
            self._timer.cancel()
        if self._conditions.context is not None:
            self._conditions.context.detach(self)
        self.request = None
        if self.observed is not None:
            self.observed.ended(end_of_call(self, outcome))

    def _expire(self) -> None:
        if self.state > OPEN:
            return
        services = self.services
        if self.stream is not None:
            self.stream.abort(f.CANCEL)
            if self.instance is not None and self.attempts is None:  # A later attempt had only part of the time.
                services.ejector.failed(self.instance.id, began=self._conditions.began(self.deadline))
        self.fail(*services.expired(self.attempts, self._chosen, self._waits, self._conditions.timeout_s or 0.0))

    def cancel(self) -> None:
        """Cancel the handler and drop unread items. Present and later readers get CancelledError."""
        self.services.check_loop("cancel")
        if self.state <= OPEN:
            self.error = asyncio.CancelledError(f"{self.services.target} was cancelled by this process")
        self.leave("it was cancelled by this process")

    def leave(self, reason: str = attempts.LEFT) -> None:
        """Cancel the handler and drop unread items, because the reader has left.

        Args:
            reason: why it left, for the error of later readers.
        """
        stream, under_way = self.stream, self.state <= OPEN
        if under_way:
            self._settle(Outcome.CANCELLED)
        if self.state == UNREAD:
            unread = self.error is not None or (stream is not None and stream.inbox)
            if not under_way and not unread and next(self.items, _NO_ITEM) is _NO_ITEM:  # Only the end was not read.
                self.state = AFTER[self.state][WHOLE if self.reading else LAST]
            else:
                self.state, self._reason = AFTER[self.state][LEAVE], reason
        self.items = _NOTHING
        if stream is not None:
            stream.inbox.clear()
        if under_way:
            if stream is not None:
                stream.abort(f.CANCEL)
                stream.wake()
            self._stop_placing()

    def ask_to_stop(self) -> None:
        """Ask the handler to finish by itself, now or as soon as it has the request."""
        self.services.check_loop("stop_generating")
        self.stopping = True
        if self.stream is not None and self.state == OPEN:
            self.stream.ask_to_stop()

    # Reading.

    def take(self) -> int:
        """Make the next message's items the current ones.

        Returns:
            `TAKEN`; or `WAIT` if the reader has to wait first, which is false; or `ENDED` if there are no more items.

        Raises:
            Exception: the error that ended the call.
        """
        stream = self.stream
        if stream is not None and stream.inbox:
            message = stream.inbox.popleft()
            stream.read(message[0])
            annotated, decoder = self.annotated, self.decoder
            try:
                if message[2] & SPECIAL or self.resumption is not None:
                    items = new_items(message, self.resumption, annotated, decoder)
                elif decoder is not None:
                    items = decoder.items(message)
                elif message[1] == BATCH:
                    items = plain_items(message)
                else:
                    items = (decode(message[3], message[4]),)
            except errors.DecodeError:
                self.leave(attempts.UNREADABLE)
                raise
            if not self.first:
                self.first = first = stream.connection.read_at
                if not self.ended:
                    self.services.stats.first_item.fresh.append(first - self.began)
            self.received += len(items)
            self.items = map(Annotated, items) if annotated and not message[2] & ANNOTATED else iter(items)
            return TAKEN
        if self._broken is not None and self.state == OPEN:
            how, self._broken = self._broken, None
            _follow(self, attempts.AttemptEnd(failover.Ending.LOST, how.reason))
        if self.state <= OPEN:
            return WAIT
        if self.error is not None:
            raise self._end()
        self.state = AFTER[self.state][WHOLE if self.reading else LAST]
        if self.state == CLOSED:
            raise self.stream_closed_error()
        return ENDED

    def _end(self) -> BaseException:
        """The error that ended the call. It is raised once and not kept: its traceback refers to this call."""
        error, self.error = self.error, None
        assert error is not None
        remote = isinstance(error, errors.RemoteError)
        if isinstance(error, errors.StreamIncomplete) and not remote:
            error.items = 0 if self.unary else self.received
        self.state = AFTER[self.state][RAISE]
        if self.state == FAILED:
            self._reason = f"it failed before with {attempts.in_words(error)}"
        return error

    def stream_closed_error(self) -> errors.StreamClosed:
        """The error for a reader that comes after the stream was closed or has raised its error."""
        instance_id = 0 if self.instance is None else self.instance.id
        address = "" if self.stream is None else self.stream.session.address
        return errors.StreamClosed(self.services.target, instance_id, address, self._reason, self.received)

    def pending(self) -> asyncio.Future[None]:
        """Return what to await after `take` has returned False. A reader that is cancelled there calls `leave`.

        Raises:
            RuntimeError: another task waits already.
        """
        if self.stream is not None:
            return self.stream.next_readable()
        assert self.sending is not None
        assert not self.sending.done(), "a reader would wait for what has happened, for ever"
        self._unsent_reader = asyncio.shield(self.sending)
        return self._unsent_reader

    @property
    def awaited(self) -> bool:
        """Whether a task waits for the next item now."""
        waiter = self._unsent_reader
        return (waiter is not None and not waiter.done()) or (self.stream is not None and self.stream.awaited)

    @property
    def request_id(self) -> str:
        """The request's id, as the handler sees it; empty before the request was sent."""
        if self._conditions.context is not None:
            return self._conditions.context.id()
        return "" if self.stream is None else f"{self.stream.connection.hello.nonce:x}-{self.stream.id:x}"

    def waits_for(self) -> AwaitedRequest | None:
        """The request whose answer the call waits for; None before an instance was chosen."""
        target, stream = self._chosen or self.instance, self.stream
        if target is None:
            return None
        sent = None if stream is None else (stream.connection.hello.nonce, stream.id)
        return AwaitedRequest(self.services.candidates.name, target.id, sent)


def _carried_by(call: Call, stream: Stream) -> bool:
    """Whether `stream` still carries the call. After an `await` a type checker would not expect that it does not."""
    return call.stream is stream


def _follow(call: Call, how: attempts.AttemptEnd) -> None:
    """Let a call go on after its attempt ended. What its policy or its resume token raises ends this call only."""
    try:
        call._attempt_ended(how)
    except (Exception, asyncio.CancelledError) as error:
        call.fail(error, Outcome.ERROR)

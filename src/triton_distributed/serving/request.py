"""One request being served: its handler's task from the first step to the last frame."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import AsyncIterator, Callable
from struct import Struct
from time import monotonic
from typing import Any, Final

import msgspec

from triton_distributed.annotated import Annotated, parts
from triton_distributed.compiled import caused, mypyc_attr
from triton_distributed.context import Context, current
from triton_distributed.errors import DecodeError, InvalidRequest, MessageTooLarge
from triton_distributed.names import EndpointName
from triton_distributed.observe import Outcome, RequestStats
from triton_distributed.observe.histogram import MOST_FRESH
from triton_distributed.observe.observer import ObservedRequest, Observers
from triton_distributed.observe.stats import SHORT_S
from triton_distributed.observe.timing import Timing
from triton_distributed.payload.codec import encode
from triton_distributed.payload.exceptions import encode_error
from triton_distributed.serving.gate import Applicant, Gate
from triton_distributed.serving.handler_context import ServedContext
from triton_distributed.serving.handlers import Handler, UnfitRequest
from triton_distributed.serving.lingering import Lingering
from triton_distributed.serving.plain import Encoded, Ready
from triton_distributed.serving.request_stream import RequestStream
from triton_distributed.serving.state import ANNOUNCED, CLEANING, OVER, RUNNING, WAITING
from triton_distributed.transport.stream import Stream
from triton_distributed.wire import frames as f
from triton_distributed.wire.assembly import Body, Memory
from triton_distributed.wire.states import CLOSED, RECEIVED
from triton_distributed.wire.window import ITEM_COST

logger = logging.getLogger("triton_distributed.runtime")

SMALL: Final = f.SMALL
OK: Final = Outcome.OK
AT_ONCE_S: Final = 0.0001
"""An answer whose first item comes within this many seconds of its end comes at once. It is the first bound of
histograms."""
_times: Final = Struct("<4f").pack
_split: Final = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode


@mypyc_attr(allow_interpreted_subclasses=True)
class Host:
    """The part of an endpoint that a request uses; see `serving.endpoint.ServedEndpoint`."""

    loop: asyncio.AbstractEventLoop
    name: EndpointName
    handler: Handler
    stats: RequestStats
    lingering: Lingering
    context: contextvars.Context
    full_tracebacks: bool
    interrupt: bool
    times_from_s: float
    on_exit: Callable[[SystemExit], None]
    gate: Gate[ServedRequest]
    observers: Observers

    @property
    def cancelled(self) -> bool:
        """Whether the program has cancelled the task that serves the endpoint, for example because its loop ends."""
        raise NotImplementedError

    def report(self, context: Context, error: BaseException) -> None:
        """Log a handler's error."""
        raise NotImplementedError

    def report_refusal(self, context: Context, words: str) -> None:
        """Log that a request was refused because the endpoint or the worker is at capacity."""
        raise NotImplementedError


class ServedRequest(Applicant):
    """A request and the task of its handler.

    Args:
        host: the endpoint that serves it.
        stream: the stream on which the request came and its items leave.
        context: the context that the handler gets.
        body: the request, encoded.
        buffers: the out-of-band buffers; None for a request without any.

    Attributes:
        state: one of `serving.state.RequestState`.
        outcome: how the request ended; OK until then. It is set early if something other than the handler ends it.
        started: when the request was admitted, on the loop's clock; 0 if `max_inflight` is not set.
        due: when the request should end, estimated when it came, on the same clock; 0 without an estimate.
        came, began, first: when the request arrived, its handler took its first step, and the first item was ready to
            be sent, on `time.monotonic`; 0 before, and after the times were counted.
        queued_s: seconds that it waited in the queue.
        task: the handler's task; None before the handler begins.
        items: the handler's async iterator, while it runs.
        observed: tells the observers of the request; None without observers.
    """

    __slots__ = (
        "_body",
        "_buffers",
        "_host",
        "_invalid",
        "_timer",
        "began",
        "first",
        "items",
        "observed",
        "task",
    )

    def __init__(
        self, host: Host, stream: Stream, context: ServedContext, body: Body, buffers: list[Memory] | None
    ) -> None:
        self.context = context
        self.stream = stream
        self.state = WAITING
        self.outcome = OK
        self.started = self.due = 0.0
        self.came = stream.connection.read_at
        self.queued_s = self.began = self.first = 0.0
        self._host = host
        self._invalid: Exception | None = None
        self._body = body
        self._buffers = buffers
        self._timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None
        self.items: AsyncIterator[Any] | None = None
        self.observed: ObservedRequest | None = None
        stream.owner = self

    def watch_deadline(self, deadline: float) -> None:
        """End the request at `deadline`, on the loop's clock, whether it runs or waits."""
        self.context.deadline = self.context.calls_deadline = deadline
        self._timer = self._host.loop.call_at(deadline, self.expire)

    # Methods that the stream calls on its owner.

    def stream_ended(self) -> None:
        """The caller has sent all of its request."""

    def stream_closed(self, stream: Stream) -> None:
        """The caller cancelled the request, or its session is lost."""
        self._caller_left(Outcome.LOST if stream.lost is not None else Outcome.CANCELLED)

    def stream_silent(self, stream: Stream, words: str) -> None:
        """Do nothing: only callers check whether the peer is alive."""

    def stream_stopped(self) -> None:
        """The caller asks the handler to finish by itself. A handler that takes no context is cancelled instead."""
        self.context.stop_generating()
        host = self._host
        if host.interrupt and not host.handler.takes_context:
            if self.state == RUNNING and self.task is not None:
                self.task.cancel()  # As the context is stopped, this is a clean end; see `_cancelled`.
            elif self.state < RUNNING:
                self._body, self._buffers = b"", None  # `_request` finds no request, and the handler does not begin.

    def _caller_left(self, outcome: Outcome) -> None:
        """Cancel the handler, or only tell it if it must not be interrupted."""
        if self.state != RUNNING or self._host.interrupt:
            self.cancel(outcome)
            return
        self.outcome = self.outcome or outcome
        if outcome is Outcome.CANCELLED:
            self.context.stop_generating()
        else:
            self.context.kill()

    def cancel(self, outcome: Outcome) -> None:
        """Raise CancelledError in the handler at its current await, and cancel the calls that it has made.

        A handler that is cleaning up already is not cancelled again.
        """
        state = self.state
        if state >= CLEANING:
            return
        self.outcome = self.outcome or outcome
        if state == RUNNING:
            self.state = CLEANING
            self._host.lingering.watch(self)
        self.context.cut()
        if self.task is not None:
            self.task.cancel()
        if state == WAITING:
            self._host.gate.left(self)
            self.over()
        elif state == ANNOUNCED:  # A task that is cancelled before its first step never enters its function.
            self.stream.abort(f.REJECT, f.RejectCode.DRAINING, b"it is shutting down")  # The call goes elsewhere.
            if outcome is Outcome.CUT:
                self.outcome = Outcome.REFUSED
            self.over()
            self._host.gate.ended(self)

    def begin(self) -> None:
        """The ACCEPT was written: start the handler's task, unless the request was cancelled meanwhile."""
        if self.state == ANNOUNCED:
            host = self._host
            # A copy of the endpoint's context: the caller of this method may run in the context of another request.
            self.task = asyncio.Task(self.run(), loop=host.loop, context=host.context.copy())

    def refuse(self, code: int, detail: bytes) -> None:
        """Refuse the request, whose handler has not begun."""
        self.outcome = Outcome.REFUSED
        self.stream.abort(f.REJECT, code, detail)
        if code == f.RejectCode.OVERLOADED:
            self._host.report_refusal(self.context, f.read_overloaded(detail)[0])
        self.over()

    def expire(self) -> None:
        """End the request, because its deadline has passed."""
        if self.outcome is OK:
            self.stream.abort(f.ERROR, f.ErrorCode.DEADLINE)
            self._caller_left(Outcome.DEADLINE)

    def over(self) -> None:
        """Count the request, and release what it held."""
        if self._timer is not None:
            self._timer.cancel()
        if self.state == CLEANING:
            self._host.lingering.ended(self)
        self.state = OVER
        self.items = None
        self._host.stats.ended[self.outcome] += 1
        if self.began:
            self._count_times(self._host.stats, monotonic())
        self.context.over = True
        self._invalid = None
        self.stream.owner = None  # Ends a reference cycle, which only the collector would free.
        if self.observed is not None:
            self._tell_end(self.observed)

    def _tell_end(self, observed: ObservedRequest) -> None:
        """Tell the observers that the request has ended, and where its time went."""
        self.observed = None
        ended, began, queued_s = monotonic(), observed.began, self.queued_s
        if not began:
            timing = Timing(ended - self.came, worker_queue_s=ended - self.came)
        else:
            blocked_s = self.stream.blocked_s
            timing = Timing(
                total_s=ended - self.came,
                worker_queue_s=queued_s,
                loop_wait_s=began - self.came - queued_s,
                handler_s=max(0.0, ended - began - blocked_s),
                reader_s=blocked_s,
                first_item_s=self.first - self.came if self.first else None,
            )
        observed.ended(self.outcome.name.lower(), timing)

    async def run(self) -> None:
        """Serve the request: the body of its task."""
        self.state = RUNNING
        self.began = monotonic()
        stream, host, handler = self.stream, self._host, self._host.handler
        current.set(self.context)
        sent = 0
        timed = handler.is_coroutine  # Its item is its end.
        error: BaseException | None = None
        try:
            try:
                if self.observed is not None:
                    self.observed.begin(self.began)
                body, buffers, self._body, self._buffers = self._body, self._buffers, b"", None
                request: Any
                if handler.takes_stream:
                    self._check_not_stopped()
                    request = RequestStream(stream, self.context.id, body, buffers, self._decode, self._split)
                elif stream.state < RECEIVED or not len(body):
                    raise self._unfit()
                else:
                    request = self._decode(body, buffers)
                stream.begun = True
                if stream.asked:
                    stream.tell_begun()
                items = self.items = handler.open(request, self.context)
                check = handler.check
                del body, buffers, request  # They are not needed while the handler runs; a request may be large.
                async for item in items:
                    kind = item.__class__
                    if kind is not Annotated and kind is not Ready:
                        sent += 1
                        if check is not None:
                            check(item)
                        data = encode(item, "item")
                        if data.__class__ is bytes and (size := len(data)) <= SMALL:
                            if stream.queued and not stream.item_flags:  # As `push`, without a call for each item.
                                stream.outbox.append(data)
                                stream.quota -= size + ITEM_COST
                            else:
                                if not timed:
                                    timed = True
                                    self.first = monotonic()
                                stream.push(data)
                            if stream.quota <= 0:
                                await stream.writable()
                                if stream.state == CLOSED:
                                    break  # The handler has ignored its cancellation.
                        elif isinstance(data, bytes):
                            self.first = self.first or monotonic()
                            await stream.send(data, ())
                        else:
                            self.first = self.first or monotonic()
                            await stream.send(data.body, data.buffers)
                            del data  # A bytearray cannot be resized while something refers to its memory.
                    elif kind is Ready:  # Items of a plain handler.
                        self.first = self.first or monotonic()
                        sent += await self._send_ready(item)
                        if stream.state == CLOSED:
                            break
                    else:
                        sent += 1
                        if check is not None and item.data() is not None:
                            check(item.data())
                        self.first = self.first or monotonic()
                        await self._send_annotated(item)
                else:
                    self._end_well(sent)
                    return
            except BaseException as raised:  # Any error is the caller's. What follows awaits, which `except` must not.
                error = raised
            await self._end_early(error, sent)
        finally:
            error = None  # It refers to this frame.
            self.over()
            host.gate.ended(self)

    def _end_well(self, sent: int) -> None:
        """End a request whose handler has ended well, after `sent` items. The worker's times travel with the end."""
        host, stream, now = self._host, self.stream, monotonic()
        stats, came, began, first = host.stats, self.came, self.began, self.first
        stats.items += sent
        if now - came >= host.times_from_s and stream.connection.timed:
            queued_s = self.queued_s
            stream.end(_times(queued_s, began - came - queued_s, now - began, stream.blocked_s))
        else:
            stream.end()
        if first and now - first > AT_ONCE_S:
            self._count_times(stats, now)
            return
        self.began = 0.0
        if began - came > SHORT_S:
            self._count_waits(stats, began - came)
        fresh = stats.whole
        fresh.append(now - came)
        if len(fresh) >= MOST_FRESH:
            stats.try_count()

    def _count_times(self, stats: RequestStats, now: float) -> None:
        """Count the times of a request that ends now, long after its handler began and made its first item, if any."""
        came, began, fresh = self.came, self.began, stats.duration.fresh
        self.began = 0.0
        if began - came > SHORT_S:
            self._count_waits(stats, began - came)
        if self.first:
            stats.first_item.fresh.append(self.first - came)
        fresh.append(now - came)
        if len(fresh) >= MOST_FRESH:
            stats.try_count()

    def _count_waits(self, stats: RequestStats, waited_s: float) -> None:
        """Count how long the request waited until its handler began, if that is worth counting."""
        queued_s = self.queued_s
        if queued_s:
            stats.queue_wait.fresh.append(queued_s)
        if waited_s - queued_s > SHORT_S:
            stats.loop_wait.fresh.append(waited_s - queued_s)

    async def _end_early(self, error: BaseException | None, sent: int) -> None:
        """End a request whose handler has raised an error, or ignores its cancellation.

        Args:
            error: what it has raised, or None.
            sent: the number of its items.
        """
        thrown: BaseException | None = None
        if error is None:
            self.outcome = self.outcome or Outcome.CANCELLED
        elif isinstance(error, asyncio.CancelledError):
            thrown = self._cancelled(error, sent)
        else:
            self._failed(error)
            if not isinstance(error, (Exception, SystemExit)):  # KeyboardInterrupt and the like end the loop.
                if self.task is not None:
                    self.task.add_done_callback(asyncio.Task.exception)  # So asyncio need not log it.
                raise error
        await _close(self.items, thrown)
        if isinstance(error, SystemExit):  # The process has to end as after SIGTERM, after its other requests.
            self._host.on_exit(error)

    def _unfit(self) -> InvalidRequest:
        """The error of a caller that streams its requests to a handler of one. All of them may have arrived."""
        self._check_not_stopped()
        name = self._host.handler.name
        self._invalid = error = InvalidRequest(
            "", f"handler {name} takes one request; annotate its parameter as AsyncIterator[…] for a stream"
        )
        return error

    def _check_not_stopped(self) -> None:
        """Raise CancelledError if the caller has stopped the request of a handler that could not notice it."""
        if self.context.is_stopped() and self._host.interrupt and not self._host.handler.takes_context:
            raise asyncio.CancelledError

    def _decode(self, body: Body, buffers: list[Memory] | None) -> Any:
        try:
            return self._host.handler.decode(body, buffers)
        except (InvalidRequest, DecodeError) as error:
            self._invalid = error
            raise

    def _split(self, batch: Body) -> list[Any]:
        try:
            return split(batch)
        except DecodeError as error:
            self._invalid = error
            raise

    async def _send_ready(self, ready: Ready) -> int:
        """Send items that were encoded in their thread. Returns their number."""
        stream, sent = self.stream, 0
        while ready:
            item = ready.popleft()
            sent += 1
            if isinstance(item, Encoded):
                await self._send_encoded(item)
            elif stream.push(item):
                await stream.writable()
            if stream.state == CLOSED:
                break
        return sent

    async def _send_encoded(self, item: Encoded) -> None:
        stream = self.stream
        if item.token is not None:
            stream.checkpoint(item.token)
        if item.buffers or item.flags or len(item.body) > SMALL:
            await stream.send(item.body, item.buffers, item.flags)
            item.buffers = []  # The handler could not resize an exported bytearray.
            item.written = True
        elif stream.push(item.body):
            await stream.writable()

    async def _send_annotated(self, item: Annotated) -> None:
        data = encode(parts(item), "item")
        body, buffers = (data, ()) if isinstance(data, bytes) else (data.body, data.buffers)
        await self.stream.send(body, buffers, f.ANNOTATED)

    def _cancelled(self, error: BaseException, sent: int) -> BaseException | None:
        """End a request whose handler raised CancelledError: because of our cancellation or a stop, or by itself.

        Returns:
            the error to raise at the `yield` at which a generator may be suspended. It has not seen the cancellation,
            and its `finally` blocks run now.
        """
        if self.state == CLEANING or self._host.cancelled:
            self.outcome = self.outcome or Outcome.CUT
            if self.state != CLEANING:
                self.state = CLEANING
                self.context.cut()
            self.stream.abort(f.ERROR, f.ErrorCode.CANCELLED, b"the handler was cancelled")
            return asyncio.CancelledError()
        if self.context.is_stopped():  # It takes no context, or it has answered `is_stopped()` by raising this.
            self._end_well(sent)
        else:
            self._failed(error)
        return None

    def _failed(self, error: BaseException) -> None:
        if self.observed is not None:
            self.observed.error = error
        if error is self._invalid or isinstance(
            error, UnfitRequest
        ):  # An InvalidRequest that the handler got from its own call is the handler's error.
            self.outcome = Outcome.INVALID
            self.stream.abort(f.ERROR, f.ErrorCode.INVALID, str(error).encode("utf-8", "replace"))
            return
        self.outcome = self.outcome or Outcome.ERROR
        if isinstance(error, MessageTooLarge):
            logger.warning("%s: %s", self._host.name, error)
        self._host.report(self.context, error)
        detail = encode_error(error, full_tracebacks=self._host.full_tracebacks)
        self.stream.abort(f.ERROR, f.ErrorCode.HANDLER, detail)


def split(batch: Body) -> list[Any]:
    """Return the encoded items of a BATCH; each is decoded against the handler's types later.

    Raises:
        DecodeError: the batch is malformed, or has more than `MOST_ITEMS` items: 262,000 of one byte would take 25 MB.
    """
    if f.array_length(batch) > f.MOST_ITEMS:
        raise DecodeError(f"a batch of {f.array_length(batch):,} items, the limit is {f.MOST_ITEMS:,}")
    try:
        return _split(batch)
    except msgspec.DecodeError as error:
        raise caused(DecodeError(f"a malformed batch: {error}"), error)


async def _close(items: Any, error: BaseException | None) -> None:
    if items is None:
        return
    with contextlib.suppress(StopAsyncIteration, asyncio.CancelledError, GeneratorExit, RuntimeError):
        if error is not None and hasattr(items, "athrow"):
            try:
                await items.athrow(error)
            finally:
                error.__traceback__ = (
                    None  # It refers to frames that refer to the error: both would wait for the collector.
                )
    try:
        if hasattr(items, "aclose"):
            await items.aclose()
    except (asyncio.CancelledError, RuntimeError):
        pass  # The handler is in its own clean-up, or refuses to end. No caller waits for an answer.
    except Exception:  # The user's clean-up may raise anything.
        logger.warning("a handler raised an error while it was closed", exc_info=True)

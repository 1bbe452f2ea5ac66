"""One request being served: its handler's task from the first step to the last frame."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from triton_distributed.annotated import Annotated, parts
from triton_distributed.context import current
from triton_distributed.errors import DecodeError, InvalidRequest, MessageTooLarge
from triton_distributed.observe import Outcome
from triton_distributed.payload.codec import encode
from triton_distributed.payload.exceptions import encode_error
from triton_distributed.serving.handler_context import ServedContext
from triton_distributed.serving.handlers import Misfit
from triton_distributed.serving.plain import Encoded, Ready
from triton_distributed.serving.request_stream import RequestStream
from triton_distributed.transport.stream import Stream
from triton_distributed.wire import frames as f
from triton_distributed.wire.assembly import Body, Memory
from triton_distributed.wire.states import CLOSED

if TYPE_CHECKING:
    from triton_distributed.serving.endpoint import ServedEndpoint

logger = logging.getLogger("triton_distributed.runtime")

SMALL = f.SMALL
INFINITE = float("inf")


class Serving:
    """A request and the task of its handler.

    Attributes:
        stream: where the request came from and the items go.
        context: what the handler sees.
        admitted: it has its place among those that run; its handler begins as soon as the caller can know.
        started: when it was admitted, on the loop's clock; 0 where nobody measures.
        due: when it should have ended by the estimate when it came, on the same clock; 0 where there was none.
        task: None before the handler begins.
        items: what the handler makes, while it runs.
        outcome: how it ended, known early where something else than the handler ended it.
    """

    __slots__ = (
        "_began",
        "_body",
        "_buffers",
        "_cut",
        "_endpoint",
        "_invalid",
        "_timer",
        "admitted",
        "context",
        "due",
        "items",
        "outcome",
        "started",
        "stream",
        "task",
    )

    def __init__(
        self, endpoint: ServedEndpoint, stream: Stream, context: ServedContext, body: Body, buffers: list[Memory] | None
    ) -> None:
        self._endpoint = endpoint
        self._began = self._cut = self.admitted = False
        self._invalid: Exception | None = None
        self.started = self.due = 0.0
        self._body = body
        self._buffers = buffers
        self._timer: asyncio.TimerHandle | None = None
        self.context = context
        self.outcome: Outcome | None = None
        self.stream = stream
        self.task: asyncio.Task[None] | None = None
        self.items: AsyncIterator[Any] | None = None
        stream.owner = self

    def watch_deadline(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        """End the request when its time is over, whether it runs or waits."""
        self._timer = loop.call_at(deadline, self.expire)

    def left_s(self, loop: asyncio.AbstractEventLoop) -> float:
        """Seconds until its time is over; infinite where it has no deadline."""
        deadline = self.context.deadline
        return INFINITE if deadline is None else deadline - loop.time()

    # the owner of a stream

    def stream_ended(self) -> None:
        """The caller has sent all of its request."""

    def stream_closed(self, stream: Stream) -> None:
        """The caller cancelled, or is gone."""
        self.cancel(Outcome.LOST if stream.lost is not None else Outcome.CANCELLED)

    def stream_silent(self, stream: Stream, words: str) -> None:
        """Only callers ask for a sign of life."""

    def stream_stopped(self) -> None:
        """The caller asks the handler to finish by itself."""
        self.context.stop_generating()

    def cancel(self, outcome: Outcome) -> None:
        """Raise CancelledError in the handler at its current await, and cancel the calls it has made."""
        if self.outcome is None:
            self.outcome = outcome
        if self._cut:
            return  # it is cleaning up, and a second cancellation would cut that
        self._cut = True
        self.context.cut()
        if self.task is not None:
            self.task.cancel()
            self._endpoint.lingering.watch(self)
        if not self.admitted:
            self._endpoint.left_queue(self)
            self.over()
        elif not self._began:  # cancelled before its first step, a task does not even enter its function
            self.stream.abort(f.REJECT, f.RejectCode.DRAINING, b"it is shutting down")  # whose caller goes elsewhere
            self.over()
            self._endpoint.finished(self)

    def begin(self) -> None:
        """The caller can know that the handler begins: start its task, unless the request was cancelled meanwhile."""
        if self.outcome is None:
            endpoint = self._endpoint
            # A copy of the endpoint's context: whoever calls this may be in the context of another request.
            self.task = asyncio.Task(self.run(), loop=endpoint.loop, context=endpoint.context.copy())

    def refuse(self, code: int, detail: bytes) -> None:
        """Refuse it: its handler has not begun."""
        self.outcome = Outcome.REFUSED
        self.stream.abort(f.REJECT, code, detail)
        self.over()

    def expire(self) -> None:
        """Its time is over."""
        if self.outcome is None:
            self.stream.abort(f.ERROR, f.ErrorCode.DEADLINE)
            self.cancel(Outcome.DEADLINE)

    def over(self) -> None:
        """Count it, and let go of what it held."""
        if self._timer is not None:
            self._timer.cancel()
        self.items = None
        self._endpoint.stats.ended[self.outcome or 0] += 1
        self.context.over = True
        self._invalid = None
        self.stream.owner = None  # they refer to each other, and nobody waits for a collector

    async def run(self) -> None:
        """Serve it: the body of its task."""
        self._began = True
        stream, endpoint = self.stream, self._endpoint
        current.set(self.context)
        items: AsyncIterator[Any] | None = None
        sent = 0
        try:
            body, buffers, self._body, self._buffers = self._body, self._buffers, b"", None
            request: Any
            if endpoint.handler.takes_stream:
                request = RequestStream(stream, self.context.id, body, buffers, self._decode, self._split)
            else:
                request = self._request(body, buffers)
            items = self.items = endpoint.handler.open(request, self.context)
            check, push = endpoint.handler.check, stream.push
            async for item in items:
                kind = item.__class__
                if kind is not Annotated and kind is not Ready:
                    sent += 1
                    if check is not None:
                        check(item)
                    data = encode(item, "item")
                    if data.__class__ is bytes and len(data) <= SMALL:
                        if push(data):
                            await stream.writable()
                            if stream.state == CLOSED:
                                break  # the handler has ignored its cancellation
                    elif isinstance(data, bytes):
                        await stream.send(data, ())
                    else:
                        await stream.send(data.body, data.buffers)
                        del data  # a bytearray cannot be resized while something refers to its memory
                elif kind is Ready:  # of a plain handler
                    sent += await self._send_ready(item)
                    if stream.state == CLOSED:
                        break
                else:
                    sent += 1
                    if check is not None and item.data() is not None:
                        check(item.data())
                    await self._send_annotated(item)
            else:
                endpoint.stats.items += sent
                stream.end()
                return
            self.outcome = self.outcome or Outcome.CANCELLED
            await _close(items, None)
        except asyncio.CancelledError as error:
            await self._cancelled(items, error, sent)
        except Exception as error:
            self._failed(error)
            await _close(items, None)
        except SystemExit as error:  # this process is to end: like at SIGTERM, when what else runs here is done
            self._failed(error)
            await _close(items, None)
            endpoint.on_exit(error)
        except BaseException as error:  # KeyboardInterrupt and the like: tell the caller, then let it through
            self._failed(error)
            if self.task is not None:
                self.task.add_done_callback(asyncio.Task.exception)  # it is told by ending the loop
            raise
        finally:
            self.over()
            endpoint.finished(self)

    def _request(self, body: Body, buffers: list[Memory] | None) -> Any:
        handler = self._endpoint.handler
        if not self.stream.finished or not len(body):  # a stream that has ended by now, with its items in the inbox
            self._invalid = InvalidRequest(
                "", f"handler {handler.name} takes one request; annotate its parameter as AsyncIterator[…] for a stream"
            )
            raise self._invalid
        return self._decode(body, buffers)

    def _decode(self, body: Body, buffers: list[Memory] | None) -> Any:
        try:
            return self._endpoint.handler.decode(body, buffers)
        except (InvalidRequest, DecodeError) as error:
            self._invalid = error
            raise

    def _split(self, batch: Body) -> list[Any]:
        try:
            return self._endpoint.split(batch)
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
            item.buffers = []  # an exported bytearray could not be resized
            item.written = True
        elif stream.push(item.body):
            await stream.writable()

    async def _send_annotated(self, item: Annotated) -> None:
        data = encode(parts(item), "item")
        body, buffers = (data, ()) if isinstance(data, bytes) else (data.body, data.buffers)
        await self.stream.send(body, buffers, f.ANNOTATED)

    async def _cancelled(self, items: Any, error: BaseException, sent: int) -> None:
        """The handler has ended with CancelledError: ours, its answer to a stop, or its own."""
        if self._cut or self._endpoint.cancelled:
            self.outcome = self.outcome or Outcome.CANCELLED
            if not self._cut:
                self.context.cut()
            self.stream.abort(f.ERROR, f.ErrorCode.CANCELLED, b"the handler was cancelled")
            # A generator that was parked at its `yield` has not seen the cancellation: its finally blocks run now.
            await _close(items, asyncio.CancelledError())
        elif self.context.is_stopped():  # programs obey `is_stopped()` by raising it
            self._endpoint.stats.items += sent
            self.stream.end()
            await _close(items, None)
        else:
            self._failed(error)
            await _close(items, None)

    def _failed(self, error: BaseException) -> None:
        if error is self._invalid or isinstance(
            error, Misfit
        ):  # one that the handler got from elsewhere is its own error
            self.outcome = Outcome.INVALID
            self.stream.abort(f.ERROR, f.ErrorCode.INVALID, str(error).encode("utf-8", "replace"))
            return
        self.outcome = self.outcome or Outcome.ERROR
        if isinstance(error, MessageTooLarge):
            logger.warning("%s: %s", self._endpoint.name, error)
        self._endpoint.report(self.context, error)
        detail = encode_error(error, full_tracebacks=self._endpoint.full_tracebacks)
        self.stream.abort(f.ERROR, f.ErrorCode.HANDLER, detail)


async def _close(items: Any, error: BaseException | None) -> None:
    if items is None:
        return
    with contextlib.suppress(StopAsyncIteration, asyncio.CancelledError, GeneratorExit, RuntimeError):
        if error is not None and hasattr(items, "athrow"):
            await items.athrow(error)
    try:
        if hasattr(items, "aclose"):
            await items.aclose()
    except (asyncio.CancelledError, RuntimeError):
        pass  # it is running its own cleanup, or refuses to end: nobody is left to tell
    except Exception:
        logger.warning("a handler raised while it was closed", exc_info=True)

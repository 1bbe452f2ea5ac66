"""One endpoint that this runtime serves: who is let in, who waits, who runs."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from triton_distributed.errors import DecodeError
from triton_distributed.names import EndpointName, Instance
from triton_distributed.observe import Outcome, Stats
from triton_distributed.runtime.admission import Admission, Places
from triton_distributed.runtime.context import HIGHEST_PRIORITY, ID, LOWEST_PRIORITY, PRIORITY, RESUME, Context
from triton_distributed.runtime.handlers import Handler
from triton_distributed.runtime.serving import Serving
from triton_distributed.runtime.standstill import Standstill
from triton_distributed.transport.stream import Stream
from triton_distributed.wire.assembly import Body, Memory
from triton_distributed.wire.codec import encode
from triton_distributed.wire.frames import MOST_ITEMS, SMALL, RejectCode, array_length, overloaded

_INFINITE = float("inf")
logger = logging.getLogger("triton_distributed.runtime")

QUIET_S = 10.0  # a handler that fails at every request must not fill a disk
MOST_KINDS = 64  # types of errors that are remembered
_CUT_SHORT = (Outcome.CANCELLED, Outcome.LOST, Outcome.DEADLINE)
CUT_S = 1.0  # what a handler that was cut has for its finally blocks before the runtime goes on without it
_metadata = msgspec.msgpack.Decoder(dict[str, Any]).decode
_split = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode


class ServedEndpoint:
    """An endpoint, its handler, and the requests that are here.

    Args:
        loop: the running loop.
        name: of the endpoint.
        handler: what serves it.
        places: of the worker, shared by its endpoints.
        max_inflight: handlers that may run at once; None for as many as sessions may bring.
        max_queue: requests that may wait for one of them; beyond it they are refused at once.
        graceful: a drain lets what runs finish; else it is cut at once.
        standstill: of the worker, told when a request has to wait.
        on_exit: called where a handler has raised SystemExit.

    Attributes:
        instance: what is registered.
        admission: who waits.
        running: the requests whose handlers run, in the order in which they were let in.
        draining: no further request is let in.
        registered: discovery has taken it in; it may have been paused since.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: EndpointName,
        handler: Handler,
        instance: Instance,
        places: Places,
        *,
        max_inflight: int | None,
        max_queue: int,
        graceful: bool,
        standstill: Standstill,
        on_exit: Callable[[SystemExit], None],
    ) -> None:
        self.loop = loop
        self.name = name
        self.handler = handler
        self.instance = instance
        self.admission = Admission(max_inflight, max_queue)
        self.draining = self.registered = False
        self.graceful, self.on_exit = graceful, on_exit
        self._places = places
        self._standstill = standstill
        self.running: dict[Serving, None] = {}
        self.stats = Stats()
        self._reported: dict[str, tuple[float, int]] = {}  # type of error → when it was logged, how many since
        self.context = contextvars.copy_context()  # every handler begins in a copy of it
        self._idle: asyncio.Future[None] | None = None

    def admit(self, stream: Stream, timeout_s: float, metadata: Body, body: Body, buffers: list[Memory] | None) -> None:
        """Let a request in, let it wait, or refuse it."""
        context = _context(stream, metadata) if metadata else ServedContext(stream)
        serving = Serving(self, stream, context, body, buffers)
        if self.draining:
            serving.refuse(RejectCode.DRAINING, b"it is shutting down")
            return
        places, streams = self._places, stream.connection.streams
        if len(streams) > places.most - places.taken:
            serving.refuse(RejectCode.OVERLOADED, overloaded(places.refusal(len(streams))))
            return
        if timeout_s != _INFINITE:
            if not timeout_s > 0:
                serving.expire()
                return
            context.deadline = self.loop.time() + timeout_s
            serving.watch_deadline(self.loop, context.deadline)
        limit = self.admission.max_inflight
        if limit is None or len(self.running) < limit:
            self._start(serving)
        else:
            self._let_wait(serving, timeout_s)

    def _let_wait(self, serving: Serving, timeout_s: float) -> None:
        admission, priority = self.admission, serving.context.priority
        wait_s = admission.wait_s(priority)
        if not admission.in_time(priority, timeout_s):
            words = (
                f"it would wait about {wait_s:.3g} s and take {admission.mean_s:.3g} s, "
                f"and its deadline is in {timeout_s:.3g} s"
            )
            self._refuse(serving, words)
            return
        if admission.mean_s:
            serving.due = self.loop.time() + wait_s + admission.mean_s
        cut = admission.enter(serving, priority)
        if cut is not serving:
            self._standstill.waits()
        if cut is not None:
            oldest_s = self.loop.time() - next(iter(self.running)).started
            words = (
                f"{len(self.running)} requests run, the oldest for {oldest_s:.3g} s, and {len(admission)} wait, which "
                f"is all it takes: max_inflight={admission.max_inflight}, max_queue={admission.max_queue}"
            )
            self._refuse(cut, words)

    def _refuse(self, serving: Serving, words: str) -> None:
        """Refuse a request for which there is no place, and say when there will be one."""
        hint_s = self.admission.retry_after_s(serving.context.priority, self.running, self.loop.time())
        serving.refuse(RejectCode.OVERLOADED, overloaded(words, hint_s))

    def _start(self, serving: Serving) -> None:
        """Tell the caller that the handler begins, then let it begin in a later step of the loop."""
        self.running[serving] = None
        self._places.taken += 1
        self.stats.inflight += 1
        admission = self.admission
        if admission.max_inflight is not None:
            serving.started = self.loop.time()
            if admission.mean_s and not serving.due:
                serving.due = serving.started + admission.mean_s
        serving.admitted = True
        serving.stream.connection.accept(serving.stream, serving.begin)

    def finished(self, serving: Serving) -> None:
        """A handler has ended: the next in the queue may begin."""
        self.running.pop(serving, None)
        self._places.taken -= 1
        self.stats.inflight -= 1
        if serving.started:
            self._learn(serving)
        if not self.draining:
            self._let_in()
        if not self.running and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _let_in(self) -> None:
        """Start the next in the queue, where there is one; one that would be late is refused for the sake of others."""
        admission = self.admission
        while (waiting := admission.next()) is not None:
            left_s = waiting.left_s(self.loop)
            if left_s >= admission.mean_s or not len(admission):
                self._start(waiting)
                return
            priority = waiting.context.priority
            if waiting.due:  # it would have ended no sooner than that
                admission.ended(priority, self.loop.time() + admission.mean_s - waiting.due, whole=False)
            words = f"it has waited until {left_s:.3g} s are left, and would take {admission.mean_s:.3g} s"
            self._refuse(waiting, words)

    def left_queue(self, serving: Serving) -> None:
        """A request that waited was cancelled, or its time is over."""
        self.admission.leave(serving, serving.context.priority)
        self._learn(serving)

    def _learn(self, serving: Serving) -> None:
        """Compare a request that has ended with what was expected of it."""
        now, whole = self.loop.time(), serving.outcome not in _CUT_SHORT
        if serving.started:
            self.admission.took(now - serving.started, whole)
        if serving.due:
            self.admission.ended(serving.context.priority, now - serving.due, whole)

    @staticmethod
    def split(batch: Body) -> list[Any]:
        """The encoded items of a BATCH, to be decoded one by one against the handler's types.

        Raises:
            DecodeError: it is none, or has more than `MOST_ITEMS`: 262,000 of a byte each would take 25 MB.
        """
        if array_length(batch) > MOST_ITEMS:
            raise DecodeError(f"a batch of {array_length(batch):,} items, the limit is {MOST_ITEMS:,}")
        try:
            return _split(batch)
        except msgspec.DecodeError as error:
            raise DecodeError(f"a batch that is none: {error}") from error

    def drain(self) -> None:
        """Let nobody in any more; what waits is refused, so that it goes elsewhere, and what runs goes on."""
        self.draining = True
        for serving in self.admission.clear():
            serving.refuse(RejectCode.DRAINING, b"it is shutting down")

    def report(self, context: Context, error: BaseException) -> None:
        """Log what a handler raised: one traceback in `QUIET_S` for each type of error, the others by their number."""
        kind, now = type(error).__qualname__, self.loop.time()
        since, unsaid = self._reported.get(kind, (-QUIET_S, 0))
        if now - since < QUIET_S:
            self._reported[kind] = (since, unsaid + 1)
            logger.debug("handler %s raised", self.handler.name, exc_info=error)
            return
        if len(self._reported) >= MOST_KINDS:
            self._reported.clear()
        self._reported[kind] = (now, 0)
        more = f" ({unsaid} more like it since the last report)" if unsaid else ""
        logger.warning("%s: request %s: the handler raised%s", self.name, context.id(), more, exc_info=error)

    async def idle(self) -> None:
        """Wait until no handler runs. One waiter at a time."""
        while self.running:
            self._idle = self.loop.create_future()
            await self._idle

    async def cut(self) -> list[str]:
        """Cancel what still runs and wait for it; returns the ids of those requests.

        Those whose handlers have not begun are refused, so that they go elsewhere.
        """
        running = list(self.running)
        for serving in running:
            serving.cancel(Outcome.CANCELLED)
        cut = {each.task: each.context.id() for each in running if each.task is not None}
        if cut:
            await asyncio.wait(cut, timeout=CUT_S)
        return list(cut.values())


def _context(stream: Stream, metadata: Body) -> Context:
    try:
        values = _metadata(metadata)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ServedContext(stream)  # metadata is advice; the request itself is judged by its own bytes
    name, priority = values.pop(ID, None), values.pop(PRIORITY, 0)
    context = ServedContext(stream)
    context.resume_token = values.pop(RESUME, None)
    context.metadata = values
    if isinstance(name, str):
        context._id = name
    if isinstance(priority, int):
        context.priority = max(LOWEST_PRIORITY, min(priority, HIGHEST_PRIORITY))
    return context


class ServedContext(Context):
    """A context whose id, unless the caller chose one, is composed from its session and stream when asked for."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def now(self) -> float:
        return self._stream.connection.loop.time()

    def attach_token(self, token: bytes) -> None:
        self._stream.checkpoint(token)

    def checkpoint(self, token: Any) -> None:
        data = encode(token, "token")
        if not isinstance(data, bytes) or len(data) > SMALL:
            raise ValueError(f"a resume token has at most {SMALL:,} bytes and holds no arrays")
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # a plain generator in a thread, ahead of what was sent: the token goes the items' way
            self._pending_token = data
        else:
            self._stream.checkpoint(data)

    def id(self) -> str:
        if self._id is None:
            peer = self._stream.connection.peer
            self._id = f"{peer.nonce if peer else 0:x}-{self._stream.id:x}"
        return self._id

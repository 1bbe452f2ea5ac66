"""One end of a stream: what waits to be sent, what was received and not yet read, and the credit of both ends.

No I/O and no waiting: the shell around it (transport.stream) overrides `on_readable`, `on_writable` and `on_closed`.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from triton_distributed.compiled import mypyc_attr
from triton_distributed.errors import LocalProtocolError, RemoteProtocolError
from triton_distributed.wire import frames as f
from triton_distributed.wire.assembly import Assembly, Body, Borrow, Memory
from triton_distributed.wire.frames import BATCH, DATA, END, END_OF_STREAM, MORE, TIMES
from triton_distributed.wire.hello import Hello
from triton_distributed.wire.states import CLOSED, IDLE, ILLEGAL, RECEIVED, SENDING, State
from triton_distributed.wire.window import (
    FRAME_COST,
    FREE_BYTES,
    HELD_STEP,
    ITEM_COST,
    LENT_COST,
    SLACK,
    TURN_BYTES,
    ByteBudget,
)

_pack: Final = f.HEADER.pack
_PAIR: Final = b"\x92"  # msgpack's array of two
_NIL: Final = b"\xc0"
_PART: Final = f.MORE | f.BUFFERS
_DATA: Final = 2  # `Input.DATA`
_DATA_END: Final = 3  # `Input.DATA_END`
Received = tuple[int, int, int, Body, "list[Memory] | None"]  # cost, kind, flags, body, buffers
# The inbox of every stream that has received nothing: an empty deque takes 760 bytes. Nothing can be added to this one.
UNUSED: Final[deque[Received]] = deque(maxlen=0)


@mypyc_attr(allow_interpreted_subclasses=True)
class Link:
    """What a stream needs from its connection.

    Attributes:
        hello: this end's hello.
        out: frames that wait to be written.
        held: counts the bytes that streams opened by peers hold here; None for no limit.
        max_message: the largest message accepted, bytes.
        turn_bytes: bytes that one stream may produce in a turn of the loop.
        timed: both ends know the flag TIMES.
        read_at: when bytes were last read, on `time.monotonic`; the shell sets it.
        borrow: finds shared memory of the peer.
    """

    hello: Hello
    out: list[bytes]
    held: ByteBudget | None
    max_message: int
    turn_bytes: int
    timed: bool
    read_at: float
    borrow: Borrow

    def enqueue(self, stream: StreamCore) -> None:
        """Note that `stream` has items to send this turn."""
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        """Queue one frame for this turn's write."""
        raise NotImplementedError

    def forget(self, stream: StreamCore) -> None:
        """Drop a closed stream."""
        raise NotImplementedError

    def announced(self, size: int) -> bool:
        """Note a message of `size` bytes under way; a negative size takes it back. True: all may come at once."""
        raise NotImplementedError

    def requested(self, number: int, payload: Body, buffers: list[Memory]) -> None:
        """Serve the request of stream `number`, which came in several parts and is complete now."""
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class StreamCore:
    """One end of a stream.

    Attributes:
        id: its number in the session.
        state: a `wire.states.State`.
        counted: bytes of this stream in the `ByteBudget` of its connection.
        credit: bytes that this end may still send; at or below 0 it waits.
        quota: bytes, roughly, that this end may still push in this turn of the loop.
        accepted: the worker has announced that the handler is about to begin.
        asked: the caller has asked whether the handler has begun.
        begun: the request was decoded, and its handler has begun. The caller knows this only if it has asked.
        queued: it is in its connection's list of streams that have something to send this turn.
        item_flags: flags of the frames that carry its items; 0 without resume tokens.
        inbox: received messages that were not read yet; bounded by `window`.
        failure: the frame that ended the stream early, as (kind, code, detail), or None.
        window: bytes that the peer may have sent and this end not read.
        times: what the worker has measured, four 32-bit floats in seconds: the request's wait in the queue, its wait
            for the loop, the run of its handler, and of that the wait for the reader. They travel at the end of an
            answer, if both ends know them. Empty before, and if the handler did not end well.
    """

    __slots__ = (
        "_assembly",
        "_count_from",
        "_credit_due",
        "_ending",
        "_most",
        "_token",
        "_unread",
        "accepted",
        "asked",
        "begun",
        "connection",
        "counted",
        "credit",
        "failure",
        "id",
        "inbox",
        "item_flags",
        "outbox",
        "queued",
        "quota",
        "state",
        "times",
        "window",
    )

    def __init__(self, connection: Link, stream_id: int, credit: int, window: int) -> None:
        self.connection = connection
        self.id = stream_id
        self.state: int = IDLE
        self.credit = credit
        self.quota = credit if credit < TURN_BYTES else TURN_BYTES
        self.outbox: list[bytes] = []  # at most a turn's quota
        self.item_flags = 0
        self.queued = self._ending = False
        self._token: bytes | None = None  # of the next item, if items have tokens
        self.accepted = self.asked = self.begun = False
        self.inbox = UNUSED
        self.window = window
        # Bytes that the peer may send before it gets credit: the window if we opened the stream, else the window of
        # our hello.
        announced = connection.hello.window
        self._most = (window if window > announced else announced) + SLACK
        # Unread bytes beyond this are counted in `held`; without `held` they are a protocol error.
        self._count_from = self._most if connection.held is None else FREE_BYTES
        self._unread = self._credit_due = self.counted = 0
        self._assembly: Assembly | None = None
        self.failure: tuple[int, int, bytes] | None = None
        self.times = b""

    # sending

    def push(self, item: bytes) -> bool:
        """Queue one encoded item of at most `SMALL` bytes. True: wait for `may_push` before the next one."""
        if self._token is not None:
            item = paired(self, item)
        self.outbox.append(item)
        if not self.queued:
            self.queued = True
            self.connection.enqueue(self)
        self.quota = quota = self.quota - len(item) - ITEM_COST
        return quota <= 0

    @property
    def may_push(self) -> bool:
        """There is credit, and quota for this turn; or the stream is closed, and its writer must notice that."""
        return self.quota > 0 or self.state == CLOSED

    def checkpoint(self, token: bytes) -> None:
        """Attach this encoded token to the next item; all items are pairs from now on."""
        if self._token is None:
            self.settle()
            self.item_flags = f.CHECKPOINT
        self._token = token

    def end(self, times: bytes = b"") -> None:
        """Send no more items from this end.

        Args:
            times: see `times`; empty without times, or if the peer does not know them.
        """
        if self.state == CLOSED:
            return
        self.times = times
        self._ending = True
        if not self.queued:
            self.queued = True
            self.connection.enqueue(self)

    def drain(self, out: list[bytes]) -> int:
        """Append the waiting items to `out` as frames; returns their bytes. The connection calls this once a turn."""
        self.queued = False
        items = self.outbox
        if self.state == CLOSED:
            items.clear()
            return 0
        ending = self._ending
        after = SENDING[self.state][_DATA_END if ending else _DATA]
        if after == ILLEGAL:
            raise LocalProtocolError(f"items were sent on stream {self.id} in state {State(self.state).name}")
        flags, times = self.item_flags, b""
        if ending:
            flags |= END
            if self.times:
                times, flags = self.times, flags | TIMES
        if not items:
            if not ending:
                return 0
            size = 0
            out.append(_pack(len(times), f.END_OF_STREAM, flags, self.id))
        else:
            if len(items) == 1:
                kind, payload = DATA, items[0]
            else:
                kind, payload = BATCH, f.array_of(items)
            size = len(payload)
            if times:
                size += f.TIMES_BYTES
            out.append(_pack(size, kind, flags, self.id))
            out.append(payload)
            self.credit = credit = self.credit - size - FRAME_COST
            items.clear()
            waited = self.quota <= 0
            turn = self.connection.turn_bytes
            self.quota = credit if credit < turn else turn
            if waited and credit > 0:
                self.on_writable()
        if times:
            out.append(times)
        self.state = after
        if after == CLOSED:
            self.connection.forget(self)
        return size

    def settle(self) -> None:
        """Move the waiting items to the connection's output now: the shell is about to write a fragment after them."""
        if self.queued:
            self.drain(self.connection.out)
            self.queued = True  # it is still in the connection's list

    def charge(self, size: int, flags: int, lends: bool = False) -> None:
        """Account for a frame of `size` payload bytes that the shell writes itself, after the drained items.

        Args:
            lends: it is the first frame of a message with buffers in shared memory.
        """
        after = SENDING[self.state][_DATA_END if flags & f.END else _DATA]
        if after == ILLEGAL:
            raise LocalProtocolError(f"a fragment was sent on stream {self.id} in state {State(self.state).name}")
        self.credit -= size + FRAME_COST + LENT_COST * lends
        self.quota = min(self.credit, TURN_BYTES)
        self.state = after
        if after == CLOSED:
            self.connection.forget(self)

    def abort(self, kind: int, code: int = 0, detail: bytes = b"") -> None:
        """End the stream early, both ways: ERROR or REJECT with a code, or CANCEL. No effect on a closed stream."""
        if self.state in (CLOSED, IDLE):
            return
        if kind == f.ERROR and self.queued:
            self.drain(self.connection.out)  # items that were yielded before the error arrive before it
        payload = f.frame(kind, self.id) if kind == f.CANCEL else f.coded(kind, self.id, code, detail)
        self.state = CLOSED
        self.outbox.clear()
        self.drop_message()
        self.connection.send(payload)
        self.connection.forget(self)

    def ask_to_stop(self) -> None:
        """Ask the handler to finish on its own."""
        if self.state != CLOSED:
            self.connection.send(f.frame(f.CANCEL, self.id, b"", f.GRACEFUL))

    def ask_begun(self) -> None:
        """Ask the worker whether it has begun the handler. The request must have been sent before.

        The worker answers once it has decoded the request: with ACCEPT, or with ERROR if the request is invalid.
        """
        if not self.asked:
            self.asked = True
            self.tell_begun()

    def tell_begun(self) -> None:
        """Send ACCEPT on the stream: from a caller it is the question, from a worker the answer."""
        if self.state != CLOSED:
            self.connection.send(f.frame(f.ACCEPT, self.id))

    def accept_received(self, opened_here: bool) -> None:
        """Process ACCEPT: the worker's answer if this end opened the stream, else the caller's question."""
        if opened_here:
            self.begun = True
            self.on_readable()
        elif not self.asked:  # A repeated question gets no second answer.
            self.asked = True
            if self.begun:
                self.tell_begun()

    def granted(self, window: int) -> None:
        """Set the initial credit of a stream that the peer opened: the window in its request."""
        self.credit = window
        turn = self.connection.turn_bytes
        self.quota = window if window < turn else turn

    def credited(self, amount: int) -> None:
        """Add credit: the peer has read `amount` bytes."""
        self.credit = credit = self.credit + amount
        if self.quota <= 0 and not self.outbox:
            turn = self.connection.turn_bytes
            self.quota = credit if credit < turn else turn
        if credit > 0:
            self.on_writable()

    # receiving

    def received(self, kind: int, flags: int, payload: bytes) -> None:
        """Process a frame that carries items.

        Raises:
            RemoteProtocolError: the frame exceeds the credit, or does not continue the message under way.
        """
        cost = len(payload) + FRAME_COST
        self._unread = unread = self._unread + cost
        if unread > self._most:
            raise RemoteProtocolError(f"stream {self.id} has {unread:,} unread bytes, above its credit")
        if flags & TIMES:
            payload = _without_times(self, flags, payload)
            flags ^= TIMES
        if self._assembly is not None or flags & _PART:
            if not self._assemble(kind, flags, payload, cost):
                return
        elif unread > self._count_from and not self._hold_unread(unread):
            return
        elif kind != END_OF_STREAM:
            if self.inbox is UNUSED:
                self.inbox = deque()
            self.inbox.append((cost, kind, flags, payload, None))
        if not flags & MORE:
            self.on_readable()

    def _hold_unread(self, unread: int) -> bool:
        more = unread - self._credit_due - FREE_BYTES - self.counted  # due credit is for bytes that were read
        if more > 0 and not self.hold(max(HELD_STEP, more)):
            return False
        self._count_from = min(self._most, self._credit_due + FREE_BYTES + self.counted)
        return True

    def hold(self, count: int) -> bool:
        """Count more bytes of this stream in memory. False: they exceed the limit, and the stream was ended."""
        held = self.connection.held
        if held is None:
            return True
        if held.take(count):
            self.counted += count
            return True
        words = f"this process holds {held.bytes:,} bytes of requests, see TRD_MAX_HELD_BYTES"
        if self.accepted:
            self.abort(f.ERROR, f.ErrorCode.CANCELLED, words.encode())
        else:
            self.abort(f.REJECT, f.RejectCode.OVERLOADED, f.overloaded(words))
        self.on_closed()
        return False

    def let_go(self) -> None:
        """Release all counted bytes."""
        held = self.connection.held
        if self.counted and held is not None:
            held.bytes -= self.counted
            self.counted = 0
            self._count_from = min(self._most, self._credit_due + FREE_BYTES)

    def _assemble(self, kind: int, flags: int, payload: bytes, cost: int) -> bool:
        if kind == f.END_OF_STREAM or (flags & f.END and flags & f.MORE):
            raise RemoteProtocolError(f"stream {self.id} ended in the middle of a message")
        if self._assembly is None:
            connection = self.connection
            self._assembly = Assembly(kind, flags, payload, connection.max_message, connection.borrow)
            roomy = connection.announced(self._assembly.total)
            if lent := self._assembly.lent_bytes:
                cost += LENT_COST
                self._unread += LENT_COST
                if not self.hold(lent):
                    return False
            if roomy and flags & f.MORE and not self.inbox:
                # It may come at once, and no message waits before it. So give credit for the whole message: a large
                # message never waits for credit.
                self._assembly.granted = True
                self.read(cost + self._assembly.left, at_once=True)
                return self.hold(cost)
        elif kind != f.DATA:
            raise RemoteProtocolError(f"a message on stream {self.id} is continued by a frame of kind {kind}")
        else:
            self._assembly.write(memoryview(payload))
        return self.fragment_done(flags, cost)

    def fragment_done(self, flags: int, cost: int) -> bool:
        """Give credit for a fragment in place, or finish the message. False: too much is held, the stream ended."""
        assembly = self._assembly
        assert assembly is not None
        if not self.hold(cost):
            return False
        if assembly.granted:
            cost = FRAME_COST
        if flags & f.MORE:
            if assembly.granted or not self.inbox:  # the reader waits for this very message
                self.read(cost)
            else:
                self._credit_due += cost
            return True
        body, buffers = assembly.finish()
        self._assembly = None
        self.connection.announced(-assembly.total)
        if assembly.kind == f.REQUEST:
            self.read(cost)
            self.connection.requested(self.id, body, buffers)
        else:
            if self.inbox is UNUSED:
                self.inbox = deque()
            self.inbox.append((cost, f.DATA, flags, body, buffers))
        return True

    def drop_message(self) -> None:
        """Drop an incomplete message after the stream was aborted."""
        assembly, self._assembly = self._assembly, None
        if assembly is not None:
            self.connection.announced(-assembly.total)

    @property
    def assembly(self) -> Assembly | None:
        """The message that is being assembled."""
        return self._assembly

    def account(self, cost: int) -> None:
        """Count a frame that is not passed to `received`.

        Raises:
            RemoteProtocolError: the frame exceeds the credit.
        """
        self._unread = unread = self._unread + cost
        if unread > self._most:
            raise RemoteProtocolError(f"stream {self.id} has {unread:,} unread bytes, above its credit")

    def read(self, cost: int, at_once: bool = False) -> None:
        """Note that a frame of `cost` was consumed; credit is sent only once half the window is due."""
        if self.counted and not self.inbox and self._assembly is None and self.accepted:
            self.let_go()
        self._credit_due = owed = self._credit_due + cost
        if (owed * 2 >= self.window or at_once) and not self.finished:
            self._credit_due = 0
            self._unread -= owed
            while owed > f.MAX_CREDIT:
                self.connection.send(f.frame(f.CREDIT, self.id, f.UINT32.pack(f.MAX_CREDIT)))
                owed -= f.MAX_CREDIT
            self.connection.send(f.frame(f.CREDIT, self.id, f.UINT32.pack(owed)))

    @property
    def finished(self) -> bool:
        """Whether the peer sends nothing more."""
        return self.state >= RECEIVED

    # what the shell overrides

    def on_readable(self) -> None:
        """Called when a message was received, the stream ended, or the worker said that the handler has begun."""

    def on_writable(self) -> None:
        """Called when the stream has credit and quota again."""

    def on_stop(self) -> None:
        """Called when the peer asks the handler to finish on its own."""

    def on_closed(self) -> None:
        """Called when the stream ended early: see `failure`; None means the peer's CANCEL."""


def paired(stream: StreamCore, item: Body) -> bytes:
    """Return the next item of a stream with tokens: the pair of the item's token and itself."""
    token, stream._token = stream._token or _NIL, _NIL
    return b"".join((_PAIR, token, item))


def _without_times(stream: StreamCore, flags: int, payload: bytes) -> bytes:
    """Keep the worker's times, with which a last payload ends; returns the rest of it."""
    if not flags & f.END or len(payload) < f.TIMES_BYTES:
        raise RemoteProtocolError(f"a frame on stream {stream.id} has no times, although its flags say so")
    stream.times = payload[-f.TIMES_BYTES :]
    return payload[: -f.TIMES_BYTES]

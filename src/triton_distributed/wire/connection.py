"""One end of a session: bytes in, bytes out, streams between. No I/O, no clock.

The shell (transport.session) writes what `take_output()` returns, feeds what it reads to `receive()`, and overrides the
methods named `on_…` and `schedule`.
"""

from __future__ import annotations

from typing import Any

from triton_distributed.errors import LocalProtocolError, RemoteProtocolError
from triton_distributed.wire import frames as f
from triton_distributed.wire.assembly import Assembly, Body, Memory
from triton_distributed.wire.authentication import Authentication
from triton_distributed.wire.decoder import UNLIMITED, FrameDecoder
from triton_distributed.wire.greeting import Greeting
from triton_distributed.wire.hello import Hello
from triton_distributed.wire.states import (
    CLOSED,
    ILLEGAL,
    INPUTS,
    OPEN,
    RECEIVED,
    RECEIVING,
    SENT,
    Input,
    State,
    input_of,
)
from triton_distributed.wire.stream import StreamCore
from triton_distributed.wire.window import (
    FRAME_COST,
    FREE_BYTES,
    MADE_BYTES,
    SMALLEST_WINDOW,
    TURN_BYTES,
    WRITE_BYTES,
    Held,
    WindowBudget,
)

GRANTED_AT_ONCE = 4  # largest messages' worth of bytes that a peer is given credit for ahead of its windows
MOST_WAITING_PONGS = 10_000  # frames that wait, with which a PING gets no answer any more: whoever asks reads nothing
WHOLE_TURNS = MADE_BYTES // TURN_BYTES  # streams that may each make what a turn takes
DIRECT = 32 * 1024  # a fragment with more than this missing is read from the socket straight into its message


class Connection:
    """One end of a session.

    Args:
        hello: what this end says of itself; `max_message` and `max_streams` are enforced on the peer.
        window: bytes that one stream may have unread here.
        session_window: bytes that all streams together may, see `wire.window`.
        authentication: this end's part in proving that both know the token; None where there is none.

    Attributes:
        out: frames that wait to be written.
        streams: the open streams by id.
        peer: the peer's hello, or None before it came.
        version: the version agreed, 0 before that.
        held: what the streams that the peer opened hold here, of all sessions that share it; None for no limit.
        accepting: ids of streams whose handlers are about to begin, until `announce`.
        going: why the peer takes no more streams, as (code, words), or None.
        turn_bytes: what one stream may make in a turn of the loop; less where the peer has opened many.
    """

    stream_type: type[StreamCore] = StreamCore

    def __init__(
        self, hello: Hello, window: int, session_window: int, authentication: Authentication | None = None
    ) -> None:
        self.hello = hello
        self.peer: Hello | None = None
        self.version = 0
        self.going: tuple[int, str] | None = None
        self.out: list[bytes] = []
        self.streams: dict[int, Any] = {}
        self.max_message = hello.max_message
        self._greeting = Greeting(hello, authentication)
        self._decoder = FrameDecoder(self._greeting.frames)
        self._ready: list[StreamCore] = []
        self.turn_bytes = TURN_BYTES
        self.held: Held | None = None
        self._budget = WindowBudget(window, session_window)
        self._last_opened = 0  # by us
        self._last_accepted = 0  # by the peer
        self._under_way = 0  # bytes of messages of several frames that are not whole yet
        self.accepting: list[int] = []
        self._direct: tuple[StreamCore, Assembly, int, int, int] | None = None  # …, flags, bytes missing, cost

    @property
    def budget(self) -> WindowBudget:
        """What the windows of its streams come out of."""
        return self._budget

    # sending

    def greet(self) -> None:
        """Say hello; the first thing on every session."""
        self.send(self._greeting.opening())

    def send(self, data: bytes) -> None:
        """Queue one frame for this turn's write."""
        if not self.out:
            self.schedule()
        self.out.append(data)

    def enqueue(self, stream: StreamCore) -> None:
        """`stream` has something to send this turn."""
        ready = self._ready
        if not ready:
            self.schedule()
        ready.append(stream)

    def open_stream(self, end: bool, kind: type[StreamCore] | None = None) -> Any:
        """A new stream with its window reserved; the caller sends its REQUEST next.

        Args:
            end: the request is all that this end will send.
            kind: of the stream, where it is not `stream_type`.
        """
        peer = self.peer
        if peer is None:
            raise LocalProtocolError("a stream was opened before the hellos were exchanged")
        self._last_opened = number = self._last_opened + 1
        stream = (kind or self.stream_type)(self, number, peer.window, self._budget.reserve())
        stream.state = SENT if end else OPEN
        self.streams[number] = stream
        return stream

    def announce(self) -> bool:
        """Queue one ACCEPT for the streams in `accepting`. True: it must leave before their handlers run."""
        ids = self.accepting
        if not ids:
            return False
        payload = b"".join([f.UINT64.pack(each) for each in ids])
        ids.clear()
        for at in range(0, len(payload), f.MAX_FRAME):
            self.send(f.frame(f.ACCEPT, 0, payload[at : at + f.MAX_FRAME]))
        return True

    def take_output(self) -> bytes:
        """Everything that waits, as one piece."""
        out = self.out
        ready = self._ready
        if ready:
            self._ready = []
            for stream in ready:
                stream.drain(out)
        data = b"".join(out)
        out.clear()
        return data

    def take_some(self) -> bytes:
        """What waits, as one piece of about `WRITE_BYTES` at most: of a stream all, of the session's own frames all."""
        out, ready = self.out, self._ready
        if ready:
            size = done = 0
            for stream in ready:
                size += stream.drain(out)
                done += 1
                if size > WRITE_BYTES:
                    break
            self._ready = ready[done:]
        data = b"".join(out)
        out.clear()
        return data

    def forget(self, stream: StreamCore) -> None:
        """`stream` is closed."""
        if stream.counted:
            stream.let_go()
        if self.streams.pop(stream.id, None) is not None:
            self._budget.release(stream.window)

    def announced(self, size: int) -> bool:
        """A message of `size` bytes is under way; a negative size, no longer.

        Returns:
            whether all of it may come at once. Beyond `GRANTED_AT_ONCE` of the largest kind, messages come a window at
            a time, so that what a peer announces costs no memory before it sends it.
        """
        self._under_way += size
        return self._under_way <= GRANTED_AT_ONCE * self.max_message

    # receiving

    def receive(self, data: bytes) -> None:
        """Take received bytes.

        Raises:
            RemoteProtocolError: the peer broke the protocol; frames before the bad one were served.
        """
        while self.receive_some(data, UNLIMITED):
            data = b""

    def receive_some(self, data: bytes, most: int) -> bool:
        """Take received bytes, and serve at most so many frames of those that are here.

        Returns:
            whether there may be more, for a call with no bytes.

        Raises:
            RemoteProtocolError: as `receive`.
        """
        decoder = self._decoder
        streams = self.streams
        for kind, flags, number, payload in decoder.feed(data, most):
            if number == 0:
                self._session_frame(kind, payload)
                continue
            stream = streams.get(number)
            if stream is None:
                self._stray(kind, flags, number, payload)
                continue
            which = INPUTS[kind][flags & f.END] if kind != f.CANCEL else input_of(kind, flags)
            after = RECEIVING[stream.state][which] if which != ILLEGAL else ILLEGAL
            if after == ILLEGAL:
                raise RemoteProtocolError(
                    f"a frame of kind {kind} came on stream {number} in state {State(stream.state).name}"
                )
            if kind <= f.END_OF_STREAM:
                stream.state = after
                if after == CLOSED:
                    self.forget(stream)
                stream.received(kind, flags, payload)
            else:
                self._control(stream, kind, flags, payload, after)
        if decoder.failure is not None:
            words = decoder.failure
            raise RemoteProtocolError(words if self.peer is not None else self._greeting.words(words))
        if decoder.partial is not None:
            self._try_direct()
        return decoder.more

    def _control(self, stream: Any, kind: int, flags: int, payload: bytes, after: int) -> None:
        if kind == f.CREDIT:
            if len(payload) != f.UINT32.size:
                raise RemoteProtocolError("a CREDIT frame holds 4 bytes")
            stream.credited(f.UINT32.unpack(payload)[0])
        elif kind == f.CANCEL and flags & f.GRACEFUL:
            stream.on_stop()
        else:
            stream.state = after
            if kind != f.CANCEL:
                if not payload:
                    raise RemoteProtocolError(f"a frame of kind {kind} came without its code")
                stream.failure = (kind, payload[0], payload[1:])
            stream.drop_message()
            self.forget(stream)
            stream.on_closed()

    def _stray(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self.peer is None:
            raise RemoteProtocolError(self._greeting.words("the peer's first frame is not a hello"))
        if kind != f.REQUEST:
            if number > max(self._last_accepted, self._last_opened):
                raise RemoteProtocolError(f"a frame of kind {kind} came on stream {number}, which nobody opened")
            if input_of(kind, flags) == ILLEGAL:
                raise RemoteProtocolError(f"a frame of unknown kind {kind} came")
            return  # sent before the peer knew that the stream is over
        if number <= self._last_accepted:
            raise RemoteProtocolError(f"stream {number} was opened twice or out of order")
        self._last_accepted = number
        stream = self.stream_type(self, number, 0, self._budget.reserve())
        stream.state = RECEIVED if flags & f.END else OPEN
        self.streams[number] = stream
        number_open = len(self.streams)
        self.turn_bytes = TURN_BYTES if number_open <= WHOLE_TURNS else max(SMALLEST_WINDOW, MADE_BYTES // number_open)
        if number_open > self.hello.max_streams:
            stream.abort(
                f.REJECT,
                f.RejectCode.OVERLOADED,
                f.overloaded(f"{self.hello.max_streams:,} streams are open on this session, see TRD_MAX_STREAMS"),
            )
        elif flags & (f.MORE | f.BUFFERS):
            stream.received(kind, flags, payload)
        else:
            if not flags & f.END:  # more comes behind it, and its sender was charged for this frame too
                cost = len(payload) + FRAME_COST
                stream.account(cost)
                stream.read(cost)
            self.requested(stream, payload, None)

    def requested(self, stream: Any, payload: Body, buffers: list[Memory] | None) -> None:
        """A request is whole: read its fixed prefix and serve it."""
        if len(payload) < f.REQUEST_PREFIX_BYTES:
            raise RemoteProtocolError("a REQUEST is shorter than its fixed part")
        instance, endpoint, timeout, window, extra = f.REQUEST_PREFIX.unpack_from(payload)
        start = f.REQUEST_PREFIX_BYTES + extra
        if len(payload) < start:
            raise RemoteProtocolError("a REQUEST is shorter than the metadata it announces")
        stream.granted(window)
        if len(payload) > FREE_BYTES and buffers is None and not stream.hold(len(payload)):
            return
        metadata = payload[f.REQUEST_PREFIX_BYTES : start] if extra else b""
        body = payload[start:] if len(payload) <= f.SMALL else memoryview(payload)[start:]
        self.on_request(stream, instance, endpoint, timeout, metadata, body, buffers)

    def _session_frame(self, kind: int, payload: bytes) -> None:
        if self.peer is None:
            met = self._greeting.hear(kind, payload, self.send)
            if met is not None:
                self.peer, self.version = met
                self.on_hello(self.peer)
        elif kind == f.ACCEPT:
            if len(payload) % f.UINT64.size:
                raise RemoteProtocolError("an ACCEPT frame holds 8 bytes a stream")
            streams = self.streams
            for (number,) in f.UINT64.iter_unpack(payload):
                stream = streams.get(number)
                if stream is not None:
                    stream.accepted = True
        elif kind == f.PING:
            if len(payload) > 64:
                raise RemoteProtocolError("a PING has at most 64 bytes")
            if len(self.out) < MOST_WAITING_PONGS:
                self.send(f.frame(f.PONG, 0, payload))
        elif kind == f.PONG:
            self.on_pong(payload)
        elif kind == f.GOAWAY and payload:
            self.going = (payload[0], payload[1:].decode("utf-8", "replace"))
            self.on_goaway(*self.going)
        else:
            raise RemoteProtocolError(f"a frame of kind {kind} came on the session itself")

    # receiving in place

    def _try_direct(self) -> None:
        partial = self._decoder.partial
        assert partial is not None
        kind, flags, number, size = partial
        stream = self.streams.get(number)
        if flags & f.END and flags & f.MORE:
            return  # the ordinary path says what is wrong with it
        if size < DIRECT or kind != f.DATA or stream is None or stream.assembly is None:
            return
        after = RECEIVING[stream.state][INPUTS[kind][flags & f.END]]
        if after == ILLEGAL or size > stream.assembly.left:
            return  # the ordinary path says what is wrong with it
        piece = self._decoder.take_partial()
        stream.assembly.write(memoryview(piece))
        cost = size + FRAME_COST
        stream.account(cost)
        self._direct = (stream, stream.assembly, flags, size - len(piece), cost)

    @property
    def direct(self) -> bool:
        """The next bytes belong into `direct_buffer()`."""
        return self._direct is not None

    def direct_buffer(self) -> memoryview:
        """Where the next received bytes belong."""
        assert self._direct is not None
        _, assembly, _, missing, _ = self._direct
        return assembly.target(missing)

    def direct_received(self, count: int) -> None:
        """`count` bytes were read into `direct_buffer()`."""
        assert self._direct is not None
        stream, assembly, flags, missing, cost = self._direct
        assembly.advance(count)
        if count < missing:
            self._direct = (stream, assembly, flags, missing - count, cost)
            return
        self._direct = None
        if stream.state == CLOSED:  # it was aborted meanwhile
            return
        if flags & f.END:
            stream.state = RECEIVING[stream.state][Input.DATA_END]
            if stream.state == CLOSED:
                self.forget(stream)
        if stream.fragment_done(flags, cost) and not flags & f.MORE:
            stream.on_readable()

    # what the shell overrides

    def schedule(self) -> None:
        """Something waits to be written: call `take_output` at the end of this turn."""

    def on_hello(self, peer: Hello) -> None:
        """The hellos are exchanged."""

    def on_request(
        self,
        stream: Any,
        instance_id: int,
        endpoint_key: int,
        timeout_s: float,
        metadata: Body,
        body: Body,
        buffers: list[Memory] | None,
    ) -> None:
        """The peer has opened `stream` with this request."""

    def on_goaway(self, code: int, words: str) -> None:
        """The peer takes no more streams."""

    def on_pong(self, payload: bytes) -> None:
        """The peer has returned a PING."""

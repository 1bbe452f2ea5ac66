"""One end of a session: bytes in, bytes out, streams in between. No I/O, no clock.

The shell (`transport.session`) writes what `take_output()` returns and passes what it reads to `receive()`. It receives
events through `Shell`, and sets `on_request` if the peer may open streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

from triton_distributed.compiled import mypyc_attr
from triton_distributed.errors import LocalProtocolError, RemoteProtocolError
from triton_distributed.wire import frames as f
from triton_distributed.wire.assembly import Body, Borrow, Memory, borrow_nothing, decline
from triton_distributed.wire.authentication import Authentication
from triton_distributed.wire.decoder import UNLIMITED, FrameDecoder
from triton_distributed.wire.frames import CANCEL, END, END_OF_STREAM, REQUEST, REQUEST_PREFIX_BYTES
from triton_distributed.wire.greeting import Greeting
from triton_distributed.wire.hello import LOAD_REPORTS, TIMES, Hello
from triton_distributed.wire.in_place import Fragment
from triton_distributed.wire.pace import Pace
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
from triton_distributed.wire.stream import Link, StreamCore
from triton_distributed.wire.window import (
    FRAME_COST,
    FREE_BYTES,
    MADE_BYTES,
    SMALLEST_WINDOW,
    TURN_BYTES,
    WRITE_BYTES,
    ByteBudget,
    WindowBudget,
)

_PART: Final = f.MORE | f.BUFFERS
# A peer gets credit beyond its windows for this many messages of the largest size.
GRANTED_AT_ONCE: Final = 4
# While this many frames wait to be sent, a PING gets no answer: a peer that pings this often does not read.
MOST_WAITING_PONGS: Final = 10_000
# This many streams may each produce a full turn's bytes; if more are open, each produces less.
WHOLE_TURNS: Final = MADE_BYTES // TURN_BYTES
# A fragment of at least this many bytes is received straight into its message.
DIRECT: Final = 32 * 1024
_pack_request: Final = f.REQUEST_HEADER.pack


S = TypeVar("S", bound=StreamCore)
OnRequest = Callable[[S, int, int, float, Body, Body, "list[Memory] | None"], None]
OnAsk = Callable[["Connection[Any]", list[int]], None]
OnMemory = Callable[[bytes], None]


def _refuse_requests(stream: StreamCore, *request: object) -> None:
    raise RemoteProtocolError("this end takes no requests")


def _refuse_asks(connection: Connection[Any], keys: list[int]) -> None:
    raise RemoteProtocolError("this end serves no endpoints, so it has no load to report")


def _refuse_memory(payload: bytes) -> None:
    raise RemoteProtocolError("this end uses no shared memory")


@mypyc_attr(allow_interpreted_subclasses=True)
class Shell:
    """The events of a connection, for the shell around it. By default nothing happens."""

    def schedule(self) -> None:
        """Called when output waits: call `take_output` at the end of this turn."""

    def on_hello(self, peer: Hello) -> None:
        """Called when the hellos are exchanged."""

    def on_goaway(self, code: int, words: str) -> None:
        """Called when the peer accepts no more streams."""

    def on_pong(self, payload: bytes) -> None:
        """Called when the peer has answered a PING."""


OVER: Final = Shell()
"""The shell of a connection after its session was lost."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Connection(Link, Generic[S]):
    """One end of a session, whose streams are of class `S`.

    Args:
        shell: receives the events; replaced by `OVER` when the session is lost, so that no reference cycle is left.
        stream_type: the class of its streams.
        hello: this end's hello; `max_message` and `max_streams` are enforced on the peer.
        window: bytes that one stream may have unread here.
        session_window: bytes that all streams together may have unread, see `wire.window`.
        authentication: this end's part in the authentication; None if there is no token.

    Attributes:
        out: frames that wait to be written.
        ready: streams that have items to send this turn.
        streams: the open streams by id.
        peer: the peer's hello, or None before it came.
        version: the agreed version; 0 before that.
        held: counts the bytes that streams opened by peers hold, for all sessions that share it; None for no limit.
        going: the peer's reason for accepting no more streams, or None.
        incomplete_bytes: sum of the announced sizes of messages that have not arrived completely.
        turn_bytes: bytes that one stream may produce in a turn of the loop; fewer if the peer has opened many.
        pace: chooses the size of fragments.
        direct: the fragment that the next bytes belong to; None if the next bytes are frames.
        on_request: called with a stream that the peer has opened, and its request: instance id, endpoint key, timeout
            in seconds, metadata, body, buffers. By default a request is a protocol error.
        on_ask: called with this connection and the keys of the endpoints whose load the peer wants to know. By default
            an ASK is a protocol error.
        on_memory: called with the payload of each MEMORY frame. By default such a frame is a protocol error.
        borrow: finds the shared memory that a message refers to. By default such a message is a protocol error.
    """

    def __init__(
        self,
        shell: Shell,
        stream_type: type[S],
        hello: Hello,
        window: int,
        session_window: int,
        authentication: Authentication | None = None,
    ) -> None:
        self.shell = shell
        self._stream_type = stream_type
        self.hello = hello
        self.peer: Hello | None = None
        self.version = 0
        self.going: str | None = None
        self.out: list[bytes] = []
        self.streams: dict[int, S] = {}
        self.max_message = hello.max_message
        self._greeting = Greeting(hello, authentication)
        self._decoder = FrameDecoder(self._greeting.frames)
        self._decoder.largest = hello.max_frame
        self.ready: list[StreamCore] = []
        self.turn_bytes = TURN_BYTES
        self.held: ByteBudget | None = None
        self.on_request: OnRequest[S] = _refuse_requests
        self.on_ask: OnAsk = _refuse_asks
        self.on_memory: OnMemory = _refuse_memory
        self.borrow: Borrow = borrow_nothing
        self._on_load: dict[int, Callable[[int, int], None]] = {}  # by endpoint; bounded by those that this end calls
        self._budget = WindowBudget(window, session_window)
        self._last_opened = 0  # id of the last stream that this end opened
        self._last_accepted = 0  # id of the last stream that the peer opened
        self.incomplete_bytes = 0
        self.direct: Fragment[S] | None = None
        self.timed = False
        self.read_at = 0.0
        self.pace = Pace()

    @property
    def budget(self) -> WindowBudget:
        """The budget that the windows of its streams are taken from."""
        return self._budget

    # sending

    def greet(self) -> None:
        """Send the hello, the first frame of every session."""
        self.send(self._greeting.opening())

    def send(self, data: bytes) -> None:
        """Queue one frame for this turn's write."""
        if not self.out:
            self.shell.schedule()
        self.out.append(data)

    def enqueue(self, stream: StreamCore) -> None:
        """Note that `stream` has items to send this turn."""
        ready = self.ready
        if not ready:
            self.shell.schedule()
        ready.append(stream)

    def open_stream(self, end: bool) -> S:
        """Open a stream and reserve its window; the caller sends its REQUEST next.

        Args:
            end: True if the request is all that this end sends.
        """
        peer = self.peer
        if peer is None:
            raise LocalProtocolError("a stream was opened before the hellos were exchanged")
        self._last_opened = number = self._last_opened + 1
        stream = self._stream_type(self, number, peer.window, self._budget.reserve())
        stream.state = SENT if end else OPEN
        self.streams[number] = stream
        return stream

    def request(
        self,
        instance_id: int,
        endpoint_key: int,
        timeout_s: float,
        metadata: bytes,
        body: bytes,
    ) -> S:
        """Open a stream with a request that fits in one frame and is all that this end sends.

        Args:
            timeout_s: seconds until the call's deadline; infinite if it has none.
        """
        stream = self.open_stream(True)
        size = REQUEST_PREFIX_BYTES + len(metadata) + len(body)
        head = _pack_request(
            size, REQUEST, END, stream.id, instance_id, endpoint_key, timeout_s, stream.window, len(metadata)
        )
        out = self.out  # like `send`, inlined because every call comes here
        if not out:
            self.shell.schedule()
        out.append(head + metadata + body)
        return stream

    def announce(self, ids: list[int]) -> None:
        """Queue ACCEPT for these streams, whose handlers are about to begin. The caller writes the output at once."""
        payload = b"".join([f.UINT64.pack(each) for each in ids])
        for at in range(0, len(payload), f.MAX_FRAME):
            self.out.append(f.frame(f.ACCEPT, 0, payload[at : at + f.MAX_FRAME]))

    def ask_load(self, key: int, on_load: Callable[[int, int], None]) -> None:
        """Ask for the load of an endpoint; nothing happens if the peer does not report it.

        Args:
            key: the endpoint's key.
            on_load: called with each report: the numbers of running and of waiting requests.
        """
        if self.peer is not None and LOAD_REPORTS in self.peer.features:
            self._on_load[key] = on_load
            self.send(f.frame(f.ASK, 0, f.UINT64.pack(key)))

    def report_load(self, loads: Sequence[tuple[int, int, int]]) -> None:
        """Report the load of endpoints, for which the peer has asked.

        Args:
            loads: of each the key, and the numbers of running and of waiting requests.
        """
        payload = b"".join([f.LOAD_ENTRY.pack(*each) for each in loads])
        self.send(f.frame(f.LOAD, 0, payload))

    def take_output(self) -> bytes:
        """Return all waiting output as one piece."""
        out = self.out
        ready = self.ready
        if ready:
            self.ready = []
            for stream in ready:
                stream.drain(out)
        data = b"".join(out)
        out.clear()
        return data

    def take_some(self) -> bytes:
        """Return about `WRITE_BYTES` of output: all frames of the session itself, then whole streams."""
        out, ready = self.out, self.ready
        if ready:
            size = done = 0
            for stream in ready:
                size += stream.drain(out)
                done += 1
                if size > WRITE_BYTES:
                    break
            self.ready = ready[done:]
            if size:
                self.pace.drained += 1
        data = b"".join(out)
        out.clear()
        return data

    def fragment_bytes(self, credit: int) -> int:
        """Return how many bytes the next fragment of a message may have: few while other streams are in use.

        Args:
            credit: the bytes that its stream may send.
        """
        return self.pace.next_fragment(self._last_opened + self._last_accepted, credit)

    @property
    def calm(self) -> bool:
        """Whether only large messages have been sent and received for a while."""
        return self.pace.is_calm(self._last_opened + self._last_accepted)

    def over(self) -> list[S]:
        """End the connection after the session was lost: no more output, no more events. Returns the open streams."""
        streams = list(self.streams.values())
        self.streams.clear()
        self.ready.clear()
        self.shell = OVER
        self.on_ask, self.on_memory, self.borrow = _refuse_asks, _refuse_memory, borrow_nothing
        self._on_load.clear()
        return streams

    @property
    def lost(self) -> bool:
        """Whether the session was lost."""
        return self.shell is OVER

    def forget(self, stream: StreamCore) -> None:
        """Drop a closed stream."""
        if stream.counted:
            stream.let_go()
        if self.streams.pop(stream.id, None) is not None and stream.window:
            self._budget.release(stream.window)

    def announced(self, size: int) -> bool:
        """Note that a message of `size` bytes is under way; a negative size takes it back.

        Returns:
            whether the whole message may come at once. Beyond `GRANTED_AT_ONCE` messages of the largest size, messages
            come one window at a time, so that an announced message costs no memory before it arrives.
        """
        self.incomplete_bytes += size
        return self.incomplete_bytes <= GRANTED_AT_ONCE * self.max_message

    # receiving

    def receive(self, data: bytes) -> None:
        """Process received bytes.

        Raises:
            RemoteProtocolError: the peer broke the protocol; the frames before the faulty one were processed.
        """
        while self.receive_some(data, UNLIMITED):
            data = b""

    def receive_some(self, data: bytes, most: int) -> bool:
        """Process received bytes, at most `most` frames of all that are here.

        Returns:
            whether more frames may be here; call again with no bytes.

        Raises:
            RemoteProtocolError: as in `receive`.
        """
        decoder = self._decoder
        streams = self.streams
        for kind, flags, number, payload in decoder.feed(data, most):
            if number == 0:
                self._session_frame(kind, payload)
                continue
            stream = streams.get(number)
            if stream is None:
                if kind == REQUEST and self.peer is not None:
                    self._open_remote(flags, number, payload)
                else:
                    self._on_unknown_stream(kind, flags, number)
                    if flags & f.LENT:
                        decline(flags, payload, self.borrow)
                continue
            which = INPUTS[kind][flags & END] if kind != CANCEL else input_of(kind, flags)
            after = RECEIVING[stream.state][which] if which != ILLEGAL else ILLEGAL
            if after == ILLEGAL:
                raise RemoteProtocolError(
                    f"a frame of kind {kind} came on stream {number} in state {State(stream.state).name}"
                )
            if kind <= END_OF_STREAM:
                stream.state = after
                stream.received(kind, flags, payload)
                if after == CLOSED:  # not before: if the frame is malformed, `over` returns this stream, too
                    self.forget(stream)
            else:
                self._control(stream, kind, flags, payload, after)
        if decoder.failure is not None:
            words = decoder.failure
            raise RemoteProtocolError(words if self.peer is not None else self._greeting.words(words))
        if decoder.partial is not None:
            self._try_direct()
        return decoder.more

    def _control(self, stream: S, kind: int, flags: int, payload: bytes, after: int) -> None:
        if kind == f.CREDIT:
            if len(payload) != f.UINT32.size:
                raise RemoteProtocolError("a CREDIT frame holds 4 bytes")
            stream.credited(f.UINT32.unpack(payload)[0])
        elif kind == f.CANCEL and flags & f.GRACEFUL:
            stream.on_stop()
        elif kind == f.ACCEPT:
            stream.accept_received(stream.id <= self._last_opened)
        else:
            stream.state = after
            if kind != f.CANCEL:
                if not payload:
                    raise RemoteProtocolError(f"a frame of kind {kind} came without its code")
                stream.failure = (kind, payload[0], payload[1:])
            stream.drop_message()
            self.forget(stream)
            stream.on_closed()

    def _on_unknown_stream(self, kind: int, flags: int, number: int) -> None:
        """Check a frame, not a request, of a stream that is not open here: the stream may have ended meanwhile."""
        if self.peer is None:
            raise RemoteProtocolError(self._greeting.words("the peer's first frame is not a hello"))
        if number > max(self._last_accepted, self._last_opened):
            raise RemoteProtocolError(f"a frame of kind {kind} came on stream {number}, which was never opened")
        if input_of(kind, flags) == ILLEGAL:
            raise RemoteProtocolError(f"a frame of unknown kind {kind} came")

    def _open_remote(self, flags: int, number: int, payload: bytes) -> None:
        """Open stream `number` for the peer, with a request or the first fragment of one."""
        if number <= self._last_accepted:
            raise RemoteProtocolError(f"stream {number} was opened twice or out of order")
        self._last_accepted = number
        if flags & END:  # Nothing follows, so it needs no window.
            stream = self._stream_type(self, number, 0, 0)
            stream.state = RECEIVED
        else:
            stream = self._stream_type(self, number, 0, self._budget.reserve())
            stream.state = OPEN
        self.streams[number] = stream
        number_open = len(self.streams)
        self.turn_bytes = TURN_BYTES if number_open <= WHOLE_TURNS else max(SMALLEST_WINDOW, MADE_BYTES // number_open)
        if number_open > self.hello.max_streams:
            stream.abort(
                f.REJECT,
                f.RejectCode.OVERLOADED,
                f.overloaded(f"{self.hello.max_streams:,} streams are open on this session, see TRD_MAX_STREAMS"),
            )
            decline(flags, payload, self.borrow)
        elif flags & _PART:
            self.pace.large_opened += 1
            stream.received(f.REQUEST, flags, payload)
        else:
            if not flags & END:  # more frames follow, and the sender was charged for this frame too
                cost = len(payload) + FRAME_COST
                stream.account(cost)
                stream.read(cost)
            self._serve_request(stream, payload, None)

    def requested(self, number: int, payload: Body, buffers: list[Memory]) -> None:
        """Serve the request of stream `number`, which came in several parts and is complete now."""
        self._serve_request(self.streams[number], payload, buffers)

    def _serve_request(self, stream: S, payload: Body, buffers: list[Memory] | None) -> None:
        if len(payload) < REQUEST_PREFIX_BYTES:
            raise RemoteProtocolError("a REQUEST is shorter than its fixed part")
        instance, endpoint, timeout, window, extra = f.REQUEST_PREFIX.unpack_from(payload)
        start = REQUEST_PREFIX_BYTES + extra
        if len(payload) < start:
            raise RemoteProtocolError("a REQUEST is shorter than the metadata it announces")
        stream.granted(window)
        if len(payload) > FREE_BYTES and buffers is None and not stream.hold(len(payload)):
            return
        metadata = payload[REQUEST_PREFIX_BYTES:start] if extra else b""
        body = payload[start:] if len(payload) <= f.SMALL else memoryview(payload)[start:]
        self.on_request(stream, instance, endpoint, timeout, metadata, body, buffers)

    def _session_frame(self, kind: int, payload: bytes) -> None:
        if self.peer is None:
            met = self._greeting.hear(kind, payload, self.send)
            if met is not None:
                self.peer, self.version = met
                self.pace.largest = min(self.peer.max_frame, f.LARGE_FRAME)
                self.timed = TIMES in self.peer.features and TIMES in self.hello.features
                self.shell.on_hello(self.peer)
        elif kind == f.ACCEPT:
            if len(payload) % f.UINT64.size:
                raise RemoteProtocolError("an ACCEPT frame holds 8 bytes for each stream")
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
            self.shell.on_pong(payload)
        elif kind == f.ASK:
            if not payload or len(payload) % f.UINT64.size:
                raise RemoteProtocolError("an ASK frame holds 8 bytes for each endpoint")
            self.on_ask(self, [key for (key,) in f.UINT64.iter_unpack(payload)])
        elif kind == f.LOAD:
            self._loads(payload)
        elif kind == f.MEMORY:
            self.on_memory(payload)
        elif kind == f.GOAWAY and payload:
            self.going = payload[1:].decode("utf-8", "replace")
            self.shell.on_goaway(payload[0], self.going)
        else:
            raise RemoteProtocolError(f"a frame of kind {kind} came on the session itself")

    def _loads(self, payload: bytes) -> None:
        if not self._on_load:
            raise RemoteProtocolError("a LOAD frame came, and this end has not asked for it")
        if not payload or len(payload) % f.LOAD_ENTRY.size:
            raise RemoteProtocolError("a LOAD frame holds 16 bytes for each endpoint")
        for key, running, waiting in f.LOAD_ENTRY.iter_unpack(payload):
            on_load = self._on_load.get(key)
            if on_load is not None:
                on_load(running, waiting)

    # receiving in place

    def _try_direct(self) -> None:
        partial = self._decoder.partial
        assert partial is not None
        kind, flags, number, size = partial
        if size < DIRECT or kind != f.DATA:
            return
        stream = self.streams.get(number)
        if stream is None:
            self._on_unknown_stream(kind, flags, number)
        else:
            assembly = stream.assembly
            fits = assembly is not None and size <= assembly.left and not (flags & f.END and flags & f.MORE)
            if not fits or RECEIVING[stream.state][INPUTS[kind][flags & f.END]] == ILLEGAL:
                if size > f.MAX_FRAME:
                    raise RemoteProtocolError(
                        f"a frame of {size:,} bytes on stream {number} does not continue a message as announced; "
                        f"other frames have at most {f.MAX_FRAME:,}"
                    )
                return  # the ordinary path takes the frame, or reports the error
            stream.account(size + FRAME_COST)
            if assembly is not None:
                assembly.expect(self.calm)
        self.pace.received(size)
        self.direct = Fragment(stream, flags, size)
        rest = self.copy_direct(self._decoder.take_partial())
        if rest:
            self._decoder.give_back(rest)

    def direct_received(self, count: int) -> bytes:
        """Note that `count` bytes were read into the target of `direct`; returns those that follow the fragment.

        Raises:
            RemoteProtocolError: the fragment ends its message, and bytes are missing.
        """
        fragment = self.direct
        assert fragment is not None
        following = fragment.received(count)
        if fragment.missing:
            return b""
        self.direct = None
        stream, flags = fragment.stream, fragment.flags
        if stream is None or stream.state == CLOSED:  # it was aborted meanwhile
            return following
        if flags & f.END:
            stream.state = RECEIVING[stream.state][Input.DATA_END]
        if stream.fragment_done(flags, fragment.size + FRAME_COST) and not flags & f.MORE:
            stream.on_readable()
        if stream.state == CLOSED:
            self.forget(stream)
        return following

    def copy_direct(self, data: bytes) -> bytes:
        """Copy bytes that were not read in place into their message; returns the bytes after them.

        Raises:
            RemoteProtocolError: as in `direct_received`.
        """
        at = 0
        while self.direct is not None and at < len(data):
            target = self.direct.target()
            count = min(target.nbytes, self.direct.missing, len(data) - at)
            target[:count] = data[at : at + count]
            self.direct_received(count)
            at += count
        return data[at:] if at else data

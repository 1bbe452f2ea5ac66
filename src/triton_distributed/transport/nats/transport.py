"""One end of a session whose bytes travel as numbered NATS messages."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from triton_distributed.external.nats_port import NO_RESPONDERS
from triton_distributed.transport.nats import messages as m

if TYPE_CHECKING:
    from nats.aio.msg import Msg

# A message has at most this many bytes. The client library collects a message in one buffer, 32 KiB at a time. A round
# trip of 16 MiB costs 60 ms of CPU in messages of 32 or 64 KiB, 80 ms with 128 KiB, and 130 ms with larger ones.
LARGEST_MESSAGE = 64 * 1024
# A session ends after this many missing beats. A process that ends is noticed at the next beat, because its subject
# then has no subscriber; this limit is for hosts and networks that fail silently. It is long because a live process
# whose handler blocks the loop sends no beats either.
SILENT_BEATS = 10
# For this many beats after this end reconnected, the other end may be reconnecting too and have no subscription.
GRACE_BEATS = 4
# An ASK is repeated after this many seconds: a killed process may have left discovery before the NATS server has seen
# its connection close.
ASK_AGAIN_S = 0.2


class Broker(Protocol):
    """What an end of a session needs from the connection to NATS."""

    def publish(self, subject: str, data: bytes, reply: str) -> bool:
        """Send a message; False if it cannot be sent now, see `blocked`."""

    def blocked(self, transport: NatsTransport) -> None:
        """Call `transport.push` when the connection accepts more. After a reconnection `reconnected` is called."""

    def left(self, transport: NatsTransport) -> None:
        """Drop an end that is gone, with its subscription."""

    @property
    def largest(self) -> int:
        """The largest message in bytes."""


class NatsTransport(asyncio.Transport):
    """A transport for a session, with its own flow control, liveness and order of messages.

    It does not read in place, so it neither pauses reading nor changes its protocol.

    Args:
        loop: the running loop.
        network: the connection to NATS.
        protocol: the session.
        subject: the subject on which this end receives.
        window: bytes that the other end may send unacknowledged.

    Attributes:
        subject: the subject on which this end receives.
        window: bytes that the other end may send unacknowledged.
        opened: done when the other end has answered; None at the end that answers.
        subscription: the client library's subscription to `subject`.
        complete: False if bytes may be missing at the end, see `transport.leftovers`.
    """

    reads_in_place = False

    def __init__(
        self, loop: asyncio.AbstractEventLoop, network: Broker, protocol: Any, subject: str, window: int
    ) -> None:
        super().__init__()
        self._loop, self._network, self._protocol = loop, network, protocol
        self.subject, self.window = subject, window
        self.opened: asyncio.Future[None] | None = None
        self.subscription: Any = None
        self.complete = True
        self._peer = ""  # the subject of the other end; empty until it is known
        self._peer_window = 0
        self._next = self._expected = 0  # numbers of the next DATA to send and to receive
        self._sent = self._acknowledged = 0  # bytes sent, and bytes that the other end has acknowledged
        self._received = self._confirmed = 0  # bytes received, and bytes that this end has acknowledged
        self._waiting: deque[Any] = deque()  # bounded: `pause_writing` is called as soon as something waits
        self._size = self._high = 0
        self._heard = True
        self._spoke = self._paused = self._closing = self._lost = self._owes = self._holding = False
        self._silent = self._grace = 0
        self._asking: asyncio.TimerHandle | None = None

    def begin(self, peer: str, peer_window: int) -> None:
        """Connect the session, because the other end is known."""
        self._peer, self._peer_window = peer, peer_window
        self._protocol.connection_made(self)

    # sending

    def write(self, data: Any) -> None:
        if self._closing or self._lost or not data:
            return
        size = len(data) if isinstance(data, bytes) else memoryview(data).nbytes
        if self._waiting or size > self._network.largest - m.HEADER_BYTES or not self._may_send():
            self._waiting.append(memoryview(data).cast("B"))
            self._size += size
            self.push()
        elif not self._send(m.DATA, data):
            self._waiting.append(memoryview(data).cast("B"))
            self._size += size
            self._network.blocked(self)
        if self._size > self._high and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def _may_send(self) -> bool:
        # While the window is not used up, a whole message may go, so the smallest window moves messages of any size.
        return self._sent - self._acknowledged < self._peer_window and not self._holding

    def _send(self, kind: int, payload: Any = b"") -> bool:
        message = b"".join((m.HEADER.pack(kind, self._next, self._received), payload))
        if not self._peer or not self._network.publish(self._peer, message, self.subject):
            return False
        self._spoke = True
        self._confirmed = self._received
        if kind == m.DATA:
            self._next += 1
            self._sent += len(message)
        return True

    def push(self) -> None:
        """Send the waiting bytes, as far as the window and the connection allow."""
        if self._lost:
            return
        if self._owes and self._send(m.ACK):
            self._owes = False
        most = max(1, self._network.largest - m.HEADER_BYTES)
        waiting = self._waiting
        while waiting and self._may_send():
            first = waiting[0]
            piece = first[:most]
            if not self._send(m.DATA, piece):
                self._network.blocked(self)
                return
            self._size -= piece.nbytes
            if piece.nbytes == first.nbytes:
                waiting.popleft()
            else:
                waiting[0] = first[most:]
        if waiting:
            return
        if self._paused:
            self._paused = False
            self._protocol.resume_writing()
        if self._closing and not self._size:
            self._lose(None)

    # receiving

    def take(self, message: Msg) -> None:
        """Process a message on this end's subject."""
        if self._lost:
            return
        data = message.data
        if message.headers is not None:
            if message.headers.get("Status") == NO_RESPONDERS:
                self._unanswered()
            return
        if len(data) < m.HEADER_BYTES:
            return
        kind, sequence, received = m.HEADER.unpack_from(data)
        if message.reply != self._peer:
            if not self._peer:
                self._answered(kind, message)
            return  # from another session
        self._heard, self._holding, self._grace = True, False, 0
        if sequence != self._expected:
            self._broken("came twice or late" if sequence < self._expected else "were lost on their way through NATS")
            return
        if received > self._acknowledged:
            self._acknowledged = received
        if kind == m.DATA:
            self._expected += 1
            self._received += len(data)
            if not self._closing:
                self._protocol.data_received(data[m.HEADER_BYTES :])
            self._acknowledge()
        elif kind == m.ASK:
            self._send(m.BEAT)
        elif kind == m.CLOSE:
            words = data[m.HEADER_BYTES :].decode("utf-8", "replace")
            self._lose(ConnectionResetError(words) if words else None, tell=None)
        if self._waiting:
            self.push()

    def _acknowledge(self) -> None:
        # Late enough that most acknowledgements travel with answers, early enough that no sender waits for one.
        if (self._received - self._confirmed) * 4 < self.window or self._lost:
            return
        if not self._send(m.ACK):
            self._owes = True
            self._network.blocked(self)

    def _answered(self, kind: int, message: Msg) -> None:
        if self.opened is None or self.opened.done():
            return
        version, window = m.read_opening(message.data)
        if kind == m.OPENED and version == m.VERSION and window:
            self.opened.set_result(None)
            self.begin(message.reply, window)
        elif kind == m.CLOSE:
            words = message.data[m.HEADER_BYTES :].decode("utf-8", "replace")
            self.opened.set_exception(ConnectionRefusedError(words))

    def _unanswered(self) -> None:
        """Handle "no responders": nothing is subscribed to the other end's subject."""
        if self.opened is not None and not self.opened.done():
            self.opened.set_exception(ConnectionRefusedError("nothing listens on that subject"))
        elif not self._grace:
            # The other end's messages come before this answer; messages during an outage of our connection may be lost.
            self.complete = not self._holding
            words = "the other end is gone: nothing listens on its subject any more"
            self._lose(ConnectionResetError(words), tell=None)

    def _broken(self, what: str) -> None:
        self.complete = False
        words = f"messages of the session {what}"
        self._lose(ConnectionResetError(words), tell=words)

    # liveness

    def tick(self) -> None:
        """Send a beat if one is due, and count missing beats of the other end."""
        if self._lost or not self._peer:
            return
        self._silent = 0 if self._heard else self._silent + 1
        self._heard = False
        self._grace = max(0, self._grace - 1)
        if self._silent >= SILENT_BEATS:
            self.complete = False
            words = f"nothing was heard from the other end for {self._silent} beats"
            self._lose(ConnectionResetError(words), tell=words)
            return
        if not self._spoke:
            self._send(m.ASK if self._holding else m.BEAT)
        self._spoke = False

    def ask(self) -> None:
        """Check now, rather than at the next beat, whether the other end is gone."""
        if self._lost or not self._peer:
            return
        self._send(m.ASK)
        if self._asking is None:
            self._asking = self._loop.call_later(ASK_AGAIN_S, self._ask_again)

    def _ask_again(self) -> None:
        self._asking = None
        if not self._lost:
            self._send(m.ASK)

    def reconnected(self) -> None:
        """Note that the connection to NATS was made again.

        Messages before the other end has restored its subscription would be lost, so none is sent until it is heard.
        """
        if self._lost or not self._peer:
            return
        self._holding, self._grace = True, GRACE_BEATS
        self._send(m.ASK)

    # its end

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            if not self._waiting:
                self._lose(None)

    def abort(self) -> None:
        self._closing = True
        self._lose(None)

    def fail(self, words: str) -> None:
        """End the session, because the connection to NATS is lost for good."""
        self.complete = False
        self._lose(ConnectionResetError(words), tell=None)

    def _lose(self, error: Exception | None, tell: str | None = "") -> None:
        """End this end: the session gets `error`, the other end gets `tell` unless it is None."""
        if self._lost:
            return
        if tell is not None:
            self._send(m.CLOSE, tell.encode())
        self._lost = self._closing = True
        self._waiting.clear()
        self._size = 0
        if self._asking is not None:
            self._asking.cancel()
        self._network.left(self)
        if self._peer:
            self._loop.call_soon(self._protocol.connection_lost, error)

    def is_closing(self) -> bool:
        return self._closing or self._lost

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = high or 0

    def get_write_buffer_size(self) -> int:
        return self._size

    def get_protocol(self) -> asyncio.BaseProtocol:
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

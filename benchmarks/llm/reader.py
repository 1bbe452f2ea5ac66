"""A light client of many HTTP/1.1 connections: plain sockets and epoll in one thread, without a parser.

It knows the end of an answer by its length or by the last piece of a chunked body, and counts the events in it. A whole
answer without either, or another status than 200, is an error.
"""

from __future__ import annotations

import select
import socket
import time
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import uvloop

from benchmarks.workloads import quantile
from harness.processes import answer_questions
from harness.usage import cpu_s

EVENT = b"data: {"
LAST = b"0\r\n\r\n"
DONE = b"data: [DONE]"
HEAD_END = b"\r\n\r\n"
READ_BYTES = 1 << 18
PATIENCE_S = 30.0
"""How long nothing at all may come before a measurement fails."""


class AnswerFailed(RuntimeError):
    """An answer was not what it should be. The text has its beginning."""


def request_bytes(port: int, path: str, body: bytes) -> bytes:
    """Return a request of the loopback as it goes over the socket."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Stream:
    """One connection, and the answer that it reads.

    Attributes:
        socket: the connection.
        events: the events of this answer so far.
        ended: whether the answer is complete.
    """

    __slots__ = ("_end", "_head", "_left", "_tail", "events", "last", "sent_at", "socket")

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.sent_at = self.last = 0.0

    def send(self, request: bytes) -> None:
        """Send a request, and expect its answer from here on."""
        self.events, self._head, self._tail, self._end, self._left = 0, b"", b"", False, -1
        if self.socket.send(request) != len(request):
            raise AnswerFailed("a request did not fit into the socket")
        self.sent_at = time.monotonic()

    def read(self) -> int:
        """Read what is there. Return how many events began in it.

        Raises:
            AnswerFailed: the status is not 200, or the connection ended within the answer.
        """
        data = self.socket.recv(READ_BYTES)
        if not data:
            raise AnswerFailed(f"the connection ended after {self.events} events: {self._head[:300]!r}")
        if self._left == -1:
            data = self._read_head(data)
        elif self._left >= 0:
            self._left -= len(data)
        known = self._tail
        text = known + data
        began = text.count(EVENT)
        self._tail = text[-(len(EVENT) - 1) :]
        self.events += began
        self._end = self._left == 0 or (self._left == -2 and self._tail.endswith(LAST))
        return began

    def _read_head(self, data: bytes) -> bytes:
        """Keep the head until it is complete; return what follows it."""
        self._head += data
        at = self._head.find(HEAD_END)
        if at < 0:
            return b""
        head, rest = self._head[:at].lower(), self._head[at + len(HEAD_END) :]
        if not head.startswith(b"http/1.1 200"):
            raise AnswerFailed(f"the answer is {self._head[:500]!r}")
        if b"transfer-encoding: chunked" in head:
            self._left = -2
            return rest
        _, found, length = head.partition(b"content-length: ")
        if not found:
            raise AnswerFailed(f"the answer has no length: {head!r}")
        self._left = int(length.split(b"\r\n")[0]) - len(rest)
        return rest

    @property
    def ended(self) -> bool:
        """Whether the answer is complete."""
        return self._end


class Streams:
    """Connections that are read together; a context manager.

    Args:
        port: of the server.
        count: how many connections.
    """

    def __init__(self, port: int, count: int) -> None:
        self._poll = select.epoll()
        self.every: list[Stream] = []
        self._of: dict[int, Stream] = {}
        try:
            for _ in range(count):
                stream = Stream(port)
                self.every.append(stream)
                self._of[stream.socket.fileno()] = stream
                self._poll.register(stream.socket.fileno(), select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        for each in self.every:
            each.socket.close()
        self._poll.close()

    def ready(self) -> Iterator[Stream]:
        """Wait, and give the streams that can be read.

        Raises:
            AnswerFailed: nothing came for 30 s.
        """
        found = self._poll.poll(PATIENCE_S)
        if not found:
            raise AnswerFailed(f"nothing came for {PATIENCE_S:g} s")
        for number, _ in found:
            yield self._of[number]


class Clocks:
    """The processor time that each of some processes, and this one, use from here on."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._began = [cpu_s(pid) for pid in pids], time.process_time()

    def read(self) -> dict[str, Any]:
        """Return `servers_s`, a list, and `client_s`."""
        servers, client = self._began
        used = [cpu_s(pid) - before for pid, before in zip(self._pids, servers, strict=True)]
        return {"servers_s": used, "client_s": time.process_time() - client}


def load(port: int, path: str, body: str, connections: int, seconds: float, pids: Sequence[int]) -> dict[str, Any]:
    """Ask again on each connection as soon as it has its answer, until the time is over and the last answer has come.

    Args:
        port: of the server.
        path: of the requests.
        body: of each request.
        connections: how many requests run at once.
        seconds: the time after which no request begins.
        pids: the processes of the server.

    Returns:
        `requests`, `events`, `seconds` of the measurement, `loaded_s` (the same), `p50_ms` and `p99_ms` of an answer,
        and what `Clocks.read` returns.
    """
    request, requests, events, running = request_bytes(port, path, body.encode()), 0, 0, connections
    took: list[float] = []
    with Streams(port, connections) as streams:
        clocks, began = Clocks(pids), time.monotonic()
        for each in streams.every:
            each.send(request)
        while running:
            for stream in streams.ready():
                events += stream.read()
                if stream.ended:
                    now = time.monotonic()
                    took.append(now - stream.sent_at)
                    requests += 1
                    if now - began < seconds:
                        stream.send(request)
                    else:
                        running -= 1
        passed, used = time.monotonic() - began, clocks.read()
    milliseconds = {f"p{share}_ms": quantile(took, share / 100) * 1e3 for share in (50, 99)}
    return {"requests": requests, "events": events, "seconds": passed, "loaded_s": passed, **milliseconds, **used}


def gaps(
    port: int, path: str, body: str, connections: int, settle_s: float, seconds: float, pids: Sequence[int]
) -> dict[str, Any]:
    """Read streams that go on all the time, and note the time between two reads of a stream that bring events.

    Events that come together count as one: the reader of a stream sees them at once, after the gap before them.

    Args:
        port: of the server.
        path: of the requests.
        body: of each request.
        connections: how many streams.
        settle_s: the time between the last stream's first event and the measurement.
        seconds: how long is measured. The streams must last longer.
        pids: the processes of the server.

    Returns:
        `began` and `ended` by the monotonic clock, `events`, `reads` that brought them, `p50_ms`, `p99_ms` and `max_ms`
        of the gaps, and what `Clocks.read` returns.
    """
    request, found = request_bytes(port, path, body.encode()), array("d")
    waiting, events, begin, end = connections, 0, float("inf"), float("inf")
    clocks = None
    with Streams(port, connections) as streams:
        for each in streams.every:
            each.send(request)
        now = time.monotonic()
        while now < end:
            for stream in streams.ready():
                began = stream.read()
                if stream.ended:
                    raise AnswerFailed("a stream ended before the measurement did")
                if not began:
                    continue
                now = time.monotonic()
                if not stream.last:
                    waiting -= 1
                    if not waiting:
                        begin = now + settle_s
                        end = begin + seconds
                elif begin <= now < end:
                    clocks = clocks or Clocks(pids)
                    events += began
                    found.append(now - stream.last)
                stream.last = now
        used = (clocks or Clocks(pids)).read()
    ordered = sorted(found) or [float("nan")]
    milliseconds = {f"p{share}_ms": quantile(ordered, share / 100) * 1e3 for share in (50, 99)}
    return {
        "began": begin,
        "ended": end,
        "events": events,
        "reads": len(found),
        **milliseconds,
        "max_ms": ordered[-1] * 1e3,
        **used,
    }


async def answer(question: str, **arguments: Any) -> dict[str, Any]:
    """Answer a question of the parent process: `load` or `gaps`. The parent waits, so the loop may wait too."""
    return (load if question == "load" else gaps)(**arguments)


if __name__ == "__main__":
    uvloop.run(answer_questions(answer))

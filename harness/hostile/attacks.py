"""The attacks on a worker. Each is a function that takes the worker's address and the time at which to stop."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from harness.hostile import raw
from harness.hostile.raw import HELLO, connect, crowd, drop, ended, key, pour, request
from triton_distributed.wire import frames as f
from triton_distributed.wire.hello import Hello, hello_frame

Counts = dict[str, int]
Attack = Callable[[str, float], Counts]

CROWD = 4000  # The connections of attacks that keep many.
PAIRS = 2000  # Frames, or pairs of frames, made at once.
STREAMS = 500  # Streams on each connection, if an attack uses several connections.
OPENING = hello_frame(Hello(features=["token"], challenge=b"c" * 32))
BAD_PROOF = f.frame(f.AUTH, 0, bytes(200))
NOISE = (
    b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(505),
    bytes(range(256)) * 2,
    f.HEADER.pack(2**32 - 1, f.HELLO, 0, 0),
)


@dataclass(frozen=True)
class Kind:
    """An attack and the kind of worker that it attacks.

    Args:
        run: the attack.
        token: the worker has a token, which the attacker does not know.
        unix: the attack uses the worker's Unix socket instead of TCP.
    """

    run: Attack
    token: bool = False
    unix: bool = False


def _at_speed(address: str, until: float, *said: bytes) -> Counts:
    """Connect, send these bytes, connect again without waiting. Read the answers when there are many connections."""
    counts = {"connections": 0, "refused": 0}
    waiting: list[socket.socket] = []
    while time.monotonic() < until:
        sock = connect(address, *said)
        counts["connections" if sock else "refused"] += 1
        if sock:
            waiting.append(sock)
        if len(waiting) >= 200:
            for each in waiting[:100]:
                drop(each)
                each.close()
            del waiting[:100]
    for each in waiting:
        each.close()
    return counts


def silent(address: str, until: float) -> Counts:
    """Thousands of connections that send nothing."""
    with crowd(CROWD, lambda: connect(address)) as all_of_them:
        while time.monotonic() < until:
            all_of_them.fill(until)
            all_of_them.sweep()
            time.sleep(0.05)
        return {"connections": all_of_them.opened, "closed": all_of_them.closed, "refused": all_of_them.refused}


def dribble(address: str, until: float) -> Counts:
    """Thousands of connections that send their hello at one byte a second."""
    counts = {"bytes": 0}
    with crowd(CROWD, lambda: connect(address, OPENING[:3])) as all_of_them:
        while time.monotonic() < until:
            all_of_them.fill(until)
            all_of_them.sweep()
            for sock in all_of_them.socks:
                counts["bytes"] += pour(sock, OPENING[4:5], until, read=False)
            time.sleep(1.0)
        return {"connections": all_of_them.opened, "closed": all_of_them.closed, **counts}


def wrong_token(address: str, until: float) -> Counts:
    """Connect and send a wrong proof, again and again."""
    return _at_speed(address, until, OPENING + BAD_PROOF)


def no_token(address: str, until: float) -> Counts:
    """Connect and send a plain hello and a request, again and again."""
    return _at_speed(address, until, HELLO + request(1, key("echo")))


def noise(address: str, until: float) -> Counts:
    """HTTP, TLS, random bytes, a frame of 4 GiB: in turn, as fast as the worker accepts connections."""
    counts: Counts = {}
    while time.monotonic() < until:
        for each in NOISE:
            for name, number in _at_speed(address, min(until, time.monotonic() + 0.25), each).items():
                counts[name] = counts.get(name, 0) + number
    return counts


def come_and_go(address: str, until: float) -> Counts:
    """Connect and close, as fast as possible."""
    return _at_speed(address, until)


def slow_frames(address: str, until: float) -> Counts:
    """Members that send a request of 200 KB byte by byte."""
    start = HELLO + f.HEADER.pack(200_000, f.REQUEST, f.END, 1)
    counts = {"bytes": 0}
    with crowd(CROWD // 2, lambda: connect(address, start)) as all_of_them:
        while time.monotonic() < until:
            all_of_them.fill(until)
            for sock in all_of_them.socks:
                drop(sock)
                counts["bytes"] += pour(sock, b"\0", until, read=False)
            time.sleep(0.2)
        return {"connections": all_of_them.opened, **counts}


def _streams(address: str, until: float, window: int, endpoint: str, reads: bool) -> Counts:
    """Connections with many streams each. The answers get no credit, or are not read at all."""
    opening = HELLO + b"".join(request(1 + each, key(endpoint), window=window) for each in range(STREAMS))
    small = 0 if reads else 4096
    with crowd(20, lambda: connect(address, opening, receive_bytes=small)) as all_of_them:
        while time.monotonic() < until:
            all_of_them.fill(until)
            all_of_them.sweep((lambda sock: not drop(sock)) if reads else ended)
            time.sleep(0.05)
        return {
            "connections": all_of_them.opened,
            "streams": all_of_them.opened * STREAMS,
            "closed": all_of_them.closed,
        }


def no_credit(address: str, until: float) -> Counts:
    """10,000 streams of handlers that produce without end. The answers are read, but get no credit."""
    return _streams(address, until, 4096, "endless", True)


def not_reading(address: str, until: float) -> Counts:
    """10,000 streams of handlers that produce 32 KiB items without end, with 4 GiB of credit each. Nothing is read."""
    return _streams(address, until, 2**32 - 1, "bulk", False)


def _ids() -> Iterator[range]:
    first = 1
    while True:
        yield range(first, first + PAIRS)
        first += PAIRS


def _flood(address: str, until: float, make: Callable[[range], bytes], *, read: bool = True, each: int = 1) -> Counts:
    """Frames for ever new ids, as fast as the worker takes them. A closed connection is replaced by a new one."""
    counts = {"frames": 0, "connections": 0}
    while time.monotonic() < until:
        sock = connect(address, HELLO)
        if sock is None:
            time.sleep(0.01)
            continue
        counts["connections"] += 1
        for ids in _ids():
            if not pour(sock, make(ids), until, read):
                break
            counts["frames"] += PAIRS * each
        sock.close()
    return counts


def _cancels(ids: range) -> bytes:
    endpoint = key("hold")
    return b"".join([request(each, endpoint) + f.frame(f.CANCEL, each) for each in ids])


def cancels(address: str, until: float) -> Counts:
    """A million pairs of REQUEST and CANCEL, as fast as the worker takes them."""
    return _flood(address, until, _cancels, each=2)


def late_cancels(address: str, until: float) -> Counts:
    """As `cancels`, but each CANCEL comes after 100 requests, so that many handlers have begun."""
    endpoint = key("hold")

    def make(ids: range) -> bytes:
        out = []
        for at in range(0, len(ids), 100):
            some = ids[at : at + 100]
            out += [request(each, endpoint) for each in some] + [f.frame(f.CANCEL, each) for each in some]
        return b"".join(out)

    return _flood(address, until, make, each=2)


def unread_cancels(address: str, until: float) -> Counts:
    """As `cancels`, but the answers are never read."""
    return _flood(address, until, _cancels, read=False, each=2)


def stray_cancels(address: str, until: float) -> Counts:
    """CANCEL frames for a stream that ended long ago."""
    again = request(1, key("echo")) + f.frame(f.CANCEL, 1) * PAIRS
    return _flood(address, until, lambda ids: again if ids[0] == 1 else f.frame(f.CANCEL, 1) * PAIRS)


def never_ended(address: str, until: float) -> Counts:
    """Requests without END, on 20 connections, as many as these may open and more."""
    endpoint = key("upload")
    counts = {"connections": 0, "streams": 0}
    socks = [sock for _ in range(20) if (sock := connect(address, HELLO))]
    counts["connections"] = len(socks)
    for ids in _ids():
        data = b"".join([request(each, endpoint, flags=0) for each in ids])
        for sock in socks:
            counts["streams"] += PAIRS * pour(sock, data, until)
        if time.monotonic() >= until or counts["streams"] >= 400_000:
            break
    while time.monotonic() < until:
        time.sleep(0.05)
        for sock in socks:
            drop(sock)
    for sock in socks:
        sock.close()
    return counts


def unread_uploads(address: str, until: float) -> Counts:
    """Streams that the attacker fills to their window and the handler does not read."""
    endpoint = key("deaf")
    piece = f.MAX_FRAME - 64
    counts = {"connections": 0, "streams": 0, "bytes": 0}
    socks = [sock for _ in range(20) if (sock := connect(address, HELLO))]
    counts["connections"] = len(socks)
    number = 0
    while time.monotonic() < until and number < STREAMS and socks:
        number += 1
        data = request(number, endpoint, flags=0) + f.frame(f.DATA, number, bytes(piece))
        for sock in list(socks):
            if pour(sock, data, until):
                counts["streams"] += 1
                counts["bytes"] += piece
            else:
                socks.remove(sock)
                sock.close()
    while time.monotonic() < until:
        time.sleep(0.05)
        for sock in socks:
            drop(sock)
    for sock in socks:
        sock.close()
    return counts


def _sized() -> list[bytes]:
    upload, echo = key("upload"), key("echo")
    head = f.UINT32.pack(2**32 - 1) + f.UINT32.pack(2**32 - 1)
    bombs = [
        f.HEADER.pack(2**32 - 1, f.REQUEST, 0, 1),
        f.frame(f.REQUEST, 1, f.UINT64.pack(2**64 - 1) + bytes(40), f.MORE),
        f.frame(f.REQUEST, 1, f.UINT64.pack(1 << 30) + head, f.MORE | f.BUFFERS),
        f.frame(f.REQUEST, 1, head + f.UINT64.pack(2**63) * 1000, f.BUFFERS | f.END),
        f.frame(f.REQUEST, 1, f.REQUEST_PREFIX.pack(1, echo, raw.FOREVER, 0, 2**32 - 1), f.END),
        f.frame(f.REQUEST, 1, f.REQUEST_PREFIX.pack(1, echo, 1e300, 2**32 - 1, 0) + b"\xc0", f.END),
        f.frame(f.REQUEST, 1, f.REQUEST_PREFIX.pack(1, echo, float("nan"), 2**32 - 1, 0) + b"\xc0", f.END),
        request(1, echo, metadata=b"\xdf" + b"\xff" * 4),
        *[request(1, echo, body) for body in (b"\xdd" + b"\xff" * 4, b"\xdf" + b"\xff" * 4, b"\x91" * 200_000)],
        *[request(1, echo, b"\xc9" + b"\xff" * 4 + bytes((code,)) + b"\x93" * 99) for code in range(16, 22)],
        request(1, echo, b"\xc7\x0f\x14" + b"\x94\xc4\x00\xa3<f8\x92" + b"\xce" + b"\xff" * 4),
        *[
            request(each, upload, flags=0) + f.frame(f.DATA, each, f.UINT64.pack(1 << 30) + b"x", f.MORE)
            for each in (1, 2)
        ],
    ]
    batches = [
        request(each, upload, flags=0) + f.frame(f.BATCH, each, b"\xdd\x00\x03\xff\x00" + b"\xc0" * 0x3FF00)
        for each in range(1, 9)
    ]
    empty = request(1, upload, flags=0) + f.frame(f.DATA, 1, b"") * 4000
    return [*bombs, *batches, b"".join(batches), empty]


def sizes(address: str, until: float) -> Counts:
    """Lengths, counts, shapes and nestings that announce more than is sent, each on its own connection."""
    counts = {"connections": 0}
    said = _sized()
    with crowd(200, lambda: connect(address, HELLO)) as all_of_them:
        while time.monotonic() < until:
            all_of_them.fill(until)
            for number, sock in enumerate(all_of_them.socks):
                pour(sock, said[(number + counts["connections"]) % len(said)], until)
            counts["connections"] = all_of_them.opened
            time.sleep(0.02)
            for sock in all_of_them.socks[:100]:
                sock.close()
            del all_of_them.socks[:100]
    return counts


def batches(address: str, until: float) -> Counts:
    """Batches of 260,000 items of one byte, for a handler that takes one item and waits."""
    endpoint = key("sip")
    bomb = b"\xdd\x00\x03\xff\x00" + b"\xc0" * 0x3FF00
    counts = {"streams": 0}
    with crowd(20, lambda: connect(address, HELLO)) as all_of_them:
        for number in range(1, 100):
            all_of_them.fill(until)
            for sock in all_of_them.socks:
                counts["streams"] += pour(
                    sock, request(number, endpoint, flags=0) + f.frame(f.BATCH, number, bomb), until
                )
        while time.monotonic() < until:
            all_of_them.sweep()
            time.sleep(0.05)
    return counts


def pings(address: str, until: float) -> Counts:
    """PING frames. Their answers are read."""
    data = f.frame(f.PING, 0, bytes(64)) * PAIRS
    return _flood(address, until, lambda ids: data)


def unread_pings(address: str, until: float) -> Counts:
    """PING frames on ever more connections. Their answers are not read."""
    data = f.frame(f.PING, 0, bytes(64)) * 20_000
    counts = {"frames": 0}
    with crowd(500, lambda: connect(address, HELLO, receive_bytes=4096)) as all_of_them:
        while time.monotonic() < until:
            all_of_them.fill(until)
            for sock in all_of_them.socks:
                counts["frames"] += 20_000 * pour(sock, data, min(until, time.monotonic() + 0.05), read=False)
            all_of_them.sweep(ended)
    return counts


def chatter(address: str, until: float) -> Counts:
    """PONG frames without a PING, GOAWAY frames of a draining peer, CREDIT and ACCEPT frames, without end."""
    lines = [
        f.frame(f.PONG, 0, b"hello"),
        f.coded(f.GOAWAY, 0, f.GoawayCode.DRAINING, b"soon"),
        f.frame(f.CREDIT, 1, f.UINT32.pack(2**32 - 1)),
        f.frame(f.ACCEPT, 0, bytes(80)),
    ]
    data = b"".join(lines) * (PAIRS // len(lines))
    start = request(1, key("hold"))
    return _flood(address, until, lambda ids: start + data if ids[0] == 1 else data)


def nobody(address: str, until: float) -> Counts:
    """Requests for an endpoint that does not exist."""
    endpoint = key("missing")
    return _flood(address, until, lambda ids: b"".join([request(each, endpoint) for each in ids]))


ATTACKS: dict[str, Kind] = {
    "silent": Kind(silent, token=True),
    "dribble": Kind(dribble, token=True),
    "wrong_token": Kind(wrong_token, token=True),
    "no_token": Kind(no_token, token=True),
    "noise": Kind(noise, token=True),
    "come_and_go": Kind(come_and_go, token=True),
    "slow_frames": Kind(slow_frames),
    "no_credit": Kind(no_credit),
    "not_reading": Kind(not_reading),
    "not_reading_unix": Kind(not_reading, unix=True),
    "cancels": Kind(cancels),
    "late_cancels": Kind(late_cancels),
    "unread_cancels": Kind(unread_cancels),
    "stray_cancels": Kind(stray_cancels),
    "never_ended": Kind(never_ended),
    "unread_uploads": Kind(unread_uploads),
    "sizes": Kind(sizes),
    "batches": Kind(batches),
    "pings": Kind(pings),
    "unread_pings": Kind(unread_pings),
    "chatter": Kind(chatter),
    "nobody": Kind(nobody),
}

"""How long clients go on calling a worker that was killed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import statistics
import time

from benchmarks.survival.fleet import Fleet
from benchmarks.survival.promises import Found
from triton_distributed.transport.address import Address

CLIENTS = 2  # in each client process
BEFORE_S, BEHIND_S = 0.1, 0.3
LIMIT_S = 0.05


def _connect(addresses: list[str]) -> socket.socket | None:
    """A bare connection to a worker; None where it has no socket."""
    for each in map(Address.parse, addresses):
        if each.scheme == "unix":
            found = socket.socket(socket.AF_UNIX)
            found.connect(each.host)
            return found
        if each.scheme == "tcp":
            return socket.create_connection((each.host, each.port))
    return None


def _reset_at(observer: socket.socket) -> float:
    """When the kernel says that the connection is gone; blocks."""
    with contextlib.suppress(ConnectionError):
        while observer.recv(4096):
            pass
    return time.monotonic()


async def rotation(fleet: Fleet, kills: int) -> Found:
    """Kill workers, each with all clients connected and calling, and replace them.

    The clock starts when a bare socket that is connected to the worker sees the reset. For each client it is known when
    its last call was made that was offered the worker, and its first that was not; it makes one each 2 ms. Over NATS
    nothing is reset: there the clock starts with the kill, and nothing is promised.
    """
    await fleet.everybody("watch", clients=CLIENTS)
    last, first, sent = list[float](), list[float](), list[float]()
    never, sockets = 0, True
    words: list[str] = []
    for number in range(kills):
        place = number % len(fleet.workers)
        about = await fleet.workers[place].ask("about")
        await fleet.everybody("aim", instance_id=about["id"], workers=len(fleet.workers))
        await asyncio.sleep(BEFORE_S)
        observer = _connect(about["addresses"])
        watching = None if observer is None else asyncio.ensure_future(asyncio.to_thread(_reset_at, observer))
        at = await fleet.kill(place)
        sockets = observer is not None
        if watching is not None and observer is not None:
            at = await watching
            observer.close()
        await asyncio.sleep(BEHIND_S)
        for each in [client for process in await fleet.everybody("seen") for client in process]:
            words += each["failed"]
            never += not each["without_at"]
            if each["without_at"]:
                last.append(max(0.0, each["offered_at"] - at))
                first.append(max(0.0, each["without_at"] - at))
                sent.append(max(0.0, each["sent_at"] - at))
        await fleet.replace(place)
    found = Found(words=words[:20])
    found.figures = {
        "kills": kills,
        "clients": len(fleet.clients) * CLIENTS,
        "never": never,
        "failed": len(words),
    }
    for name, times in (("last", last), ("first", first), ("sent", sent)):
        if times:
            found.figures[f"{name}_p50_ms"] = statistics.median(times) * 1000
            found.figures[f"{name}_max_ms"] = max(times) * 1000
            found.figures[f"{name}_ms"] = [round(each * 1000, 3) for each in sorted(times)]
    if sockets:
        worst = max(last, default=0.0)
        found.promise(
            f"no call that is made {LIMIT_S * 1000:.0f} ms after the reset is offered the dead worker",
            not never and worst <= LIMIT_S,
            f"{never} clients go on" if never else f"the last one {worst * 1000:.1f} ms after it",
        )
    found.promise("none of the idempotent calls fails meanwhile", not words, f"{len(words)} did")
    return found

"""A worker of a chaos run with faults of a product planted in it: a part of `harness.member`.

What it does to a request follows from the request's id, see `SPOILT`; what it does to itself, from the plants named.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path

from harness.member import Member
from harness.requests import Work, handler
from harness.worker import serve_made

# Of requests whose id leaves this remainder, divided by 8.
DROPPED, DUPLICATED, TWICE, SWAPPED, INVENTED = range(1, 6)
kept: list[object] = []


def spoilt(journal):
    honest = handler(journal)

    async def answer(request: Work, context):
        fate = request.id % 8
        if fate == TWICE:
            journal.began(request.id)
        items = [item async for item in honest(request, context)] if request.shape != "error" else []
        if fate == DROPPED and items:
            del items[len(items) // 2]
        elif fate == DUPLICATED and items:
            items.insert(len(items) // 2, items[len(items) // 2])
        elif fate == SWAPPED and len(items) > 1:
            items[0], items[1] = items[1], items[0]
        elif fate == INVENTED:
            items.append([request.id, len(items), b""])
        for item in items:
            yield item
        if request.shape == "error":
            raise RuntimeError("not what was asked for")

    return answer


def leaks(journal):
    """Holds on to a descriptor, a thread and a task after its first request; leaves a file; logs an error of its own."""
    honest = handler(journal)
    folder = Path(os.environ["TRD_DIR"])

    async def answer(request: Work, context):
        if not kept:
            kept.append(os.open("/dev/zero", os.O_RDONLY))
            threading.Thread(target=threading.Event().wait, daemon=True, name="leaked").start()
            kept.append(asyncio.create_task(asyncio.Event().wait()))
            (folder / f"left-{os.getpid()}").touch()

            async def fails():
                raise RuntimeError("nobody asks what became of this")

            task = asyncio.create_task(fails())
            del task
        async for item in honest(request, context):
            yield item

    return answer


def ends(journal):
    """Ends itself with its third request."""
    honest = handler(journal)

    async def answer(request: Work, context):
        kept.append(request)
        if len(kept) == 3:
            os._exit(7)
        async for item in honest(request, context):
            yield item

    return answer


def dies_of_sigterm(journal):
    """Takes the signal before the runtime does, or from it."""
    asyncio.get_running_loop().call_soon(signal.signal, signal.SIGTERM, lambda *_: os._exit(5))
    asyncio.get_running_loop().call_later(0.2, signal.signal, signal.SIGTERM, lambda *_: os._exit(5))
    return handler(journal)


async def faulty(member: Member, plant: str, journal: str) -> None:
    """The part of a worker with the plant of this name."""
    serve_made(member, journal, PLANTS[plant])


PLANTS = {each.__name__: each for each in (spoilt, leaks, ends, dies_of_sigterm)}

"""What the tests serve. It lies in a folder of its own, which is the current one of the commands."""

from __future__ import annotations

import asyncio
import datetime
import signal
import time
from pathlib import Path

import numpy as np

from triton_distributed.runtime import Annotated


async def count(request):
    for number in range(request["n"]):
        yield {"number": number}


async def echo(request, context):
    return {"request": request, "metadata": dict(context.metadata)}


async def one_then_wait(request):
    """Its end is told on standard output, whatever ends it."""
    try:
        yield "one"
        await asyncio.get_running_loop().create_future()
    except asyncio.CancelledError:
        print("cancelled", flush=True)
        raise


async def stuck(fifo):
    """Blocks the event loop until somebody has opened and closed the other end of a named pipe."""
    return Path(fifo).read_text() or "done"


def gated(fifo):
    """Goes on when somebody has opened and closed the other end of a named pipe."""
    yield "begun"
    Path(fifo).read_text()
    yield "done"


async def stuck_for(request):
    """Blocks the event loop for so many seconds."""
    time.sleep(request)
    return "free"


async def fail(request):
    yield 1
    raise KeyError("no such\nmodel")


async def zoo(request):
    yield {"text": "é\n", "list": (1, 2.5, None, True)}
    yield None
    yield Annotated("x", "step", ["a", "b"], "7")
    yield Annotated(None, "done")
    yield b"\x01\x02\x03"
    yield bytearray(5000)
    yield np.arange(6, dtype="float32").reshape(2, 3)
    yield np.zeros((100, 100))
    yield {5: float("nan"), "when": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)}


class Engine:
    def __init__(self):
        self.name = "engine"

    async def generate(self, request):
        yield f"generate of {self.name}"

    def __call__(self, request):
        return f"call of {self.name}"

    async def other(self, request):
        return f"other of {self.name}"

    @staticmethod
    def static(request):
        return "static"

    @classmethod
    def of_class(cls, request):
        return cls.__name__


class Callable:
    async def __call__(self, request):
        return "call of a class"


class NeedsArguments:
    def __init__(self, model):
        self.model = model

    def generate(self, request):
        return self.model


class Breaks:
    def __init__(self):
        raise RuntimeError("no such\ndevice")

    def __call__(self, request):
        return request


class Loads:
    """Takes its time on the loop's own thread, as a class does that loads a model."""

    def __init__(self):
        print("loading", flush=True)
        signal.pause()

    def __call__(self, request):
        return request


class Nothing:
    pass


engine = Engine()
engine.name = "instance"
data = [1, 2]


def three(one, two, three):
    return one, two, three

"""Processes that share one loop of virtual time: what belongs to one can be stopped, and goes on later.

A callback belongs to the process in whose context it was set: the context variable goes the way of every task and timer
that a program makes. While a process is stopped its callbacks are kept, and what is due meanwhile is done in its order
when it goes on, as after SIGCONT.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import heapq
from collections.abc import Callable
from contextvars import Context, ContextVar
from typing import Any, TypeVarTuple

from triton_distributed.testing.virtual_time import VirtualTimeLoop

Arguments = TypeVarTuple("Arguments")


class Host:
    """A process of the simulation.

    Attributes:
        name: for the trace.
        context: what is run in it, or scheduled with it, belongs to this process.
        dead: it was killed: nothing of it reaches anybody any more.
        no_fds: it cannot open or accept connections.
        slow_s: seconds by which what its connections carry comes later.
    """

    def __init__(self, loop: HostsLoop, name: str) -> None:
        self.loop = loop
        self.name = name
        self.dead = self.no_fds = False
        self.slow_s = 0.0
        self.context: Context = contextvars.copy_context()
        self.context.run(_host.set, self)
        self._stops = 0  # stopped and blocked at once is stopped until both are over
        self._kept: list[asyncio.Handle] = []  # bounded by what is due while it is stopped

    @property
    def stopped(self) -> bool:
        """Whether nothing of it runs."""
        return self._stops > 0

    def stop(self) -> None:
        """Run nothing of it from now on."""
        self._stops += 1

    def go_on(self) -> None:
        """Undo one `stop`; after the last, what was due meanwhile is done."""
        self._stops -= 1
        if not self._stops:
            kept, self._kept = self._kept, []
            self.loop.again(kept)

    def keep(self, handle: asyncio.Handle) -> None:
        """`handle` is due and has to wait."""
        self._kept.append(handle)


_host: ContextVar[Host | None] = ContextVar("triton_distributed_chaos_host", default=None)


class _Handle(asyncio.Handle):
    __slots__ = ("_host",)
    _host: Host

    def _run(self) -> None:
        if self._host.stopped:
            self._host.keep(self)
        else:
            super()._run()


class _Timer(asyncio.TimerHandle):
    __slots__ = ("_host",)
    _host: Host
    _scheduled: bool

    def _run(self) -> None:
        if self._host.stopped:
            self._host.keep(self)
        else:
            super()._run()


class HostsLoop(VirtualTimeLoop):
    """A loop of virtual time whose callbacks belong to processes.

    Attributes:
        trace: what has happened.
    """

    _ready: Any
    _scheduled: list[Any]

    def __init__(self, seed: int | str = 0, trace: Trace | None = None) -> None:
        super().__init__(seed)
        self.trace = trace if trace is not None else Trace()

    def call_soon(
        self, callback: Callable[[*Arguments], object], *args: *Arguments, context: Context | None = None
    ) -> asyncio.Handle:
        host = _host.get() if context is None else context.get(_host)
        if host is None:
            return super().call_soon(callback, *args, context=context)
        handle = _Handle(callback, args, self, context)
        handle._host = host
        self._ready.append(handle)
        return handle

    def call_at(
        self, when: float, callback: Callable[[*Arguments], object], *args: *Arguments, context: Context | None = None
    ) -> asyncio.TimerHandle:
        host = _host.get() if context is None else context.get(_host)
        if host is None:
            return super().call_at(when, callback, *args, context=context)
        timer = _Timer(when, callback, args, self, context)
        timer._host = host
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True
        return timer

    def again(self, handles: list[asyncio.Handle]) -> None:
        """Do what was kept, in its order."""
        self._ready.extend(handles)

    def timers(self) -> int:
        """How many timers are set."""
        return sum(not each.cancelled() for each in self._scheduled)


class Trace:
    """What has happened, as a hash, and in words where a function takes them.

    Args:
        tell: called with each line; None for no call.
    """

    def __init__(self, tell: Callable[[str], object] | None = None) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._tell = tell
        self._stopped = False

    def note(self, now: float, line: str) -> None:
        """Add one line at this time."""
        if self._stopped:
            return
        line = f"{now:.9f} {line}"
        self._hash.update(line.encode())
        if self._tell is not None:
            self._tell(line)

    def stop(self) -> None:
        """Nothing more is of interest."""
        self._stopped = True

    def digest(self) -> str:
        """The hash of all lines so far: two runs with the same have gone the same way."""
        return self._hash.hexdigest()

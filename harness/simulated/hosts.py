"""Processes that share one loop of virtual time. The callbacks of one process can be stopped, and continue later.

A callback belongs to the process in whose context it was set. Every task and timer inherits the context variable. While
a process is stopped, its due callbacks are kept. They run in their order when the process continues, as after SIGCONT.
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
        name: the name in the trace.
        context: code that runs in this context, or is scheduled with it, belongs to this process.
        dead: the process was killed: nothing that it does reaches other processes.
        no_fds: the process cannot open or accept connections.
        slow_s: seconds by which its connections delay data.
    """

    def __init__(self, loop: HostsLoop, name: str) -> None:
        self.loop = loop
        self.name = name
        self.dead = self.no_fds = False
        self.slow_s = 0.0
        self.context: Context = contextvars.copy_context()
        self.context.run(_host.set, self)
        self._stops = 0  # A process may be stopped and blocked at the same time.
        self._kept: list[asyncio.Handle] = []  # Bounded by the callbacks that become due during a stop.

    @property
    def stopped(self) -> bool:
        """Whether the process is stopped."""
        return self._stops > 0

    def stop(self) -> None:
        """Stop the process."""
        self._stops += 1

    def go_on(self) -> None:
        """Undo one `stop`. After the last one, the callbacks that are due run."""
        self._stops -= 1
        if not self._stops:
            kept, self._kept = self._kept, []
            self.loop.again(kept)

    def keep(self, handle: asyncio.Handle) -> None:
        """Keep `handle`, which is due and has to wait."""
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
        trace: the trace of all events.
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
        """Run the kept callbacks in their order."""
        self._ready.extend(handles)

    def timers(self) -> int:
        """The number of timers that are set."""
        return sum(not each.cancelled() for each in self._scheduled)


class Trace:
    """The events of a simulation as a hash, and as lines for a function.

    Args:
        tell: called with each line; None for no call.
    """

    def __init__(self, tell: Callable[[str], object] | None = None) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._tell = tell
        self._stopped = False

    def note(self, now: float, line: str) -> None:
        """Add one line at time `now`."""
        if self._stopped:
            return
        line = f"{now:.9f} {line}"
        self._hash.update(line.encode())
        if self._tell is not None:
            self._tell(line)

    def stop(self) -> None:
        """Ignore further lines."""
        self._stopped = True

    def digest(self) -> str:
        """The hash of all lines so far. It is the same for two runs with the same events."""
        return self._hash.hexdigest()

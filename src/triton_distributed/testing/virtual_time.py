"""An event loop whose time is virtual: a test that waits for a minute takes a moment, and takes the same way each time.

    assert run_in_virtual_time(program(), seed=7) == run_in_virtual_time(program(), seed=7)

Nothing of the world outside takes part: no sockets, no child processes, no signals. Runtimes reach each other through
`Config(discovery="memory")`. `time.monotonic` and `time.sleep` know nothing of it; `loop.time` and `asyncio.sleep` do.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple

from triton_distributed.errors import TritonError

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

START_S = 1000.0  # what `loop.time()` begins with; not 0, which no real clock shows and programs take for "never"
# Turns of the loop in which no time passes. A program that computes between awaits makes thousands; one that has not
# come to a timer after a million is in a circle, which on a real clock a timeout would have ended.
MOST_TURNS = 1_000_000
ENDS_S = 5.0  # real seconds that threads which were refused have to end while the program is ended
MOST_NAMED = 20  # tasks whose places an error tells
THREADS = (
    "a thread that the loop does not know called it: virtual time includes the threads of run_in_executor and "
    "asyncio.to_thread only, so a handler has to be async here, not a plain def"
)


class Deadlock(TritonError, RuntimeError):
    """Nothing can happen any more: no callback is ready and no timer is set. Field: `waiting`, (task, place) each."""

    def __init__(self, waiting: tuple[tuple[str, str], ...]) -> None:
        super().__init__(waiting)
        self.waiting = waiting

    def __str__(self) -> str:
        tasks = "".join(f"\n  {name} at {place}" for name, place in self.waiting[:MOST_NAMED])
        more = f"\n  and {len(self.waiting) - MOST_NAMED} more" if len(self.waiting) > MOST_NAMED else ""
        return f"deadlock: nothing is ready and no timer is set; {len(self.waiting)} task(s) wait:{tasks}{more}"


class Livelock(TritonError, RuntimeError):
    """The loop turns and its time does not pass. Fields: `turns`, and `waiting` as of `Deadlock`."""

    def __init__(self, turns: int, waiting: tuple[tuple[str, str], ...]) -> None:
        super().__init__(turns, waiting)
        self.turns, self.waiting = turns, waiting

    def __str__(self) -> str:
        tasks = "".join(f"\n  {name} at {place}" for name, place in self.waiting[:MOST_NAMED])
        return f"livelock: the loop turned {self.turns:,} times and no time passed; its tasks:{tasks}"


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """Runs callbacks in the order of an ordinary loop; where that would wait, its clock is set forward instead.

    While `run_in_executor` has threads at work the clock stands and the loop really waits for them; what order they
    end in is not repeatable.

    Args:
        seed: of `rng`.

    Attributes:
        rng: what `DistributedRuntime` draws from on this loop: instance ids, choices, pauses between probes.
    """

    def __init__(self, seed: int | str = 0) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self._now = START_S
        self._turns = 0  # since time has passed
        self._working = 0  # threads of executors
        self._thread = threading.get_ident()
        self._called = threading.Event()
        self._stranger: RuntimeError | None = None
        self._strangers = False
        self._selector = self  # what BaseEventLoop asks to wait

    def time(self) -> float:
        """Seconds, virtual."""
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        """In place of a selector's: there are no descriptors, and time passes at once.

        Raises:
            Deadlock: there is nothing to wait for.
            Livelock: the loop turns without end.
            RuntimeError: a thread called that should not.
        """
        if self._stranger is not None:
            stranger, self._stranger = self._stranger, None
            raise stranger
        if timeout is not None and timeout <= 0:
            self._turns += 1
            if self._turns > MOST_TURNS:
                turns, self._turns = self._turns, 0
                raise Livelock(turns, waiting(self))
            return []
        self._turns = 0
        if self._working or self._called.is_set():
            self._called.wait()
            self._called.clear()
            return []
        if timeout is None and self._strangers and self._called.wait(ENDS_S):
            self._called.clear()
            return []
        if timeout is None:
            raise Deadlock(waiting(self))
        self._now += timeout
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        self._called.set()

    def call_soon_threadsafe(
        self,
        callback: Callable[[*Arguments], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """Call `callback` on the loop's thread; from others only while `run_in_executor` has work there.

        A call from any other thread ends the program with a RuntimeError.
        """
        if threading.get_ident() == self._thread:
            return self.call_soon(callback, *args, context=context)
        if not self._working:
            self._stranger = RuntimeError(THREADS)
            self._strangers = True
        return super().call_soon_threadsafe(callback, *args, context=context)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Arguments], T], *args: *Arguments
    ) -> asyncio.Future[T]:
        """Run `func` in a thread; time stands until it is done."""
        self._working += 1
        try:
            future: asyncio.Future[T] = super().run_in_executor(executor, func, *args)
        except BaseException:
            self._working -= 1
            raise
        future.add_done_callback(self._worked)
        return future

    async def shutdown_default_executor(self, *args: Any) -> None:
        self._working += 1  # it is a thread that waits for the others
        try:
            await super().shutdown_default_executor(*args)
        finally:
            self._working -= 1

    def _worked(self, _: object) -> None:
        self._working -= 1

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            "a loop with virtual time has no sockets, files, child processes and signals: "
            'use Config(discovery="memory", handle_signals=False), or an ordinary loop'
        )

    add_reader = add_writer = add_signal_handler = _refuse  # type: ignore[assignment]
    sock_recv = sock_sendall = sock_accept = _refuse

    async def _refuse_later(self, *_: Any, **__: Any) -> Any:
        self._refuse()

    create_connection = create_server = create_datagram_endpoint = sock_connect = _refuse_later
    create_unix_connection = create_unix_server = connect_accepted_socket = _refuse_later
    connect_read_pipe = connect_write_pipe = subprocess_exec = subprocess_shell = _refuse_later

    def close(self) -> None:
        if not self.is_closed():
            super().close()
            self._selector = None  # type: ignore[assignment]  # no cycle


def waiting(loop: asyncio.AbstractEventLoop) -> tuple[tuple[str, str], ...]:
    """The tasks of a loop that are not done, as (name, file:line in function), sorted."""
    found = []
    for task in asyncio.all_tasks(loop):
        stack = task.get_stack(limit=1)
        place = "its end"
        if stack:
            code = stack[0].f_code
            place = f"{code.co_filename}:{stack[0].f_lineno} in {getattr(code, 'co_qualname', code.co_name)}"
        found.append((task.get_name(), place))
    return tuple(sorted(found))


def run_in_virtual_time(main: Coroutine[Any, Any, T], *, seed: int | str = 0) -> T:
    """Run a program to its end in virtual time, as `asyncio.run` does in real time; what it leaves is cancelled.

    Args:
        main: the program.
        seed: of the loop's `rng` and, meanwhile, of the module `random`: the same seed takes the same way.

    Raises:
        Deadlock: nothing can happen any more, and `main` is not done.
        Livelock: it turns in a circle.
        RuntimeError: a loop is running already; or a thread of which this one knows nothing called it.
        Whatever `main` raises.
    """
    state = random.getstate()
    random.seed(seed)
    try:
        with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(seed)) as runner:
            return runner.run(main)
    finally:
        random.setstate(state)

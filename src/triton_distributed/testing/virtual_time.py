"""An event loop with virtual time: a test that waits for a minute ends at once, and every run is the same.

    assert run_in_virtual_time(program(), seed=7) == run_in_virtual_time(program(), seed=7)

The loop supports nothing outside the program: no sockets, no child processes, no signals. Runtimes reach each other
through `Config(discovery="memory")`. `loop.time` and `asyncio.sleep` use virtual time, but `time.monotonic` and
`time.sleep` do not.
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

START_S = 1000.0  # First value of `loop.time()`. It is not 0, which no real clock shows and programs use for "never".
# Most turns of the loop in which no time passes. A program that computes between awaits makes thousands. One that makes
# a million turns without a timer runs in a circle, which a timeout would end on a real clock.
MOST_TURNS = 1_000_000
ENDS_S = 5.0  # Real seconds that refused threads have to end, while the program is ended.
MOST_NAMED = 20  # Most tasks named in an error text.
THREADS = (
    "an unknown thread called the loop: virtual time includes only the threads of run_in_executor and asyncio.to_thread"
)


class Deadlock(TritonError, RuntimeError):
    """The program cannot go on: no callback is ready and no timer is set. Field: `waiting`, (task, place) each."""

    def __init__(self, waiting: tuple[tuple[str, str], ...]) -> None:
        super().__init__(waiting)
        self.waiting = waiting

    def __str__(self) -> str:
        tasks = "".join(f"\n  {name} at {place}" for name, place in self.waiting[:MOST_NAMED])
        more = f"\n  and {len(self.waiting) - MOST_NAMED} more" if len(self.waiting) > MOST_NAMED else ""
        return f"deadlock: nothing is ready and no timer is set; {len(self.waiting)} task(s) wait:{tasks}{more}"


class Livelock(TritonError, RuntimeError):
    """The loop turns but its time does not pass. Fields: `turns`, and `waiting` as in `Deadlock`."""

    def __init__(self, turns: int, waiting: tuple[tuple[str, str], ...]) -> None:
        super().__init__(turns, waiting)
        self.turns, self.waiting = turns, waiting

    def __str__(self) -> str:
        tasks = "".join(f"\n  {name} at {place}" for name, place in self.waiting[:MOST_NAMED])
        return f"livelock: the loop turned {self.turns:,} times and no time passed; its tasks:{tasks}"


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """Runs callbacks in the order of an ordinary loop, but advances its clock instead of waiting.

    While threads of `run_in_executor` run, the clock stands and the loop really waits for them. The order in which they
    end is not repeatable. Handlers written with plain `def` run on the loop, one at a time, and take no virtual time.

    Args:
        seed: the seed of `rng`.

    Attributes:
        rng: the random numbers of a `DistributedRuntime` on this loop: instance ids, choices, pauses between probes.
        inline: tells a `DistributedRuntime` to run plain handlers on this loop.
    """

    inline = True

    def __init__(self, seed: int | str = 0) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self._now = START_S
        self._turns = 0  # Turns of the loop since time has passed.
        self._working = 0  # Running calls of executors.
        self._thread = threading.get_ident()
        self._called = threading.Event()
        self._stranger: RuntimeError | None = None
        self._strangers = False
        self._selector = self  # BaseEventLoop waits in the selector's `select`.

    def time(self) -> float:
        """The virtual time in seconds."""
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        """Advance the clock instead of waiting. This replaces a selector's `select`; there are no descriptors.

        Raises:
            Deadlock: there is nothing to wait for.
            Livelock: the loop turns without end.
            RuntimeError: an unknown thread called the loop.
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
        """Do nothing: there are no events of descriptors."""

    def _write_to_self(self) -> None:
        self._called.set()

    def call_soon_threadsafe(
        self,
        callback: Callable[[*Arguments], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """Call `callback` on the loop's thread. Only the loop's thread and those of `run_in_executor` may use it.

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
        """Run `func` in a thread. Virtual time stands until it is done."""
        self._working += 1
        try:
            future: asyncio.Future[T] = super().run_in_executor(executor, func, *args)
        except BaseException:
            self._working -= 1
            raise
        future.add_done_callback(self._worked)
        return future

    async def shutdown_default_executor(self, *args: Any) -> None:
        self._working += 1  # The shutdown uses one more thread, which waits for the others.
        try:
            await super().shutdown_default_executor(*args)
        finally:
            self._working -= 1

    def _worked(self, _: object) -> None:
        self._working -= 1

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            "a loop with virtual time has no sockets, files, child processes or signals: "
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
            self._selector = None  # type: ignore[assignment]  # Break the reference cycle.


def waiting(loop: asyncio.AbstractEventLoop) -> tuple[tuple[str, str], ...]:
    """The tasks of a loop that are not done, as (name, file:line in function), sorted."""
    return tuple(sorted((task.get_name(), place(task)) for task in asyncio.all_tasks(loop)))


def place(task: asyncio.Task[Any]) -> str:
    """The line at which a task waits, as `file:line in function`."""
    stack = task.get_stack(limit=1)
    if not stack:
        return "its end"
    code = stack[0].f_code
    return f"{code.co_filename}:{stack[0].f_lineno} in {getattr(code, 'co_qualname', code.co_name)}"


def run_in_virtual_time(main: Coroutine[Any, Any, T], *, seed: int | str = 0) -> T:
    """Run a program to its end in virtual time, as `asyncio.run` does in real time. Remaining tasks are cancelled.

    Args:
        main: the program.
        seed: the seed of the loop's `rng` and, meanwhile, of the module `random`. The same seed gives the same run.

    Raises:
        Deadlock: no callback or timer is left, and `main` is not done.
        Livelock: the loop turns without end while no time passes.
        RuntimeError: a loop is running already, or an unknown thread called the loop.
        BaseException: any error that `main` raises.
    """
    state = random.getstate()
    random.seed(seed)
    try:
        with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(seed)) as runner:
            return runner.run(main)
    finally:
        random.setstate(state)

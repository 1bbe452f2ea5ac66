"""One batch from its start to its answers: its context, its thread, its end."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from triton_distributed.context import CLEANUP_S, AttachedCall, Context
from triton_distributed.serving.threads import Computation, HandlerThreads


class BatchContext(Context):
    """The context in which a batch runs: no request's own, because a batch belongs to all of its requests.

    It has an id of its own and no metadata. Calls that the function makes inherit the latest deadline of the requests,
    and none if a request has none: no caller's deadline may cut the others. They have the highest priority of the
    requests, and the travelling values that all requests have in common.
    """

    _cut = False

    def __init__(self, contexts: Sequence[Context | None], now: Callable[[], float]) -> None:
        super().__init__(f"batch-{os.urandom(8).hex()}")
        self._now = now
        deadlines = [None if each is None else each.deadline for each in contexts]
        known = [each for each in deadlines if each is not None]
        if len(known) == len(contexts):
            self.deadline = self.calls_deadline = max(known)
        self.priority = max(0 if each is None else each.priority for each in contexts)
        travelling: list[Mapping[str, Any]] = [{} if each is None else each.travelling for each in contexts]
        shared = dict(travelling[0])
        for each_other in travelling[1:]:
            shared = {key: value for key, value in shared.items() if key in each_other and each_other[key] == value}
        if shared:
            self.travelling = MappingProxyType(shared)

    def now(self) -> float:
        return self._now()

    def cut(self) -> None:
        """Cancel the open calls of the function, because all callers have left. Calls that it makes later are
        clean-up."""
        self._cut = True
        self.calls_deadline = self.now() + CLEANUP_S
        self.kill()

    def attach(self, call: AttachedCall) -> None:
        if not self._cut:
            super().attach(call)
        elif self._calls is not None:
            self._calls[call] = None
        else:
            self._calls = {call: None}


class ThreadCall(Computation):
    """One call of a plain function in a thread of the worker's pool.

    Args:
        name: the function's name, for the log.
        call: calls the function.
    """

    def __init__(self, name: str, call: Callable[[], Any]) -> None:
        super().__init__(name)
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._over = self._loop.create_future()
        self._result: Any = None
        self._error: BaseException | None = None

    async def result(self, threads: HandlerThreads) -> Any:
        """Run the call and return its result. A cancellation waits for the thread, which cannot be interrupted.

        Raises:
            RuntimeError: the pool was closed.
            BaseException: the call raised it.
        """
        threads.submit(self)
        try:
            await asyncio.shield(self._over)
        except asyncio.CancelledError:
            if not threads.withdraw(self):
                await self._over
            raise
        error, self._error = self._error, None  # It is raised once and not kept: its frames refer to this object.
        try:
            if error is not None:
                raise error
        finally:
            del error
        return self._result

    # Methods for the pool's threads.

    def run(self) -> None:
        try:
            self._result = self._call()
        except StopIteration as error:  # A coroutine cannot raise it.
            self._error = RuntimeError("the function raised StopIteration")
            self._error.__cause__ = error
        except BaseException as error:
            self._error = error

    def must_wait(self) -> bool:
        return False

    def stop(self) -> None:
        self._error = RuntimeError("the runtime was shut down")

    def left(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._end)
        except RuntimeError:  # The loop was closed while the thread could not be stopped. Nothing waits any more.
            pass

    def _end(self) -> None:
        if not self._over.done():
            self._over.set_result(None)


async def run(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    name: str,
    on_loop: bool,
    threads: HandlerThreads | None,
) -> Any:
    """Call a batch function and return its result.

    Args:
        function: the function.
        arguments: its arguments.
        name: its name, for the log.
        on_loop: the function is async. Otherwise it runs in a thread, with a copy of the present context variables.
        threads: the threads of the worker; None outside of a worker.
    """
    if on_loop:
        return await function(*arguments)
    if threads is not None and threads.inline:
        result = contextvars.copy_context().run(function, *arguments)
    elif threads is None:
        result = await _in_any_thread(function, arguments)
    else:
        variables = contextvars.copy_context()
        result = await ThreadCall(name, lambda: variables.run(function, *arguments)).result(threads)
    return await result if inspect.isawaitable(result) else result


async def _in_any_thread(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Like `asyncio.to_thread`, but a cancellation waits for the thread."""
    running = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        if not running.cancelled():
            running.exception()  # Nothing waits for it, so asyncio need not log it.
        raise
    finally:
        del running  # An error's frames refer to this one.

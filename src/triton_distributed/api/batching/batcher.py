"""Forms batches of the requests that one endpoint gets, runs them, and gives each caller its answer."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from math import inf
from typing import Any, NamedTuple

from triton_distributed.api.batching.copies import own_copy
from triton_distributed.api.batching.queue import BatchQueue, QueuePolicy
from triton_distributed.api.batching.run import BatchContext, run
from triton_distributed.context import Context, current
from triton_distributed.errors import DeadlineExceeded, Overloaded
from triton_distributed.serving.endpoint import ServedEndpoint
from triton_distributed.serving.handlers import UnfitRequest

logger = logging.getLogger("triton_distributed.runtime")

TIMEOUT_KEY = "queue_timeout_s"
"""The key of a request's metadata that may shorten `QueuePolicy.timeout_s`."""

LATE_S = 1.0
"""Seconds after which a request whose deadline is over fails, if nothing has cancelled it as the worker does."""


class Options(NamedTuple):
    """The options of `batched`, checked."""

    max_size: int
    max_wait_s: float
    preferred_sizes: tuple[int, ...]
    max_batches: int
    keep_order: bool
    priority: Callable[[Any, Context | None], int] | None
    policy: QueuePolicy
    policies: Mapping[int, QueuePolicy]


class Function(NamedTuple):
    """The decorated function.

    Attributes:
        call: the function, as a plain function or a bound method.
        name: its name in errors and in the log.
        on_loop: it is async.
        takes_contexts: its second argument gets the contexts of the requests.
    """

    call: Callable[..., Any]
    name: str
    on_loop: bool
    takes_contexts: bool


@dataclass(slots=True)
class BatchStatistics:
    """The numbers of a batched function in this process, over all endpoints that it serves.

    Attributes:
        waiting: requests that wait for a batch now.
        running: batches that run now.
        requests: requests that have come.
        batches: batches that were started.
        batched: requests that were in these batches.
        dropped: requests that left before they were in a batch: they were cancelled, or their deadline was over.
        rejected: requests that failed because of a `QueuePolicy`.
    """

    waiting: int = 0
    running: int = 0
    requests: int = 0
    batches: int = 0
    batched: int = 0
    dropped: int = 0
    rejected: int = 0

    @property
    def mean_size(self) -> float:
        """The mean number of requests in a batch; 0.0 before the first batch."""
        return self.batched / self.batches if self.batches else 0.0

    def add(self, other: BatchStatistics) -> None:
        """Add the numbers of another one."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


class _Waiting:
    """A request that waits for a batch, or for the batch's answer.

    Attributes:
        request, context: as the handler got them; `context` is None in a direct call without one.
        answer: completes with the request's answer.
        batch: the batch that the request is in; None while it waits for one.
        arrived, priority, expires: see `queue.Waiting`.
    """

    __slots__ = ("answer", "arrived", "batch", "context", "expires", "priority", "request")

    def __init__(
        self, request: Any, context: Context | None, answer: asyncio.Future[Any], arrived: float, priority: int
    ) -> None:
        self.request, self.context, self.answer = request, context, answer
        self.arrived, self.priority = arrived, priority
        self.expires = inf
        self.batch: _Batch | None = None


class _Batch:
    """A batch that runs.

    Attributes:
        members: its requests, in their order.
        present: how many of them still wait for their answer.
        context: its own context.
        task: runs the function.
        outcome: an answer or an error for each member, once the function has ended.
    """

    __slots__ = ("context", "members", "outcome", "present", "task")

    def __init__(self, members: list[_Waiting], context: BatchContext) -> None:
        self.members, self.present, self.context = members, len(members), context
        self.task: asyncio.Task[None] | None = None
        self.outcome: list[Any] | None = None


class Batcher:
    """The batches of one function at one endpoint. It has no task and no timer while no request is there.

    Args:
        function: the decorated function.
        options: the decorator's options.
        endpoint: the endpoint that it serves; None for direct calls, outside of a worker.
    """

    def __init__(self, function: Function, options: Options, endpoint: ServedEndpoint | None) -> None:
        self._function, self._options = function, options
        self._queue: BatchQueue[_Waiting] = BatchQueue(
            options.max_size, options.max_wait_s, options.preferred_sizes, options.policy, options.policies
        )
        self._overrides = any(each.allow_override for each in (options.policy, *options.policies.values()))
        self._endpoint = endpoint
        self._running: deque[_Batch] = deque()  # In the order of their start; at most `max_batches` have a task.
        self._places = options.max_batches
        self._timer: asyncio.Handle | None = None
        self._timer_at = inf  # When the timer fires; infinite without one.
        self._counts = BatchStatistics()
        if endpoint is not None:
            self._check_places(endpoint)

    def _check_places(self, endpoint: ServedEndpoint) -> None:
        limit, options = endpoint.gate.queue.max_inflight, self._options
        least = options.max_size * options.max_batches
        if limit is not None and limit < least:
            logger.warning(
                "%s: max_inflight=%d lets at most %d requests wait for the batches of %s, which take max_size × "
                "max_batches = %d: serve it with max_inflight=%d or more",
                endpoint.name,
                limit,
                limit,
                self._function.name,
                least,
                2 * least,
            )

    def statistics(self) -> BatchStatistics:
        """The numbers until now."""
        counts = BatchStatistics(waiting=len(self._queue), running=self._options.max_batches - self._places)
        counts.add(self._counts)
        return counts

    async def answer(self, request: Any, context: Context | None) -> Any:
        """Let a request join a batch, and return its answer.

        Raises:
            InvalidRequest: the metadata of the request has an invalid `queue_timeout_s`.
            Overloaded: a queue policy has rejected the request.
            Exception: the function raised it, or returned it for this request.
        """
        loop = asyncio.get_running_loop()
        options, queue = self._options, self._queue
        now = loop.time()
        priority, timeout_s = 0, None
        if not options.keep_order:
            if options.priority is not None:
                priority = options.priority(request, context)
                if type(priority) is not int:
                    raise TypeError(f"priority= of {self._function.name} returned {priority!r}: must be an int")
            elif context is not None:
                priority = context.priority
        if self._overrides and context is not None and TIMEOUT_KEY in context.metadata:
            timeout_s = _override(context)
        waiting = _Waiting(request, context, loop.create_future(), now, priority)
        self._counts.requests += 1
        if not queue.add(waiting, timeout_s):
            raise self._rejection(f"{queue.policy(priority).max_waiting} requests wait already", priority)
        if self._places and len(queue) >= options.max_size:
            self._look(now)
        else:
            self._wake(loop, now)
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            await self._leave(waiting)
            raise
        finally:
            del waiting  # An error's frames refer to this one: together they would wait for the collector.

    async def _leave(self, waiting: _Waiting) -> None:
        """Forget a request whose caller has left. The last caller of a batch waits until its function has ended."""
        batch = waiting.batch
        if batch is None:
            if self._queue.remove(waiting):
                self._counts.dropped += 1
            if not self._queue:
                self._no_timer()
        elif batch.outcome is None:
            batch.present -= 1
            if not batch.present and batch.task is not None:
                batch.context.cut()
                batch.task.cancel()
                await asyncio.wait({batch.task})

    def _wake(self, loop: asyncio.AbstractEventLoop, now: float) -> None:
        """Set the timer to the time at which a batch is due, or the time in the queue of a request is over.

        The timer has no context variables: those of a request must not live until it fires.
        """
        queue = self._queue
        at = queue.due() if self._places else queue.expiry
        if at >= self._timer_at:
            return
        self._no_timer()
        self._timer_at = at
        if at <= now:  # Later in this turn, so that all requests of the turn are there.
            self._timer = loop.call_soon(self._timed, context=contextvars.Context())
        else:
            self._timer = loop.call_at(at, self._timed, context=contextvars.Context())

    def _no_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._timer_at = None, inf

    def _timed(self) -> None:
        # A loop may call a timer earlier than its time, by the resolution of the clock.
        now = max(self._timer_at, asyncio.get_running_loop().time())
        self._timer, self._timer_at = None, inf
        self._look(now)

    def _look(self, now: float) -> None:
        """Start the batches that are due. Reject the requests whose time is over and for which there is no place."""
        queue = self._queue
        self._no_timer()
        while self._places:
            before = len(queue)
            members = queue.take(now, lambda waiting: self._is_present(waiting, now))
            if members:
                self._start(members)
            elif len(queue) == before:
                break
        for waiting in queue.expire(now):
            if waiting.answer.done():
                self._counts.dropped += 1
            else:
                words = f"it has waited for the {waiting.expires - waiting.arrived:.3g} s that its queue policy allows"
                waiting.answer.set_exception(self._rejection(words, waiting.priority))
        if queue:
            self._wake(asyncio.get_running_loop(), now)

    def _is_present(self, waiting: _Waiting, now: float) -> bool:
        """Whether a request has not left. If its deadline is over, the worker cancels it at the same time."""
        answer = waiting.answer
        deadline = None if waiting.context is None else waiting.context.deadline
        in_time = deadline is None or deadline > now
        if in_time and not answer.done():  # It is done if the request's task was cancelled in this turn.
            return True
        self._counts.dropped += 1
        if deadline is not None and not in_time:
            loop, variables = asyncio.get_running_loop(), contextvars.Context()
            loop.call_later(LATE_S, self._too_late, answer, deadline - waiting.arrived, context=variables)
        return False

    def _too_late(self, answer: asyncio.Future[Any], timeout_s: float) -> None:
        if not answer.done():
            answer.set_exception(DeadlineExceeded(self._function.name, timeout_s))

    def _rejection(self, words: str, priority: int) -> Overloaded:
        self._counts.rejected += 1
        endpoint = self._endpoint
        name = self._function.name
        path, instance_id = (name, 0) if endpoint is None else (endpoint.name.path, endpoint.instance.id)
        return Overloaded(path, instance_id, f"no batch of {name} took the request of priority {priority}: {words}")

    def _start(self, members: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        batch = _Batch(members, BatchContext([each.context for each in members], loop.time))
        for each in members:
            each.batch = batch
        self._places -= 1
        self._running.append(batch)
        # Not the variables of a request, which would be seen by the other ones.
        variables = contextvars.Context() if self._endpoint is None else self._endpoint.context.copy()
        name = f"batch of {self._function.name}"
        batch.task = asyncio.Task(self._run(batch), loop=loop, name=name, context=variables)
        batch.task.add_done_callback(lambda _: self._end(batch, None), context=variables)

    async def _run(self, batch: _Batch) -> None:
        """The body of a batch's task."""
        current.set(batch.context)
        members = [each for each in batch.members if not each.answer.done()]
        self._counts.dropped += len(batch.members) - len(members)
        batch.members = members
        if not members:
            self._end(batch, [])
            return
        self._counts.batches += 1
        self._counts.batched += len(members)
        outcome: list[Any] = []
        try:
            requests = [each.request for each in members]
            contexts = [each.context or Context() for each in members] if self._function.takes_contexts else None
            outcome = self._checked(await self._call(requests, contexts), len(requests))
        except asyncio.CancelledError as error:
            outcome = [error] * len(members)
        except BaseException as error:  # Also a SystemExit: the worker handles it as that of any handler.
            outcome = [error] * len(members)
            if not batch.present:
                logger.debug("%s raised an error after all its callers had left", self._function.name, exc_info=True)
                if not isinstance(error, Exception):
                    raise
        finally:
            self._end(batch, outcome)
            del outcome, members  # An error's frames refer to this one.

    def _end(self, batch: _Batch, outcome: list[Any] | None) -> None:
        """Give the callers their answers, and start the next batch.

        Args:
            outcome: an answer or an error for each member. None if the task is over: it has called this already, unless
                it was cancelled before its first step.
        """
        if batch.outcome is not None:
            return
        batch.context.over = True
        batch.outcome = [asyncio.CancelledError()] * len(batch.members) if outcome is None else outcome
        self._places += 1
        self._deliver()
        if self._queue:
            self._look(asyncio.get_running_loop().time())

    async def _call(self, requests: list[Any], contexts: list[Context] | None) -> Any:
        function, endpoint = self._function, self._endpoint
        arguments = (requests,) if contexts is None else (requests, contexts)
        threads = None if endpoint is None else endpoint.handler.threads
        return await run(function.call, arguments, name=function.name, on_loop=function.on_loop, threads=threads)

    def _checked(self, answers: Any, count: int) -> list[Any]:
        """The answers as a list.

        Raises:
            TypeError: they are not a list or tuple.
            ValueError: their number is wrong.
        """
        name = self._function.name
        if not isinstance(answers, (list, tuple)):
            raise TypeError(
                f"{name} returned {_article(type(answers).__name__)} for a batch of {count} requests: "
                "it must return a list with one answer for each request"
            )
        if len(answers) != count:
            raise ValueError(
                f"{name} returned {len(answers)} answers for a batch of {count} requests: it must return one answer "
                "for each request, in their order. For a request that failed, an exception may stand in its place"
            )
        return answers if isinstance(answers, list) else list(answers)

    def _deliver(self) -> None:
        """Give the callers of ended batches their answers. With `keep_order` a batch waits for those before it."""
        running = self._running
        if not self._options.keep_order:
            for batch in [each for each in running if each.outcome is not None]:
                running.remove(batch)
                _give(batch)
            return
        while running and running[0].outcome is not None:
            _give(running.popleft())


def _give(batch: _Batch) -> None:
    seen: set[int] = set()  # Errors that a caller got already. The next caller gets a copy.
    for each, answer in zip(batch.members, batch.outcome or (), strict=True):
        waiter = each.answer
        if waiter.done():
            continue
        if not isinstance(answer, BaseException):
            waiter.set_result(answer)
        elif isinstance(answer, asyncio.CancelledError):
            waiter.cancel()
        else:
            if isinstance(answer, StopIteration):  # A future cannot hold it.
                answer = RuntimeError(f"the batch function answered with {answer!r}")
            waiter.set_exception(own_copy(answer) if id(answer) in seen else answer)
            seen.add(id(answer))
    batch.members, batch.outcome = [], []


def _override(context: Context) -> float:
    """The request's own limit for its time in the queue, in seconds.

    Raises:
        UnfitRequest: it is not a number above 0.
    """
    value = context.metadata[TIMEOUT_KEY]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise UnfitRequest("", f"its metadata has {TIMEOUT_KEY}={value!r}: must be a number of seconds above 0")
    return float(value)


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"

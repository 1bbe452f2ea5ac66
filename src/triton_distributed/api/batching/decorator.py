"""`batched`: a function that answers a list of requests becomes a handler of one request."""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar, overload

from triton_distributed.api.batching.batcher import Batcher, BatchStatistics, Function, Options
from triton_distributed.api.batching.queue import QueuePolicy, check_count, check_seconds
from triton_distributed.api.batching.signature import BatchSignature, answer_type, read, request_type
from triton_distributed.context import Context
from triton_distributed.serving.endpoint import current_endpoint

RequestT = TypeVar("RequestT")
RequestT_contra = TypeVar("RequestT_contra", contravariant=True)
AnswerT = TypeVar("AnswerT")
AnswerT_co = TypeVar("AnswerT_co", covariant=True)
SelfT = TypeVar("SelfT")
SelfT_contra = TypeVar("SelfT_contra", contravariant=True)

Answers = Sequence[AnswerT | Exception] | Awaitable[Sequence[AnswerT | Exception]]
"""What a batch function returns: a list with an answer or an exception for each request, or an awaitable of it."""

NO_POLICY = QueuePolicy()


class Batched(Protocol[RequestT_contra, AnswerT_co]):
    """A handler whose requests are answered in batches.

    Attributes:
        function: the decorated function, for example for a unit test.
        least_inflight: the least `max_inflight` of an endpoint that it serves: max_size × max_batches.
    """

    function: Callable[..., Any]
    least_inflight: int

    def __call__(self, request: RequestT_contra, context: Context | None = None) -> Coroutine[Any, Any, AnswerT_co]:
        """Let a request join a batch, and return its answer."""

    def statistics(self) -> BatchStatistics:
        """The numbers of its batches in this process."""


class BatchedMethod(Protocol[SelfT_contra, RequestT_contra, AnswerT_co]):
    """A method whose requests are answered in batches. Each object has batches of its own.

    Attributes:
        function: the decorated function; its first argument is the object.
        least_inflight: see `Batched`.
    """

    function: Callable[..., Any]
    least_inflight: int

    @overload
    def __get__(
        self, instance: None, owner: Any = None, /
    ) -> BatchedMethod[SelfT_contra, RequestT_contra, AnswerT_co]: ...
    @overload
    def __get__(self, instance: SelfT_contra, owner: Any = None, /) -> Batched[RequestT_contra, AnswerT_co]: ...
    def __get__(self, instance: Any, owner: Any = None, /) -> Any:
        """The handler of one object."""

    def statistics(self) -> BatchStatistics:
        """The numbers of all objects' batches in this process."""


class Batching(Protocol):
    """The decorator that `batched(…)` returns."""

    @overload
    def __call__(self, function: Callable[[list[RequestT]], Answers[AnswerT]], /) -> Batched[RequestT, AnswerT]: ...
    @overload
    def __call__(
        self, function: Callable[[list[RequestT], list[Context]], Answers[AnswerT]], /
    ) -> Batched[RequestT, AnswerT]: ...
    @overload
    def __call__(
        self, function: Callable[[SelfT, list[RequestT]], Answers[AnswerT]], /
    ) -> BatchedMethod[SelfT, RequestT, AnswerT]: ...
    @overload
    def __call__(
        self, function: Callable[[SelfT, list[RequestT], list[Context]], Answers[AnswerT]], /
    ) -> BatchedMethod[SelfT, RequestT, AnswerT]: ...
    def __call__(self, function: Callable[..., Any], /) -> Any:
        """Decorate a function."""


@overload
def batched(function: Callable[[list[RequestT]], Answers[AnswerT]], /) -> Batched[RequestT, AnswerT]: ...
@overload
def batched(function: Callable[[list[RequestT], list[Context]], Answers[AnswerT]], /) -> Batched[RequestT, AnswerT]: ...
@overload
def batched(
    function: Callable[[SelfT, list[RequestT]], Answers[AnswerT]], /
) -> BatchedMethod[SelfT, RequestT, AnswerT]: ...
@overload
def batched(
    function: Callable[[SelfT, list[RequestT], list[Context]], Answers[AnswerT]], /
) -> BatchedMethod[SelfT, RequestT, AnswerT]: ...
@overload
def batched(
    *,
    max_size: int = 32,
    max_wait_s: float = 0.005,
    preferred_sizes: Sequence[int] = (),
    max_batches: int = 1,
    keep_order: bool = False,
    priority: Callable[[Any, Context | None], int] | None = None,
    policy: QueuePolicy = NO_POLICY,
    policies: Mapping[int, QueuePolicy] | None = None,
) -> Batching: ...
def batched(
    function: Callable[..., Any] | None = None,
    /,
    *,
    max_size: int = 32,
    max_wait_s: float = 0.005,
    preferred_sizes: Sequence[int] = (),
    max_batches: int = 1,
    keep_order: bool = False,
    priority: Callable[[Any, Context | None], int] | None = None,
    policy: QueuePolicy = NO_POLICY,
    policies: Mapping[int, QueuePolicy] | None = None,
) -> Any:
    """Decorate `def f(requests: list[Request]) -> list[Answer]`, async or plain, also a method. The result is a handler
    of one request, which takes part in batches.

    A plain function runs in a thread. Requests are checked one by one before they join a batch. A second parameter
    `contexts` gets the list of the requests' contexts. The answers are in the order of the requests; an exception in
    place of an answer fails that request only. A request that leaves is not in a later batch. If all requests of a
    running batch leave, an async function is cancelled.

    The function runs in a context of its own: with the variables of the endpoint, an id of its own, and the latest
    deadline of its requests; see `BatchContext`.

    Args:
        max_size: the most requests of a batch.
        max_wait_s: the most seconds that a request waits for others while a batch could run. With 0 a batch has the
            requests that are there already.
        preferred_sizes: sizes at which a batch does not wait for more requests.
        max_batches: how many batches run at once. The endpoint's `max_inflight` must be at least max_size ×
            max_batches; twice that lets the next batch gather while one runs.
        keep_order: answers leave in the order in which the requests came, so priorities do not count.
        priority: a function (request, context) → priority. Requests with larger priorities go first. By default it is
            the priority of the call.
        policy: how long and how many requests may wait; see `QueuePolicy`.
        policies: the policies of single priorities, instead of `policy`.

    Raises:
        TypeError: the function has other parameters, or its annotations are not lists.
        ValueError: an option is outside its range, or options contradict each other.

    Raises (from the handler):
        InvalidRequest: the metadata has an invalid `queue_timeout_s`; see `QueuePolicy`.
        Overloaded: a policy has rejected the request.
        TypeError, ValueError: the function has not returned a list with one answer for each request.
        Exception: the function has raised it for the batch, or returned it for this request.
    """
    options = checked_options(
        max_size, max_wait_s, preferred_sizes, max_batches, keep_order, priority, policy, policies or {}
    )

    def decorate(function: Callable[..., Any]) -> Any:
        signature = read(function, "batched", "contexts", needed=False)
        name = f"batched: {name_of(function)}"
        types = request_type(signature.batch, name), answer_type(signature.answers, name)
        return handler(function, function, signature, types, options, takes_contexts=signature.takes_second)

    return decorate if function is None else decorate(function)


def checked_options(
    max_size: int,
    max_wait_s: float,
    preferred_sizes: Sequence[int],
    max_batches: int,
    keep_order: bool,
    priority: Callable[[Any, Context | None], int] | None,
    policy: QueuePolicy,
    policies: Mapping[int, QueuePolicy],
) -> Options:
    """The options of a decorator.

    Raises:
        TypeError, ValueError: an option is invalid; see `batched`.
    """
    check_count("max_size", max_size)
    check_count("max_batches", max_batches)
    check_seconds("max_wait_s", max_wait_s, zero=True)
    if not isinstance(preferred_sizes, Sequence):
        raise TypeError(f"preferred_sizes={preferred_sizes!r}: must be a list of sizes")
    for each in preferred_sizes:
        if type(each) is not int or not 1 <= each <= max_size:
            raise ValueError(f"preferred_sizes={preferred_sizes!r}: each must be from 1 to max_size={max_size}")
    if priority is not None and not callable(priority):
        raise TypeError(f"priority={priority!r}: must be a function (request, context) -> int")
    if not isinstance(policies, Mapping):
        raise TypeError(f"policies={policies!r}: must be a mapping of priorities to QueuePolicy")
    for key, each_policy in ((None, policy), *policies.items()):
        if (key is not None and type(key) is not int) or not isinstance(each_policy, QueuePolicy):
            raise TypeError("policy= must be a QueuePolicy, and policies= a mapping of priorities to QueuePolicy")
        if keep_order and each_policy.timeout_s is not None and each_policy.on_timeout == "delay":
            raise ValueError("keep_order=True: a policy with on_timeout='delay' would change the order")
    if keep_order and (priority is not None or policies):
        raise ValueError("keep_order=True: priority= and policies= would change the order")
    return Options(
        max_size, max_wait_s, tuple(preferred_sizes), max_batches, bool(keep_order), priority, policy, dict(policies)
    )


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function, for errors."""
    return getattr(function, "__qualname__", None) or repr(function)


def handler(
    function: Callable[..., Any],
    call: Callable[..., Any],
    signature: BatchSignature,
    types: tuple[Any, Any],
    options: Options,
    *,
    takes_contexts: bool,
    check: Callable[[Any], None] | None = None,
) -> Any:
    """Make the handler of a decorated function.

    Args:
        function: the decorated function.
        call: the function to call with the list of requests.
        signature: the signature of `function`.
        types: the types of one request and of one answer.
        options: the options of its batches.
        takes_contexts: `call` also takes the contexts.
        check: raises if a request may not join a batch.
    """
    name = name_of(function)
    batchers: weakref.WeakSet[Batcher] = weakref.WeakSet()
    direct: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Any, Any]] = weakref.WeakKeyDictionary()
    key = object()

    def batcher(instance: Any = None) -> Batcher:
        endpoint = current_endpoint.get()
        if endpoint is not None:
            kept = endpoint.kept
        else:
            kept = direct.setdefault(asyncio.get_running_loop(), {})
        found: Batcher | None = kept.get((key, id(instance)))
        if found is None:
            bound = functools.partial(call, instance) if signature.is_method else call
            found = Batcher(Function(bound, name, signature.on_loop, takes_contexts), options, endpoint)
            kept[key, id(instance)] = found  # It keeps the object alive, so no other object gets its id.
            batchers.add(found)
        return found

    def statistics() -> BatchStatistics:
        total = BatchStatistics()
        for each in batchers:
            total.add(each.statistics())
        return total

    made: Any
    if signature.is_method:

        async def method(self: Any, request: Any, context: Context | None = None) -> Any:
            if check is not None:
                check(request)
            return await batcher(self).answer(request, context)

        made = method
    else:

        async def plain(request: Any, context: Context | None = None) -> Any:
            if check is not None:
                check(request)
            return await batcher().answer(request, context)

        made = plain
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
        if hasattr(function, attribute):
            setattr(made, attribute, getattr(function, attribute))
    # Not `functools.wraps`: the worker and the contract must see the types of one request, not those of the list.
    made.__annotations__ = {"request": types[0], "context": Context | None, "return": types[1]}
    made.function, made.statistics = function, statistics
    made.least_inflight = options.max_size * options.max_batches
    return made

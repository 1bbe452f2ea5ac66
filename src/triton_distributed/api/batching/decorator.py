"""`batched`: a function that answers a list of requests becomes a handler of one request."""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypedDict, TypeVar, Unpack, overload

from triton_distributed.api.batching.batcher import Batcher, BatchStatistics, Function, Options
from triton_distributed.api.batching.queue import QueuePolicy, check_count, check_seconds
from triton_distributed.api.batching.signature import BatchSignature, answer_type, read, request_type
from triton_distributed.context import Context
from triton_distributed.runtime.options import unexpected
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


class BatchOptions(TypedDict, total=False):
    """The options of `batched` and `batched_arrays`, as keyword arguments."""

    max_size: int
    """The most requests of a batch; 32 by default."""

    max_wait_s: float
    """The most seconds that a request waits for others while a batch could run; 0.005 by default. With 0 a batch has
    the requests that are there already."""

    preferred_sizes: Sequence[int]
    """Sizes at which a batch does not wait for more requests."""

    max_batches: int
    """How many batches run at once; 1 by default. The endpoint's `max_inflight` must be at least max_size ×
    max_batches; twice that lets the next batch gather while one runs."""

    keep_order: bool
    """Answers leave in the order in which the requests came, so priorities do not count."""

    priority: Callable[[Any, Context | None], int] | None
    """A function (request, context) → priority. Requests with larger priorities go first. By default it is the priority
    of the call."""

    policy: QueuePolicy
    """How long and how many requests may wait; see `QueuePolicy`."""

    policies: Mapping[int, QueuePolicy] | None
    """The policies of single priorities, instead of `policy`."""


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
def batched(**options: Unpack[BatchOptions]) -> Batching: ...
def batched(function: Callable[..., Any] | None = None, /, **options: Unpack[BatchOptions]) -> Any:
    """Decorate `def f(requests: list[Request]) -> list[Answer]`, async or plain, also a method. The result is a handler
    of one request, which takes part in batches.

    A plain function runs in a thread. Requests are checked one by one before they join a batch. A second parameter
    `contexts` gets the list of the requests' contexts. The answers are in the order of the requests; an exception in
    place of an answer fails that request only. A request that leaves is not in a later batch. If all requests of a
    running batch leave, an async function is cancelled.

    The function runs in a context of its own: with the variables of the endpoint, an id of its own, and the latest
    deadline of its requests; see `BatchContext`.

    Args:
        function: the function.
        options: see `BatchOptions`.

    Raises:
        TypeError: the function has other parameters, its annotations are not lists, or an option is unknown.
        ValueError: an option is outside its range, or options contradict each other.

    Raises (from the handler):
        InvalidRequest: the metadata has an invalid `queue_timeout_s`; see `QueuePolicy`.
        Overloaded: a policy has rejected the request.
        TypeError, ValueError: the function has not returned a list with one answer for each request.
        Exception: the function has raised it for the batch, or returned it for this request.
    """
    checked = checked_options("batched", options)

    def decorate(function: Callable[..., Any]) -> Any:
        signature = read(function, "batched", "contexts", needed=False)
        name = f"batched: {name_of(function)}"
        types = request_type(signature.batch, name), answer_type(signature.answers, name)
        return handler(function, function, signature, types, checked, takes_contexts=signature.takes_second)

    return decorate if function is None else decorate(function)


def checked_options(decorator: str, options: BatchOptions, more: Sequence[str] = ()) -> Options:
    """The options of a decorator.

    Args:
        decorator: its name, for the error about an unknown option.
        options: as the program gave them.
        more: the names of the decorator's other options.

    Raises:
        TypeError, ValueError: an option is invalid or unknown; see `batched`.
    """
    known = BatchOptions.__annotations__.keys()
    if unknown := options.keys() - known:
        raise unexpected(decorator, sorted(unknown), {*known, *more})
    max_size, max_batches = options.get("max_size", 32), options.get("max_batches", 1)
    max_wait_s, sizes = options.get("max_wait_s", 0.005), options.get("preferred_sizes", ())
    keep_order, priority = options.get("keep_order", False), options.get("priority")
    policy, policies = options.get("policy", NO_POLICY), options.get("policies") or {}
    check_count("max_size", max_size)
    check_count("max_batches", max_batches)
    check_seconds("max_wait_s", max_wait_s, zero=True)
    if not isinstance(sizes, Sequence):
        raise TypeError(f"preferred_sizes={sizes!r}: must be a list of sizes")
    for each in sizes:
        if type(each) is not int or not 1 <= each <= max_size:
            raise ValueError(f"preferred_sizes={sizes!r}: each must be from 1 to max_size={max_size}")
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
    return Options(max_size, max_wait_s, tuple(sizes), max_batches, bool(keep_order), priority, policy, dict(policies))


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

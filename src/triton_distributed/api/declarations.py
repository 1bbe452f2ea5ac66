"""`@serve`: declares that a function serves an endpoint. The function stays as it is."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar, Unpack, overload

from triton_distributed.api.contracts import Bidirectional, Contract, Stream, Unary
from triton_distributed.api.fit import check_handler
from triton_distributed.api.options import ServeOptions
from triton_distributed.context import Context
from triton_distributed.names import EndpointName
from triton_distributed.serving.sender import Sender

if TYPE_CHECKING:
    from triton_distributed.api.batching import Batched, BatchedMethod

DECLARED = "__trd_declared__"
"""The attribute of a function that holds its `Declaration`."""

R = TypeVar("R")
A = TypeVar("A")
S = TypeVar("S")
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

PushesItems: TypeAlias = Coroutine[Any, Any, Sender[A]]
"""The result of calling an async handler that returns a `Sender`."""

UnaryHandler: TypeAlias = (
    Callable[[R], Awaitable[A]] | Callable[[R, Context], Awaitable[A]] | Callable[[R], A] | Callable[[R, Context], A]
)
StreamHandler: TypeAlias = (
    Callable[[R], AsyncIterator[A]]
    | Callable[[R, Context], AsyncIterator[A]]
    | Callable[[R], Iterator[A]]
    | Callable[[R, Context], Iterator[A]]
    | Callable[[R], Awaitable[Sender[A]]]
    | Callable[[R, Context], Awaitable[Sender[A]]]
)
BidirectionalHandler: TypeAlias = (
    Callable[[AsyncIterator[R]], AsyncIterator[A]]
    | Callable[[AsyncIterator[R], Context], AsyncIterator[A]]
    | Callable[[AsyncIterator[R]], Awaitable[Sender[A]]]
    | Callable[[AsyncIterator[R], Context], Awaitable[Sender[A]]]
)


class Declaration(NamedTuple):
    """What `@serve` says about a function.

    Attributes:
        name: the endpoint that it serves.
        contract: the endpoint's contract; None if only a name was given.
        options: the options for serving it.
    """

    name: EndpointName
    contract: Contract[Any, Any] | None
    options: ServeOptions


# A decorator for each kind of contract. It takes functions and methods, with and without a context, and returns the
# same function. To tell this to a type checker, each form needs its own overload.


class ServesUnary(Protocol[R, A]):
    """The decorator of a handler for a unary endpoint."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # The overloads below lose the attributes.
        self, function: Batched[R, A], /
    ) -> Batched[R, A]: ...
    @overload
    def __call__(self, function: BatchedMethod[S, R, A], /) -> BatchedMethod[S, R, A]: ...
    @overload
    def __call__(self, function: Callable[[R], Coroutine[Any, Any, A]], /) -> Callable[[R], Coroutine[Any, Any, A]]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]  # The type `A` may be a coroutine.
        self, function: Callable[[R, Context], Coroutine[Any, Any, A]], /
    ) -> Callable[[R, Context], Coroutine[Any, Any, A]]: ...
    @overload
    def __call__(
        self, function: Callable[[S, R], Coroutine[Any, Any, A]], /
    ) -> Callable[[S, R], Coroutine[Any, Any, A]]: ...
    @overload
    def __call__(
        self, function: Callable[[S, R, Context], Coroutine[Any, Any, A]], /
    ) -> Callable[[S, R, Context], Coroutine[Any, Any, A]]: ...
    @overload
    def __call__(self, function: Callable[[R], A], /) -> Callable[[R], A]: ...
    @overload
    def __call__(self, function: Callable[[R, Context], A], /) -> Callable[[R, Context], A]: ...
    @overload
    def __call__(self, function: Callable[[S, R], A], /) -> Callable[[S, R], A]: ...
    @overload
    def __call__(self, function: Callable[[S, R, Context], A], /) -> Callable[[S, R, Context], A]: ...


class ServesStream(Protocol[R, A]):
    """The decorator of a handler for an endpoint that answers with a stream."""

    @overload
    def __call__(self, function: Callable[[R], AsyncIterator[A]], /) -> Callable[[R], AsyncIterator[A]]: ...
    @overload
    def __call__(
        self, function: Callable[[R, Context], AsyncIterator[A]], /
    ) -> Callable[[R, Context], AsyncIterator[A]]: ...
    @overload
    def __call__(self, function: Callable[[S, R], AsyncIterator[A]], /) -> Callable[[S, R], AsyncIterator[A]]: ...
    @overload
    def __call__(
        self, function: Callable[[S, R, Context], AsyncIterator[A]], /
    ) -> Callable[[S, R, Context], AsyncIterator[A]]: ...
    @overload
    def __call__(self, function: Callable[[R], Iterator[A]], /) -> Callable[[R], Iterator[A]]: ...
    @overload
    def __call__(self, function: Callable[[R, Context], Iterator[A]], /) -> Callable[[R, Context], Iterator[A]]: ...
    @overload
    def __call__(self, function: Callable[[S, R], Iterator[A]], /) -> Callable[[S, R], Iterator[A]]: ...
    @overload
    def __call__(
        self, function: Callable[[S, R, Context], Iterator[A]], /
    ) -> Callable[[S, R, Context], Iterator[A]]: ...
    @overload
    def __call__(self, function: Callable[[R], PushesItems[A]], /) -> Callable[[R], PushesItems[A]]: ...
    @overload
    def __call__(
        self, function: Callable[[R, Context], PushesItems[A]], /
    ) -> Callable[[R, Context], PushesItems[A]]: ...
    @overload
    def __call__(self, function: Callable[[S, R], PushesItems[A]], /) -> Callable[[S, R], PushesItems[A]]: ...
    @overload
    def __call__(
        self, function: Callable[[S, R, Context], PushesItems[A]], /
    ) -> Callable[[S, R, Context], PushesItems[A]]: ...


@overload
def serve(endpoint: Unary[R, A], /, **options: Unpack[ServeOptions]) -> ServesUnary[R, A]: ...
@overload
def serve(endpoint: Stream[R, A], /, **options: Unpack[ServeOptions]) -> ServesStream[R, A]: ...
@overload
def serve(endpoint: Bidirectional[R, A], /, **options: Unpack[ServeOptions]) -> ServesStream[AsyncIterator[R], A]: ...
@overload
def serve(endpoint: str, /, **options: Unpack[ServeOptions]) -> Callable[[FunctionT], FunctionT]: ...


def serve(endpoint: Contract[Any, Any] | str, /, **options: Unpack[ServeOptions]) -> Any:
    """Declare that a function or method serves an endpoint. `trd serve`, `trd.run` and `here.serve` serve it.

    Args:
        endpoint: the endpoint's contract; or its name, `namespace.component.endpoint`. With a name, the function's own
            annotations are the types.
        options: see `ServeOptions`.

    Returns:
        A decorator that returns the function itself.

    Raises:
        TypeError: the function does not fit the contract (the text names the parameter), or an option is unknown.
        ValueError: `max_inflight` is too small for the batches of a batched function.
        InvalidName: the name does not have exactly three valid parts.
    """
    if callable(endpoint):
        raise TypeError("serve needs the endpoint: @trd.serve(CONTRACT) or @trd.serve('namespace.component.endpoint')")
    check_known(options)
    contract = endpoint if isinstance(endpoint, Contract) else None
    name = contract.name if contract is not None else EndpointName.parse(endpoint)  # type: ignore[arg-type]

    def declare(function: Any) -> Any:
        if not callable(function) or inspect.isclass(function):
            raise TypeError(f"serve decorates a function or a method, not {function!r}")
        if contract is not None:
            check_handler(function, contract)
        limit, least = options.get("max_inflight"), getattr(function, "least_inflight", 0)
        if limit is not None and limit < least:
            raise ValueError(f"max_inflight={limit}: the batches of {function.__qualname__} take {least} requests")
        if (known := getattr(function, DECLARED, None)) is not None:
            raise TypeError(f"{function!r} already serves {known.name}: serve another function, or use here.serve()")
        try:
            setattr(function, DECLARED, Declaration(name, contract, options))
        except AttributeError:
            raise TypeError(
                f"serve cannot mark {function!r}, which takes no attributes, as bound methods and builtins: decorate "
                "the function in its class, or use here.serve(endpoint, handler)"
            ) from None
        return function

    return declare


def check_known(options: Mapping[str, object]) -> None:
    """Check the names of the options for serving an endpoint.

    Raises:
        TypeError: there is no such option.
    """
    for each in options:
        if each not in ServeOptions.__annotations__:
            known = ", ".join(ServeOptions.__annotations__)
            raise TypeError(f"serve() got an unexpected keyword argument {each!r}: the options are {known}")


def declaration_of(function: object) -> Declaration | None:
    """What `@serve` says about a function; None if it was not declared."""
    found = getattr(function, DECLARED, None)
    return found if isinstance(found, Declaration) else None


def declared_in(namespace: Mapping[str, Any]) -> list[Any]:
    """The declared functions of a module or an object, in the order of their definition.

    Args:
        namespace: names and values, for example `vars(module)`.
    """
    found = {id(each): each for each in namespace.values() if declaration_of(each) is not None}
    return list(found.values())

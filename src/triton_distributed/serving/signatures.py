"""Reads a handler's signature: its parameters, and the checks of requests and items."""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

from triton_distributed.annotated import Annotated
from triton_distributed.payload.typed import RequestDecoder, typed_checker, typed_decoder
from triton_distributed.serving.sender import Sender

#: The name of an attribute. A function that checks its request and response itself has its `Checks` there. See
#: `decorators.triton_endpoint`.
CHECKS_ITSELF = "__triton_checks_itself__"

STREAMS = (
    collections.abc.AsyncIterator,
    collections.abc.AsyncIterable,
    collections.abc.AsyncGenerator,
    collections.abc.Iterator,
    collections.abc.Iterable,
    collections.abc.Generator,
    Sender,
)
REQUEST_STREAMS = STREAMS[:3]
_AWAITABLES = (collections.abc.Awaitable, collections.abc.Coroutine)
UNTYPED: tuple[Any, ...] = (Any, object, inspect.Parameter.empty)
_REMEDY = "use another type, or Any for no check"


class Checks(NamedTuple):
    """The checks that a decorated function does itself.

    Attributes:
        function: the decorated function. Another decorator may have copied this mark to a function around it.
        decode: bytes → request, in the form that the function takes.
    """

    function: Any
    decode: RequestDecoder


class Signature(NamedTuple):
    """The facts that a handler's signature gives.

    Attributes:
        takes_context: its second parameter gets the context.
        context_name: the keyword-only parameter that gets the context; empty without one.
        takes_stream: its request is an async iterator, to which the caller streams requests.
        decode: bytes → request, checked against the annotation.
        check: item → None, raises if the item does not fit the annotation; None if there is nothing to check.
    """

    takes_context: bool
    takes_stream: bool
    decode: RequestDecoder
    check: Callable[[Any], Any] | None
    context_name: str = ""


class Types(NamedTuple):
    """The types that a contract gives to a handler. They replace the handler's annotations.

    Attributes:
        request: the type of the request, or of each of its items.
        answer: the type of each item of the answer.
        streams: the caller streams requests.
    """

    request: Any
    answer: Any
    streams: bool = False


def read_signature(function: Any, plain: Any, name: str, declared: Types | None = None) -> Signature:
    """Read a handler's signature.

    Args:
        function: the handler.
        plain: the function or method in it, without partials.
        name: its name, for errors.
        declared: the types of the endpoint's contract; None to read the handler's annotations.

    Raises:
        TypeError: the handler does not take one or two positional arguments; or the annotation of its request or of its
            result cannot be resolved or checked.
    """
    try:
        signature = inspect.signature(function, follow_wrapped=False)
        if any(each.kind == each.VAR_POSITIONAL for each in signature.parameters.values()):
            signature = inspect.signature(function)  # Follows `__wrapped__` of decorators.
    except (TypeError, ValueError):
        return Signature(False, False, typed_decoder(Any), None)  # A builtin function takes the request.
    positional = [
        each
        for each in signature.parameters.values()
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    rest = any(each.kind == each.VAR_POSITIONAL for each in signature.parameters.values())
    needed = sum(each.default is each.empty for each in positional)
    if (not positional and not rest) or needed > 2:
        raise TypeError(f"handler {name} takes {needed} arguments; a handler takes a request and optionally a context")
    takes_context = len(positional) > 1 and (
        positional[1].default is inspect.Parameter.empty or positional[1].name in ("context", "ctx")
    )
    context_name = "" if takes_context else _keyword_only_context(signature, name)
    if declared is not None:
        decode = made(f"handler {name}: the contract's request", typed_decoder, declared.request)
        check = made(f"handler {name}: the contract's answer", typed_checker, declared.answer)
        if check is not None:
            check = _naming(check, name, declared.answer)
        return Signature(takes_context, declared.streams, decode, check, context_name)
    checks = getattr(plain, CHECKS_ITSELF, None)
    if checks is not None or not positional:
        decode = typed_decoder(Any)
        if checks is not None and checks.function is getattr(plain, "__func__", plain):
            decode = checks.decode
        return Signature(takes_context, False, decode, None, context_name)

    inner = inspect.unwrap(plain)
    hints = getattr(inner, "__annotations__", {})
    request = positional[0]
    of_request = f"handler {name}: its parameter `{request.name}`"
    of_response = f"handler {name}: its return value"
    hint = resolved(hints.get(request.name, request.annotation), inner, of_request)
    takes_stream = is_stream(hint, REQUEST_STREAMS)
    if takes_stream:
        hint = element(hint)
    decode = made(of_request, typed_decoder, hint)
    hint = resolved(hints.get("return", signature.return_annotation), inner, of_response)
    if inspect.isasyncgenfunction(plain) or inspect.isgeneratorfunction(plain):
        if inner is plain and hint not in UNTYPED and not is_stream(hint, STREAMS):
            iterator = "AsyncIterator" if inspect.isasyncgenfunction(plain) else "Iterator"
            raise TypeError(
                f"{of_response} is {written(hint)}, but it is a generator: "
                f"annotate it with {iterator}[{written(hint)}] if it yields that, or with Any for no check"
            )
        hint = element(hint)
    check = made(of_response, typed_checker, item_hint(hint))
    return Signature(takes_context, takes_stream, decode, check, context_name)


def _naming(check: Callable[[Any], Any], name: str, hint: Any) -> Callable[[Any], Any]:
    """A check whose error names the handler and the type in its contract."""

    def checked(value: Any) -> Any:
        try:
            return check(value)
        except TypeError as error:
            words = f"handler {name} answered with {written(type(value))}, and its contract has {written(hint)}"
            raise TypeError(f"{words}: {error}") from None

    return checked


class Annotations(NamedTuple):
    """The annotations of a handler.

    Attributes:
        name: the handler's name.
        parameter: the name of the request's parameter.
        request: the annotation of the request.
        result: the annotation of the return value.
        generator: the handler is a generator function, of either kind.
    """

    name: str
    parameter: str
    request: Any
    result: Any
    generator: bool


def annotations_of(function: Any) -> Annotations | None:
    """The annotations of a function; None if it has no signature or they cannot be resolved yet."""
    name = getattr(function, "__qualname__", None) or repr(function)
    try:
        parameters = list(inspect.signature(function, follow_wrapped=False).parameters.values())
    except (TypeError, ValueError):
        return None
    if parameters and parameters[0].name == "self" and not hasattr(function, "__self__"):
        del parameters[0]  # A function in the body of a class becomes a method.
    if not parameters:
        return None
    plain = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    inner = inspect.unwrap(plain)
    hints = getattr(inner, "__annotations__", {})
    try:
        request = resolved(hints.get(parameters[0].name, parameters[0].annotation), inner, name)
        result = resolved(hints.get("return", inspect.Parameter.empty), inner, name)
    except TypeError:
        return None
    generator = inspect.isasyncgenfunction(plain) or inspect.isgeneratorfunction(plain)
    return Annotations(name, parameters[0].name, request, result, generator)


def _keyword_only_context(signature: inspect.Signature, name: str) -> str:
    """The name of the keyword-only parameter that gets the context, or the empty text.

    Raises:
        TypeError: another keyword-only parameter has no default, so no request could be served.
    """
    keyword_only = [each for each in signature.parameters.values() if each.kind is each.KEYWORD_ONLY]
    for each in keyword_only:
        if each.default is each.empty and each.name not in ("context", "ctx"):
            raise TypeError(
                f"handler {name} has a keyword-only parameter `{each.name}` without a default, which no request gives: "
                "a handler takes a request and optionally a context"
            )
    return next((each.name for each in keyword_only if each.name in ("context", "ctx")), "")


def resolved(annotation: Any, function: Any, where: str) -> Any:
    """Resolve an annotation in the scope in which the function was written."""
    function = getattr(function, "__func__", function)
    holder = types.SimpleNamespace(__annotations__={"hint": annotation})
    names = getattr(function, "__globals__", {})
    try:
        return typing.get_type_hints(holder, names, _closure(function), include_extras=True)["hint"]
    except Exception as error:  # For example a name that only a type checker knows, or a local class.
        raise TypeError(
            f"{where} is annotated with {annotation!r}, which cannot be resolved ({error}): define or import it at "
            "module level, outside `if TYPE_CHECKING`, or use Any for no check"
        ) from None


def _closure(function: Any) -> dict[str, Any]:
    """Return the names that a function uses from the functions around it."""
    found = {}
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=False):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # The name is not assigned yet.
            pass
    return found


def made(where: str, make: Callable[[Any], Any], hint: Any) -> Any:
    """Return `make(hint)`, or raise a `TypeError` that names the hint's place and a remedy."""
    try:
        return make(hint)
    except TypeError as error:
        raise TypeError(f"{where} is {written(hint)}, which cannot be checked: {error}; {_REMEDY}") from None


def written(hint: Any) -> str:
    """An annotation as it appears in source."""
    return hint.__qualname__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def bare(hint: Any) -> Any:
    """Return a hint without metadata and aliases."""
    while True:
        if typing.get_origin(hint) is typing.Annotated:
            hint = typing.get_args(hint)[0]
        elif type(hint).__name__ == "TypeAliasType":  # `type X = …` of Python 3.12 or typing_extensions.
            hint = hint.__value__
        else:
            return hint


def is_stream(hint: Any, kinds: tuple[Any, ...] = STREAMS) -> bool:
    """Whether an annotation is one of these kinds of streams."""
    hint = bare(hint)
    return typing.get_origin(hint) in kinds or hint in kinds


def element(hint: Any) -> Any:
    """The type of the items of a stream, given its annotation; Any if it is not known."""
    arguments = typing.get_args(bare(hint))
    return arguments[0] if arguments and is_stream(hint, STREAMS) else Any


def item_hint(hint: Any) -> Any:
    """Return the hint for each item. `hint` is a handler's return annotation: a stream of items, or one item."""
    plain = bare(hint)
    origin, arguments = typing.get_origin(plain) or plain, typing.get_args(plain)
    if origin in STREAMS:
        return element(plain)
    if origin in _AWAITABLES:
        return item_hint(arguments[-1]) if arguments else Any
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(item_hint(each) for each in arguments)]  # noqa: UP007
    if origin in (typing.NoReturn, typing.Never) or _is_whole_item(origin):
        return Any
    return hint


def _is_whole_item(kind: Any) -> bool:
    """Return whether values of this type need no check here.

    That is so if the type is `Annotated` or a stream class that is not in `STREAMS`.
    """
    return isinstance(kind, type) and issubclass(
        kind, (Annotated, collections.abc.AsyncIterable, collections.abc.Generator, map, filter, zip)
    )

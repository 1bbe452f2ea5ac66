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

#: The attribute of a function that checks its own request and response: its `Checks`. See `decorators.triton_endpoint`.
CHECKS_ITSELF = "__triton_checks_itself__"

_STREAMS = (
    collections.abc.AsyncIterator,
    collections.abc.AsyncIterable,
    collections.abc.AsyncGenerator,
    collections.abc.Iterator,
    collections.abc.Iterable,
    collections.abc.Generator,
)
_REQUEST_STREAMS = _STREAMS[:3]
_AWAITABLES = (collections.abc.Awaitable, collections.abc.Coroutine)
_UNTYPED: tuple[Any, ...] = (Any, object, inspect.Parameter.empty)
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


def read_signature(function: Any, plain: Any, name: str) -> Signature:
    """Read a handler's signature.

    Args:
        function: the handler.
        plain: the function or method in it, without partials.
        name: its name, for errors.

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
    hint = _resolved(hints.get(request.name, request.annotation), inner, of_request)
    takes_stream = _is_stream(hint, _REQUEST_STREAMS)
    if takes_stream:
        hint = _element(hint)
    decode = made(of_request, typed_decoder, hint)
    hint = _resolved(hints.get("return", signature.return_annotation), inner, of_response)
    if inspect.isasyncgenfunction(plain) or inspect.isgeneratorfunction(plain):
        if inner is plain and hint not in _UNTYPED and not _is_stream(hint, _STREAMS):
            iterator = "AsyncIterator" if inspect.isasyncgenfunction(plain) else "Iterator"
            raise TypeError(
                f"{of_response} is {_written(hint)}, but it is a generator: "
                f"annotate it with {iterator}[{_written(hint)}] if it yields that, or with Any for no check"
            )
        hint = _element(hint)
    check = made(of_response, typed_checker, item_hint(hint))
    return Signature(takes_context, takes_stream, decode, check, context_name)


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


def _resolved(annotation: Any, function: Any, where: str) -> Any:
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
        raise TypeError(f"{where} is {_written(hint)}, which cannot be checked: {error}; {_REMEDY}") from None


def _written(hint: Any) -> str:
    return hint.__qualname__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _bare(hint: Any) -> Any:
    """Return a hint without metadata and aliases."""
    while True:
        if typing.get_origin(hint) is typing.Annotated:
            hint = typing.get_args(hint)[0]
        elif type(hint).__name__ == "TypeAliasType":  # `type X = …` of Python 3.12 or typing_extensions.
            hint = hint.__value__
        else:
            return hint


def _is_stream(hint: Any, kinds: tuple[Any, ...]) -> bool:
    hint = _bare(hint)
    return typing.get_origin(hint) in kinds or hint in kinds


def _element(hint: Any) -> Any:
    arguments = typing.get_args(_bare(hint))
    return arguments[0] if arguments and _is_stream(hint, _STREAMS) else Any


def item_hint(hint: Any) -> Any:
    """Return the hint for each item. `hint` is a handler's return annotation: a stream of items, or one item."""
    bare = _bare(hint)
    origin = typing.get_origin(bare) or bare
    if origin in _STREAMS:
        return _element(bare)
    if origin in _AWAITABLES:
        return item_hint(typing.get_args(bare)[-1]) if typing.get_args(bare) else Any
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(item_hint(each) for each in typing.get_args(bare))]  # noqa: UP007
    if origin in (typing.NoReturn, typing.Never) or _is_whole_item(origin):
        return Any
    return hint


def _is_whole_item(kind: Any) -> bool:
    """Whether instances are not checked: streams of another class, and `Annotated` items."""
    return isinstance(kind, type) and issubclass(
        kind, (Annotated, collections.abc.AsyncIterable, collections.abc.Generator, map, filter, zip)
    )

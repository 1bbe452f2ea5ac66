"""Checks a handler against its contract, when the handler is declared."""

from __future__ import annotations

import collections.abc
import inspect
import types
from typing import Any, get_args, get_origin

from triton_distributed.api.contracts import Contract
from triton_distributed.serving.signatures import (
    REQUEST_STREAMS,
    UNTYPED,
    annotations_of,
    bare,
    element,
    is_stream,
    item_hint,
    written,
)


def check_handler(function: Any, contract: Contract[Any, Any]) -> None:
    """Check that a handler fits a contract.

    The parameter's annotation must be the contract's request type or a base class of it. The return annotation must be
    the answer type or a subclass of it. A parameter without annotation takes what the contract says. Names that cannot
    be resolved yet are checked when the handler is served.

    Raises:
        TypeError: the handler does not fit; the text names the parameter. Or the contract has no types.
    """
    wanted, answer, streams = contract.types
    found = annotations_of(function)
    if found is None:
        return
    name, parameter, request, result, generator = found
    where = f"handler {name} does not fit {contract!r}"
    if contract.kind == "unary" and (generator or is_stream(result)):
        raise TypeError(f"{where}: it makes a stream, and a unary endpoint answers with one value; use trd.Stream")
    if contract.kind != "unary" and not generator and result not in UNTYPED and not _makes_stream(result):
        raise TypeError(f"{where}: its return value is {written(result)}, not a stream of items; use trd.Unary")
    taken = is_stream(request, REQUEST_STREAMS)
    if request not in UNTYPED and taken != streams:
        what = "takes a stream" if taken else "takes one request"
        raise TypeError(f"{where}: its parameter `{parameter}` {what}; a {contract.kind} endpoint does not")
    if taken:
        request = element(request)
    if not _takes(request, wanted):
        hint = "; put @trd.serve above @trd.batched" if request == list.__class_getitem__(wanted) else ""
        raise TypeError(f"{where}: its parameter `{parameter}` is {written(request)}, not {written(wanted)}{hint}")
    item = item_hint(result)
    if not _takes(answer, item):
        raise TypeError(f"{where}: it answers with {written(item)}, not {written(answer)}")


def check_bound(function: Any) -> None:
    """Check that a handler is not an unbound method, whose `self` would get the request.

    Raises:
        TypeError: the handler is an unbound method; the text says what to pass.
    """
    if inspect.isfunction(function) and next(iter(inspect.signature(function).parameters), "") == "self":
        kind, _, name = function.__qualname__.rpartition(".")
        kind = kind.rpartition(".")[2] or "Class"
        raise TypeError(
            f"{function.__qualname__} is a method without its object: serve that of one, `{kind}(…).{name}`"
        )


def _makes_stream(result: Any) -> bool:
    """Whether a return annotation is a stream: an iterator type, or a class that is one, such as `ItemStream`."""
    kind = get_origin(bare(result)) or bare(result)
    iterators = (collections.abc.AsyncIterable, collections.abc.Iterator)
    return is_stream(result) or (inspect.isclass(kind) and issubclass(kind, iterators))


def _takes(wide: Any, narrow: Any) -> bool:
    """Whether a place for values of the type `wide` takes values of the type `narrow`.

    Unions, protocols, TypedDicts and other forms are not compared here: values are checked when they travel.
    """
    wide, narrow = bare(wide), bare(narrow)
    if wide in UNTYPED or narrow in UNTYPED or wide == narrow:
        return True
    wide_class, narrow_class = _class_of(wide), _class_of(narrow)
    if not inspect.isclass(wide_class) or not inspect.isclass(narrow_class) or wide_class is types.UnionType:
        return True
    try:
        if not issubclass(narrow_class, wide_class):
            return (wide_class is float and narrow_class is int) or narrow_class is types.UnionType
    except TypeError:  # A TypedDict or a protocol.
        return True
    inner, others = _arguments(wide), _arguments(narrow)
    return wide_class is not narrow_class or len(inner) != len(others) or all(map(_takes, inner, others))


def _arguments(hint: Any) -> tuple[Any, ...]:
    generic = getattr(hint, "__pydantic_generic_metadata__", None)
    return generic["args"] if generic else get_args(hint)


def _class_of(hint: Any) -> Any:
    """The class of a hint, without type arguments."""
    generic = getattr(hint, "__pydantic_generic_metadata__", None)
    return (generic and generic["origin"]) or get_origin(hint) or hint

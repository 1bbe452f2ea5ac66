"""Checks a handler against its contract, when the handler is declared."""

from __future__ import annotations

import inspect
import types
from typing import Any, get_args, get_origin

from triton_distributed.api.contracts import Contract
from triton_distributed.serving.signatures import (
    REQUEST_STREAMS,
    UNTYPED,
    annotations_of,
    element,
    is_stream,
    item_hint,
    written,
)


def check_handler(function: Any, contract: Contract[Any, Any]) -> None:
    """Check that a handler fits a contract.

    An annotation must be the contract's type, a base class of the request's type, or a subclass of the answer's type. A
    parameter without annotation takes what the contract says. Names that cannot be resolved yet are checked when the
    handler is served.

    Raises:
        TypeError: the handler does not fit; the text names the parameter.
    """
    found = annotations_of(function)
    if found is None:
        return
    name, parameter, request, result, generator = found
    where = f"handler {name} does not fit {contract!r}"
    wanted, answer, streams = contract.types
    if contract.kind == "unary" and (generator or is_stream(result)):
        raise TypeError(f"{where}: it makes a stream, and a unary endpoint answers with one value; use trd.Stream")
    if contract.kind != "unary" and not generator and result not in UNTYPED and not is_stream(result):
        raise TypeError(f"{where}: its return value is {written(result)}, not a stream of items; use trd.Unary")
    taken = is_stream(request, REQUEST_STREAMS)
    if request not in UNTYPED and taken != streams:
        what = "takes a stream" if taken else "takes one request"
        raise TypeError(f"{where}: its parameter `{parameter}` {what}; a {contract.kind} endpoint does not")
    if taken:
        request = element(request)
    if not _takes(request, wanted):
        raise TypeError(f"{where}: its parameter `{parameter}` is {written(request)}, not {written(wanted)}")
    item = item_hint(result)
    if not _takes(answer, item):
        raise TypeError(f"{where}: it answers with {written(item)}, not {written(answer)}")


def _takes(wide: Any, narrow: Any) -> bool:
    """Whether a place for values of the type `wide` takes values of the type `narrow`.

    Unions and other forms are not compared here: values are checked when they travel.
    """
    if wide in UNTYPED or narrow in UNTYPED or wide == narrow:
        return True
    wide_class, narrow_class = get_origin(wide) or wide, get_origin(narrow) or narrow
    if not inspect.isclass(wide_class) or not inspect.isclass(narrow_class) or wide_class is types.UnionType:
        return True
    try:
        if not issubclass(narrow_class, wide_class):
            return (wide_class is float and narrow_class is int) or narrow_class is types.UnionType
    except TypeError:  # A TypedDict, for example.
        return False
    inner, others = get_args(wide), get_args(narrow)
    return wide_class is not narrow_class or len(inner) != len(others) or all(map(_takes, inner, others))

"""Requests and responses against the types that a handler is annotated with.

msgspec does the work: builtins, collections, dataclasses, Structs, TypedDicts, NamedTuples, Literals, Unions. Classes
that it does not know are checked with isinstance (arrays, tensors) or by pydantic (its models). A hint that none of
them can use is not checked, and says so once in the log.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from triton_distributed.errors import DecodeError, InvalidRequest
from triton_distributed.wire.codec import Message, decode, encode, read_extension, unreadable
from triton_distributed.wire.leaves import from_text, is_made_from_text
from triton_distributed.wire.values import is_model

RequestDecoder = Callable[..., Any]
"""`(body, buffers=None) -> value`."""

_log = logging.getLogger("triton_distributed.wire")

_UNCHECKED: tuple[Any, ...] = (None, Any, object, inspect.Parameter.empty)
_NATIVE = (bytes, bytearray, memoryview)  # as in msgpack; else msgspec would take text for bytes in base64
_ARRIVES_FROM = ("numpy", "torch", "array", "mmap")  # modules of classes that arrive as themselves

_PLACE = re.compile(r"(?P<text>.*) - at `(?P<key>key` in `)?\$\[0\](?P<path>.*)`\Z", re.DOTALL)


class _Uncheckable(Exception):
    """A hint names a class that nothing here can make or check."""


class _Misfit(Exception):
    """A value does not fit; the text says where and why."""


def typed_decoder(hint: Any, what: str = "request") -> RequestDecoder:
    """Return a decoder that also checks a request against a handler's annotation.

    Args:
        hint: the resolved annotation; None, Any and `inspect.Parameter.empty` check nothing.
        what: the name of the value in an error's text.

    The decoder raises `DecodeError` for bytes that cannot be read and `InvalidRequest`, naming the field, for a value
    that does not fit.
    """
    fit = _fitter(hint, what)
    if fit is None:
        return decode
    fast: Callable[[Any], Any] | None
    try:
        fast = msgspec.msgpack.Decoder(hint, dec_hook=_accept, ext_hook=read_extension).decode
    except TypeError:
        fast = None

    def decode_typed(body: Any, buffers: Sequence[Any] | None = None) -> Any:
        if fast is not None and not buffers:
            try:
                return fast(body)
            except (msgspec.ValidationError, _Uncheckable):
                pass  # it may only seem not to fit, as a bytearray does where bytes are wanted: look at the value
            except Exception as error:
                raise unreadable(error) from error
        try:
            return fit(decode(body, buffers))
        except _Misfit as misfit:
            raise InvalidRequest("", str(misfit)) from misfit.__cause__

    return decode_typed


def typed_checker(hint: Any, what: str = "response") -> Callable[[Any], Any] | None:
    """Return a function that checks what a handler yields or returns, or None where there is nothing to check.

    Args:
        hint: the resolved annotation of one item.
        what: the name of the value in an error's text.

    The function returns the very value that it is given, or raises `TypeError` naming the field. A value fits if it is
    an instance of the hint's class, or if what arrives at the caller fits.
    """
    fit = _fitter(hint, what)
    if fit is None:
        return None
    simple: tuple[type, ...] = ()
    if hint is float:
        simple = (float, int)
    elif isinstance(hint, type) and not typing.get_args(hint) and not typing.is_typeddict(hint):
        simple = (hint,)

    def check(value: Any) -> Any:
        if simple and isinstance(value, simple):
            return value
        try:
            fit(value)
        except _Misfit:
            try:
                fit(_as_it_arrives(value, what))
            except _Misfit as misfit:
                raise TypeError(str(misfit)) from misfit.__cause__
        return value

    return check


def _as_it_arrives(value: Any, what: str) -> Any:
    message = encode(value, what)
    if isinstance(message, Message):
        return decode(message.body, [bytearray(buffer) for buffer in message.buffers])
    return decode(message)


def _fitter(hint: Any, what: str) -> Callable[[Any], Any] | None:
    """Return `value -> value of the hint's type`, raising `_Misfit`; None where nothing can be checked."""
    if any(hint is each for each in _UNCHECKED) or isinstance(hint, typing.TypeVar):
        return None
    convert = _converter(hint)
    if convert is None:
        _warn(hint)
        return None

    checking = True

    def fit(value: Any) -> Any:
        nonlocal checking
        if not checking:
            return value
        try:
            return convert(value)
        except _Uncheckable:
            checking = False
            _warn(hint)
            return value
        except DecodeError:
            raise
        except (ValueError, TypeError) as error:  # msgspec's and pydantic's ValidationError are ValueErrors
            raise _Misfit(_in_words(error, what)) from error
        except RecursionError as error:
            raise _Misfit(f"{what}: it nests too deeply") from error

    return fit


def _converter(hint: Any) -> Callable[[Any], Any] | None:
    try:
        found = msgspec.inspect.type_info(hint)
        msgspec.msgpack.Decoder(hint)
    except (TypeError, NameError):  # not one of msgspec's, or a name in it cannot be resolved
        return _pydantic_converter(hint)
    if isinstance(found, msgspec.inspect.CustomType) and not _can_arrive(found.cls):
        return None
    # msgspec keeps what it found out about a Struct's fields, and would find it out anew for a bare hint at each call.
    holder: Any = msgspec.defstruct("Holder", [("value", hint)], array_like=True)
    return lambda value: msgspec.convert((value,), holder, builtin_types=_NATIVE, dec_hook=_accept).value


def _pydantic_converter(hint: Any) -> Callable[[Any], Any] | None:
    """Use pydantic where a hint mixes its models with other types, which msgspec refuses."""
    pydantic = sys.modules.get("pydantic")
    if pydantic is None or not any(is_model(each) for each in typing.get_args(hint)):
        return None
    try:
        validate: Callable[[Any], Any] = pydantic.TypeAdapter(hint).validate_python
    except Exception:  # pydantic has an error class for each thing that it cannot use
        return None
    return validate


def _can_arrive(kind: type) -> bool:
    return (
        is_model(kind)
        or kind.__module__.partition(".")[0] in _ARRIVES_FROM
        or kind in (complex, object)
        or is_made_from_text(kind)
    )


def _accept(kind: Any, value: Any) -> Any:
    """Make `value` into `kind`, a class that msgspec does not know; msgspec checks what is returned with isinstance."""
    kind = typing.get_origin(kind) or kind
    if is_model(kind):
        try:
            return kind.model_validate(value)
        except ValueError as error:
            raise ValueError(_pydantic_words(error)) from error
    if isinstance(value, kind):
        return value
    if is_made_from_text(kind) and isinstance(value, str):
        return from_text(kind, value)
    if not _can_arrive(kind):
        raise _Uncheckable(kind)
    np = sys.modules.get("numpy")
    if np is not None and issubclass(kind, np.generic) and isinstance(value, (int, float, str, bytes)):
        return kind(value)  # NumPy's numbers travel as Python's
    return value


def _in_words(error: Exception, what: str) -> str:
    if hasattr(error, "errors"):
        return f"{what}: {_pydantic_words(error)}"
    text = str(error)
    if place := _PLACE.match(text):
        return f"{what}{place['path']}{' key' if place['key'] else ''}: {place['text']}"
    return f"{what}: {text}"


def _pydantic_words(error: Any) -> str:
    try:
        faults = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors()]
    except Exception:  # a plain ValueError of a user's validator
        return str(error)
    return "; ".join(f"{where}: {text}" if where else text for where, text in faults)


def _warn(hint: Any) -> None:
    _log.warning("values are not checked against %r: neither msgspec nor pydantic can use that type", hint)

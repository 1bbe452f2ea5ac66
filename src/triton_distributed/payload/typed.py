"""Checks of requests and responses against the types in a handler's annotations.

msgspec checks builtins, collections, dataclasses, Structs, TypedDicts, NamedTuples, Literals and Unions. Classes that
msgspec does not know are checked with isinstance (arrays, tensors), made from their text (paths, IP addresses), or are
pydantic models. msgspec refuses some hints: a union of models or of dataclasses, a dataclass with an InitVar, a type of
pydantic's. pydantic checks such a hint as a whole, if it is installed. If neither library can check a hint, the decoder
cannot be made, so a handler never gets a value that its annotation rules out.

A model that was sent as a model is checked in its read form and always fits its own class; see `payload.models`. A
plain dict is checked as the class declares. From a dict a strict field also accepts what pydantic's strict mode accepts
from JSON, because here too text and lists represent UUIDs, dates and tuples.

A union of classes without a tag follows pydantic's smart mode: the member with most fields set, then the first member.
"""

from __future__ import annotations

import functools
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from triton_distributed.errors import DecodeError, InvalidRequest
from triton_distributed.payload.annotations import can_arrive, checks_nothing, contents, is_typed_dict
from triton_distributed.payload.codec import Message, Own, decode, decode_models, encode, read_extension, unreadable
from triton_distributed.payload.fields import is_model
from triton_distributed.payload.leaf_types import from_text, is_made_from_text
from triton_distributed.payload.outofband import MODEL
from triton_distributed.payload.validation import adapted, model_of, must_be_complete

RequestDecoder = Callable[..., Any]
"""A function `(body, buffers=None) -> value`."""

_NATIVE = (bytes, bytearray, memoryview)  # types of msgpack; without this list msgspec would read text as base64

_PLACE = r"(?s)(?P<text>.*) - at `(?P<key>key` in `)?\$\[0\](?P<path>.*)`\Z"


class _HoldsModel(Exception):
    """A message holds a model that was sent as a model."""


class _Misfit(Exception):
    """A value does not fit a hint; the text says where and why."""


class _Converter(NamedTuple):
    """Makes values that fit a hint.

    Attributes:
        convert: (value, the models in it) → value of the hint's type; raises ValueError or TypeError.
        decoder: reads and checks a message without models in one step; None if pydantic checks the whole hint.
    """

    convert: Callable[[Any, Own], Any]
    decoder: Any


def typed_decoder(hint: Any, what: str = "request") -> RequestDecoder:
    """Return a decoder that also checks a request against a handler's annotation.

    Args:
        hint: the resolved annotation; None, Any and `inspect.Parameter.empty` check nothing.
        what: the name of the value in an error's text.

    The decoder raises `DecodeError` for malformed bytes, and `InvalidRequest` with the name of the field for a value
    that does not fit.

    Raises:
        TypeError: the hint cannot be checked, or no message can hold a value that fits it; the text says why.
    """
    if checks_nothing(hint):
        return decode
    convert, decoder = _converter(hint, arriving=True)
    fast = None if decoder is None else decoder.decode

    def decode_typed(body: Any, buffers: Sequence[Any] | None = None) -> Any:
        if fast is not None and not buffers:
            try:
                return fast(body)
            except (msgspec.ValidationError, _HoldsModel, OverflowError):
                pass  # the value may fit all the same, e.g. a bytearray for bytes: look at it
            except Exception as error:  # As in `codec.decode`.
                raise unreadable(error) from error
        value, models = decode_models(body, buffers)
        try:
            return _fitted(convert, value, models, what)
        except _Misfit as misfit:
            raise InvalidRequest("", str(misfit)) from misfit.__cause__

    return decode_typed


def typed_checker(hint: Any, what: str = "response") -> Callable[[Any], Any] | None:
    """Return a function that checks the values that a handler yields or returns; None if every value fits.

    Args:
        hint: the resolved annotation of one item.
        what: the name of the value in an error's text.

    The function returns its argument, or raises `TypeError` with the name of the field. A value fits if it is an
    instance of the hint's class, or if it fits in the form that arrives at the caller. A dict also fits a model if it
    has field names as keys, and may have computed fields.

    Raises:
        TypeError: the hint cannot be checked; the text says why.
    """
    if checks_nothing(hint):
        return None
    convert = _converter(hint, arriving=False).convert
    simple: tuple[type, ...] = ()
    if hint is float:
        simple = (float, int)
    elif isinstance(hint, type) and not typing.get_args(hint) and not is_typed_dict(hint):
        simple = (hint,)

    def check(value: Any) -> Any:
        if simple and isinstance(value, simple):
            return value
        try:
            _fitted(convert, value, {}, what)
        except _Misfit:
            try:
                _fitted(convert, *_as_it_arrives(value, what), what)
            except _Misfit as misfit:
                raise TypeError(str(misfit)) from misfit.__cause__
        return value

    return check


def _as_it_arrives(value: Any, what: str) -> tuple[Any, Own]:
    message = encode(value, what)
    if isinstance(message, Message):
        return decode_models(message.body, [bytearray(buffer) for buffer in message.buffers])
    return decode_models(message)


def _fitted(convert: Callable[[Any, Own], Any], value: Any, models: Own, what: str) -> Any:
    try:
        return convert(value, models)
    except DecodeError:
        raise
    except (msgspec.ValidationError, ValueError, TypeError, OverflowError) as error:
        raise _Misfit(_in_words(error, what)) from error
    except RecursionError as error:
        raise _Misfit(f"{what}: the value nests too deeply") from error


def _in_words(error: Exception, what: str) -> str:
    text = str(error)
    if place := re.match(_PLACE, text):
        return f"{what}{place['path']}{' key' if place['key'] else ''}: {place['text']}"
    return f"{what}: {text}"


# ---- which library checks a hint --------------------------------------------------------------------------------


def _converter(hint: Any, *, arriving: bool) -> _Converter:
    """Return the converter for a hint.

    Args:
        hint: a hint that not every value fits.
        arriving: whether values come from a message; then classes that no message can hold are refused.
    """
    found = contents(hint, arriving=arriving)
    for each in found.models:
        must_be_complete(each)
    reason = f"only pydantic can check {found.pydantic}"
    if found.pydantic is None:
        try:
            return _by_msgspec(hint, arriving)
        except (TypeError, NameError) as error:
            reason = str(error)
    if found.msgspec is not None:
        raise TypeError(f"{reason}, and only msgspec can check {found.msgspec}")
    try:
        return _Converter(adapted(hint, found, arriving), None)
    except ImportError:
        raise TypeError(f"{reason}; pydantic may be able to check it: pip install pydantic") from None
    except Exception as error:  # pydantic has many error classes for unusable hints
        text = "it is not a type" if isinstance(error, Warning) else str(error).partition("\n")[0]
        raise TypeError(text if found.pydantic or text in reason else f"{reason}; pydantic: {text}") from None


def _by_msgspec(hint: Any, arriving: bool) -> _Converter:
    kinds = list(_custom_types(msgspec.inspect.type_info(hint)))
    for kind in kinds:
        if arriving and not can_arrive(kind):
            raise TypeError(f"a message cannot hold a {kind.__module__}.{kind.__qualname__}")
    # msgspec caches its analysis of a Struct's fields, but would analyse a bare hint again in each call.
    holder: Any = msgspec.defstruct("Holder", [("value", hint)], array_like=True)

    def convert(value: Any, models: Own) -> Any:
        accept = functools.partial(_accept, models, arriving)
        return msgspec.convert((value,), holder, builtin_types=_NATIVE, dec_hook=accept).value

    decoder = msgspec.msgpack.Decoder(
        hint,
        dec_hook=functools.partial(_accept, {}, arriving),
        ext_hook=_read_no_model if any(map(is_model, kinds)) else read_extension,
    )
    return _Converter(convert, decoder)


def _custom_types(found: Any) -> Iterator[Any]:
    """Yield the classes that msgspec leaves to its hooks, given msgspec's description of a type."""
    seen: set[int] = set()
    left = [found]
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, msgspec.inspect.CustomType):
            yield typing.get_origin(each.cls) or each.cls
        elif isinstance(each, (tuple, list)):
            left.extend(each)
        elif isinstance(each, (msgspec.inspect.Type, msgspec.inspect.Field)):
            left.extend(getattr(each, name) for name in each.__struct_fields__ if name != "default")


def _read_no_model(code: int, header: memoryview) -> Any:
    if code == MODEL:
        raise _HoldsModel
    return read_extension(code, header)


def _accept(models: Own, arriving: bool, kind: Any, value: Any) -> Any:
    """Turn `value` into `kind`, a class that msgspec does not know. msgspec checks the result with isinstance."""
    kind = typing.get_origin(kind) or kind
    if isinstance(value, kind):
        return value
    if is_model(kind):
        return model_of(kind, value, models, arriving)
    if is_made_from_text(kind) and isinstance(value, str):
        return from_text(kind, value)
    np = sys.modules.get("numpy")
    if np is not None and issubclass(kind, np.generic) and isinstance(value, (int, float, str, bytes)):
        return kind(value)  # NumPy's numbers travel as Python's
    return value

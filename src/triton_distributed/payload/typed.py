"""Requests and responses against the types that a handler is annotated with.

msgspec does the work: builtins, collections, dataclasses, Structs, TypedDicts, NamedTuples, Literals, Unions. Classes
that it does not know are checked with isinstance (arrays, tensors), are made from their text (paths, IP addresses), or
are pydantic's models. A hint that msgspec refuses (a union of models or of dataclasses, a dataclass with an InitVar, a
type of pydantic's) is checked by pydantic as a whole, if that is installed. A hint that neither can check is refused
where the decoder is made, so that a handler never gets what its annotation rules out.

A model that was sent as a model is checked against what its class reads, and always fits its own class; see
`payload.models`. A plain dict is checked as the class declares. A strict field also takes from a dict what pydantic's
strict mode takes from JSON, since text and lists stand for UUIDs, dates and tuples here too.

A union of classes without a tag goes by pydantic's smart mode: the member of which most fields are set, then the first.
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
"""`(body, buffers=None) -> value`."""

_NATIVE = (bytes, bytearray, memoryview)  # as in msgpack; else msgspec would take text for bytes in base64

_PLACE = re.compile(r"(?P<text>.*) - at `(?P<key>key` in `)?\$\[0\](?P<path>.*)`\Z", re.DOTALL)


class _HoldsModel(Exception):
    """A message holds a model that was sent as one."""


class _Misfit(Exception):
    """A value does not fit; the text says where and why."""


class _Converter(NamedTuple):
    """Makes values of a hint.

    Attributes:
        convert: (value, the models in it) → value of the hint's type; raises ValueError or TypeError.
        decoder: reads and checks at once a message that holds no models, or None where pydantic checks the whole.
    """

    convert: Callable[[Any, Own], Any]
    decoder: Any


def typed_decoder(hint: Any, what: str = "request") -> RequestDecoder:
    """Return a decoder that also checks a request against a handler's annotation.

    Args:
        hint: the resolved annotation; None, Any and `inspect.Parameter.empty` check nothing.
        what: the name of the value in an error's text.

    The decoder raises `DecodeError` for bytes that cannot be read and `InvalidRequest`, naming the field, for a value
    that does not fit.

    Raises:
        TypeError: the hint cannot be checked, or no value that arrives can fit it; the text says why.
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
                pass  # it may only seem not to fit, as a bytearray does where bytes are wanted: look at the value
            except Exception as error:
                raise unreadable(error) from error
        value, models = decode_models(body, buffers)
        try:
            return _fitted(convert, value, models, what)
        except _Misfit as misfit:
            raise InvalidRequest("", str(misfit)) from misfit.__cause__

    return decode_typed


def typed_checker(hint: Any, what: str = "response") -> Callable[[Any], Any] | None:
    """Return a function that checks what a handler yields or returns, or None where there is nothing to check.

    Args:
        hint: the resolved annotation of one item.
        what: the name of the value in an error's text.

    The function returns the very value that it is given, or raises `TypeError` naming the field. A value fits if it is
    an instance of the hint's class, or if what arrives at the caller fits. A dict fits a model by the names of its
    fields too, and with computed fields.

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
        raise _Misfit(f"{what}: it nests too deeply") from error


def _in_words(error: Exception, what: str) -> str:
    text = str(error)
    if place := _PLACE.match(text):
        return f"{what}{place['path']}{' key' if place['key'] else ''}: {place['text']}"
    return f"{what}: {text}"


# ---- who can check a hint ---------------------------------------------------------------------------------------


def _converter(hint: Any, *, arriving: bool) -> _Converter:
    """Return what makes values of a hint.

    Args:
        hint: checks something.
        arriving: values come from a message, so classes that none holds are refused.
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
    except Exception as error:  # pydantic has an error class for each thing that it cannot use
        text = "it is no type" if isinstance(error, Warning) else str(error).partition("\n")[0]
        raise TypeError(text if found.pydantic or text in reason else f"{reason}; pydantic: {text}") from None


def _by_msgspec(hint: Any, arriving: bool) -> _Converter:
    kinds = list(_custom_types(msgspec.inspect.type_info(hint)))
    for kind in kinds:
        if arriving and not can_arrive(kind):
            raise TypeError(f"no message holds a {kind.__module__}.{kind.__qualname__}")
    # msgspec keeps what it found out about a Struct's fields, and would find it out anew for a bare hint at each call.
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
    """Yield the classes that msgspec leaves to us, in a type as msgspec describes it."""
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
    """Make `value` into `kind`, a class that msgspec does not know; msgspec checks what is returned with isinstance."""
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

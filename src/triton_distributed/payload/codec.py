"""Values to bytes and back: msgpack through msgspec, with large memory next to the body.

`encode` returns plain bytes for nearly every value. A value that holds much memory becomes a `Message`: a body, and
buffers that travel next to it. The buffers are views of the value's own memory and must not change until they are sent.

A value arrives as it was sent, with these differences, unless the handler's types say otherwise:

- A tuple, set, frozenset or deque arrives as a list.
- A dataclass, Struct or model arrives as a dict of all its fields, an enum as its value.
- A UUID, Decimal, date, time, timedelta or naive datetime arrives as text. So does a path, an IP address or network, a
  pydantic URL, a Fraction, a ZoneInfo or a pattern. A pydantic secret arrives as the value that it hides.
- A datetime with a time zone arrives in UTC, a NumPy number as Python's own.
- An array or tensor of a dtype that the receiver does not know arrives as a NumPy array of its bits, of dtype `V1`,
  `V2` and so on by the size of an element. So does a tensor if torch is not imported, unless NumPy or ml_dtypes has
  the dtype.

The keys of a dict may be anything that msgpack can write and Python can hash: text, numbers, bytes, None, and tuples
of those.
"""

from __future__ import annotations

import collections
import copy
import mmap
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from gc import is_tracked
from operator import is_
from typing import Any, Final

import msgspec
from msgspec.msgpack import Decoder, Encoder
from msgspec.structs import astuple, force_setattr

from triton_distributed.compiled import caused
from triton_distributed.errors import DecodeError
from triton_distributed.payload.buffers import bytearray_to_wire, bytes_to_wire, memoryview_to_wire
from triton_distributed.payload.fields import all_fields, field_names, has_skipped_field, skip_check
from triton_distributed.payload.outofband import MODEL, OUT_OF_BAND, Arrived, copy_of
from triton_distributed.payload.unsendable import explain
from triton_distributed.payload.values import from_wire, model_from_wire, to_wire

Buffers = list[memoryview]
"""The buffers of a message: each is C-contiguous, one-dimensional, of format `B`."""

_MAPS: Final = bytes([*range(0x80, 0x90), 0xDE, 0xDF])  # the first bytes of msgpack's maps
_BYTES_LIKE: Final = frozenset({bytes, bytearray, memoryview})
_LEAVES: Final = frozenset({type(None), bool, int, float, str})


class Message:
    """An encoded value with parts that travel out of band.

    Attributes:
        body: the msgpack bytes.
        buffers: the memory that the body refers to by index, each at least `OUT_OF_BAND` bytes.
    """

    __slots__ = ("body", "buffers")

    def __init__(self, body: bytes, buffers: Buffers) -> None:
        self.body = body
        self.buffers = buffers

    @property
    def nbytes(self) -> int:
        """The size in bytes, body and buffers together."""
        return len(self.body) + sum(buffer.nbytes for buffer in self.buffers)

    def owned(self, lasting: Callable[[memoryview], object] = lambda view: None) -> Message:
        """Return the same message with its own memory, safe from changes by the sender.

        Args:
            lasting: whether memory cannot change, so that it needs no copy; `bytes` never get one.
        """
        buffers = [each if type(each.obj) is bytes or lasting(each) else copy_of(each) for each in self.buffers]
        return Message(self.body, buffers)

    def __repr__(self) -> str:
        return f"<Message of {len(self.body)} bytes and {len(self.buffers)} buffer(s), {self.nbytes} bytes in all>"


def _no_buffers(value: Any) -> Any:
    return to_wire(value, None)


_encode: Final = Encoder(enc_hook=_no_buffers).encode
_expected = 0  # how many of the next encodes search for memory first; a hint that may be wrong


def encode(value: object, what: str = "value") -> bytes | Message:
    """Turn a value into bytes.

    Args:
        value: what to send.
        what: the name of the value in an error's text, e.g. `request`.

    Raises:
        TypeError: a part of the value cannot travel; the text names the path to that part.
        ValueError: an int beyond 64 bits, text with a lone surrogate, or a value that contains itself.
    """
    kind = value.__class__
    if _expected or kind in _BYTES_LIKE:
        return _encode_with_buffers(value, what)
    try:
        body = _encode(value)
    except Exception:  # The second attempt finds out why.
        return _encode_with_buffers(value, what)
    # Encoded bytes-likes begin with one of these three bytes, those of at least 256 bytes with the latter two; a body
    # without them is complete. After an accidental hit (one float in ten, one number above 127 in forty) the value is
    # searched: 0.2 µs for a small dict, 6 µs for 512 numbers.
    if 196 in body or (len(body) > 256 and (197 in body or 198 in body)):
        return _encode_found(value, body, what)
    # Only values that the garbage collector tracks can contain an object with fields; text, numbers and dicts of these
    # are not tracked. The check costs 30 ns, the search of a tracked value 150 ns per container. A list holds no object
    # if its encoded bytes contain no first byte of a map.
    if is_tracked(value) and not (kind is list and len(body.translate(None, _MAPS)) == len(body)):
        try:
            complete = not has_skipped_field(value)
        except Exception:  # the value nests too deeply, or a property raises
            complete = False
        if not complete:
            return _encode_found(value, body, what)
    return body


def _encode_found(value: object, body: bytes, what: str) -> bytes | Message:
    global _expected  # only a hint: threads may overwrite it
    buffers: Buffers = []
    try:
        changed = _replaced(value, buffers)
        if changed is value:
            return body
        body = _encoder(buffers).encode(changed)
    except Exception as error:  # Properties and hooks of the user's classes may raise anything.
        raise caused(explain(value, error, what, encode_part), error)
    if not buffers:
        return body
    # msgspec copied all that memory before this search found it. Similar values follow, so search first for a while.
    _expected = 16
    return Message(body, buffers)


def _encode_with_buffers(value: object, what: str) -> bytes | Message:
    global _expected
    buffers: Buffers = []
    try:
        body = _encoder(buffers).encode(_replaced(value, buffers))
    except Exception as error:  # Properties and hooks of the user's classes may raise anything.
        raise caused(explain(value, error, what, encode_part), error)
    if _expected:
        _expected = 16 if buffers else max(0, _expected - 1)
    return Message(body, buffers) if buffers else body


def _encoder(buffers: Buffers) -> Encoder:
    return Encoder(enc_hook=lambda each: to_wire(each, buffers))


def encode_part(value: object) -> bytes | Message:
    """Encode a part of another value. Raises the encoder's own errors, without a search for their cause."""
    buffers: Buffers = []
    body = _encoder(buffers).encode(_replaced(value, buffers))
    return Message(body, buffers) if buffers else body


def _replaced(value: Any, buffers: Buffers) -> Any:
    """Return the value with extensions in place of its memory, or the same object if it holds no memory.

    msgspec writes all bytes-likes alike and inline, without calling a hook. This function keeps their types and sends
    large ones out of band.
    """
    kind: Any = type(value)
    return value if kind in _LEAVES else _replacer(kind)(value, buffers)


@lru_cache(maxsize=1024)  # more than the types of one program's messages; a hit costs 60 ns, a miss 600
def _replacer(kind: Any) -> Callable[[Any, Buffers], Any]:
    if (exact := _EXACT.get(kind)) is not None:
        return exact
    if issubclass(kind, dict):
        return _replaced_dict
    if issubclass(kind, (list, tuple, set, frozenset, collections.deque)):
        return _replaced_list
    if issubclass(kind, msgspec.Struct):
        return partial(_replaced_struct, kind.__struct_fields__)
    if names := field_names(kind):
        replace = partial(_replaced_object, names, object.__setattr__)
        skips_field = skip_check(kind)
        return replace if skips_field is None else partial(_replaced_fields, skips_field, replace)
    return _left  # msgspec passes values that it does not know to `to_wire`


def _left(value: Any, buffers: Buffers) -> Any:
    return value


def _replaced_bytes(value: bytes, buffers: Buffers) -> Any:
    return value if len(value) < OUT_OF_BAND else bytes_to_wire(value, buffers)


def _replaced_dict(value: dict[Any, Any], buffers: Buffers) -> Any:
    changed: dict[Any, Any] | None = None
    for key, child in dict.items(value):  # like msgspec, ignores a subclass's own items()
        if type(child) in _LEAVES:
            continue
        new = _replaced(child, buffers)
        if new is not child:
            if changed is None:
                changed = dict(value)
            changed[key] = new
    return value if changed is None else changed


def _replaced_list(value: Any, buffers: Buffers) -> Any:
    if _LEAVES.issuperset(map(type, value)):
        return value
    before = list(value)
    after = [_replaced(child, buffers) for child in before]
    return value if all(map(is_, before, after)) else after


def _replaced_object(names: tuple[str, ...], assign: Any, value: Any, buffers: Buffers) -> Any:
    changed = None
    for name in names:
        child = getattr(value, name, None)
        if type(child) in _LEAVES:
            continue
        new = _replaced(child, buffers)
        if new is not child:
            if changed is None:
                changed = copy.copy(value)
            assign(changed, name, new)
    return value if changed is None else changed


def _replaced_struct(names: tuple[str, ...], value: Any, buffers: Buffers) -> Any:
    try:
        children = astuple(value)
    except AttributeError:  # A field is not set.
        return _replaced_object(names, force_setattr, value, buffers)
    changed = None
    for at, replace in _replacers(tuple(map(type, children))):
        child = children[at]
        new = replace(child, buffers)
        if new is not child:
            if changed is None:
                changed = copy.copy(value)
            force_setattr(changed, names[at], new)
    return value if changed is None else changed


@lru_cache(maxsize=1024)
def _replacers(kinds: tuple[Any, ...]) -> tuple[tuple[int, Callable[[Any, Buffers], Any]], ...]:
    """The places of the values that may hold memory, by the types of the values: most fields of a Struct hold none."""
    return tuple((at, _replacer(kind)) for at, kind in enumerate(kinds) if kind not in _LEAVES)


def _replaced_fields(skips_field: Callable[[Any], bool], replace: Any, value: Any, buffers: Buffers) -> Any:
    return _replaced_dict(all_fields(value), buffers) if skips_field(value) else replace(value, buffers)


_EXACT: dict[type, Callable[[Any, Buffers], Any]] = {
    bytes: _replaced_bytes,
    bytearray: bytearray_to_wire,
    memoryview: memoryview_to_wire,
}


def read_extension(code: int, header: memoryview) -> Any:
    """Read one extension of a message without buffers; msgspec's `ext_hook`."""
    return from_wire(code, header, Arrived(None))


_decode: Final = Decoder(ext_hook=read_extension).decode


def decode(
    body: bytes | bytearray | memoryview, buffers: Sequence[bytearray | memoryview | mmap.mmap] | None = None
) -> Any:
    """Turn bytes into the value.

    Args:
        body: the bytes that `encode` returned, or the `body` of its message.
        buffers: the `buffers` of the message. The caller gives this memory away: arrays use it afterwards.

    Raises:
        DecodeError: `encode` cannot have written these bytes.
    """
    try:
        if not buffers:
            return _decode(body)
        arrived = Arrived(buffers)
        return msgspec.msgpack.decode(body, ext_hook=lambda code, header: from_wire(code, header, arrived))
    except Exception as error:  # Libraries that restore extensions raise errors of many types.
        raise caused(unreadable(error), error)


Own = dict[int, tuple[Any, Callable[[], Any]]]
"""The models in a message: id of the plain value → that value, and a function that returns the model's read form."""


def decode_models(
    body: bytes | bytearray | memoryview, buffers: Sequence[bytearray | memoryview | mmap.mmap] | None = None
) -> tuple[Any, Own]:
    """Turn bytes into the value, as `decode` does, and return which of its parts were sent as pydantic models.

    The body must not change until the last of the functions was called.
    """
    own: Own = {}
    arrived = Arrived(buffers)

    def read(code: int, header: memoryview) -> Any:
        value = from_wire(code, header, arrived)
        if code == MODEL and isinstance(value, (dict, list)):
            own[id(value)] = value, partial(model_from_wire, header, Arrived(buffers))
        return value

    try:
        return msgspec.msgpack.decode(body, ext_hook=read), own
    except Exception as error:  # As in `decode`.
        raise caused(unreadable(error), error)


def unreadable(error: Exception) -> DecodeError:
    """Return the `DecodeError` for any error that arose while bytes were read."""
    if isinstance(error, DecodeError):
        return error
    if isinstance(error, RecursionError):
        return DecodeError("it nests too deeply")
    return DecodeError(str(error))

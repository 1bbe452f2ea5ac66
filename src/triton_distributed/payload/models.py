"""pydantic models on the wire.

A model has two forms. The *written* form has aliases as keys, and computed fields. The *read* form has field names as
keys, no computed fields, and the Python types of the values. A receiver without the class, such as a caller or a
handler without types, gets the written form as plain values. For a handler that is annotated with the class, the model
is made again from the read form.

In most models the two forms are equal, and these travel as a plain map. All other models travel as one msgpack
extension, `MODEL`. It holds every value once, and both forms at the places where they differ.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import sys
import uuid
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import msgspec
from msgspec.msgpack import Ext

from triton_distributed.errors import DecodeError
from triton_distributed.payload.fields import all_fields, skip_check
from triton_distributed.payload.leaf_types import from_named_text, is_textual, named, to_text
from triton_distributed.payload.outofband import MODEL

Pack = Callable[[Any], bytes]
"""A function that encodes a part of a message."""

ReadExtension = Callable[[int, memoryview], Any]
"""A function that reads an extension of a message."""

# The content of an extension is a list of an operation and its operands.
_ROOT = 0  # tree: a whole model
_TABLE = 1  # read keys, written keys or nil if they are the same, values: a map
_BOTH = 2  # read form, written form: a value with two forms
_TEXT = 3  # module, name, text: a value of a library
_DATETIME = 4  # text: a datetime with its own offset
_SCALAR = 5  # packed 0-d array, number: a NumPy scalar
_ENUM = 15  # module, name, value: a member of an enum
_TYPES: dict[type, int] = {  # types that msgpack writes as another type, which is the operand
    tuple: 6,
    set: 7,
    frozenset: 8,
    collections.deque: 9,
    uuid.UUID: 10,
    decimal.Decimal: 11,
    datetime.date: 12,
    datetime.time: 13,
    datetime.timedelta: 14,
}
_CONTAINERS = (tuple, set, frozenset, collections.deque)
_RESTORE: dict[int, Callable[[Any], Any]] = {
    code: kind if kind in _CONTAINERS else partial(msgspec.convert, type=kind) for kind, code in _TYPES.items()
}
_LEAVES = frozenset({type(None), bool, int, float, str})
_COMPARABLE = _LEAVES | {bytes, datetime.datetime} | _TYPES.keys()  # types whose equal values arrive equal


# ---- the sending side -------------------------------------------------------------------------------------------


def model_to_wire(model: Any, pack: Pack, memory_to_wire: Callable[[Any], Any]) -> Any:
    """Return the extension that holds both forms of a model.

    Args:
        model: a pydantic model; for a class that `has_one_form`, the written form suffices.
        pack: encodes a part of this message.
        memory_to_wire: turns a bytes, bytearray or memoryview into a value that keeps its type.

    Raises:
        TypeError: a part of the model cannot travel, or its own serializer refuses it.
    """
    written = model.model_dump(by_alias=True)
    read = model.model_dump(by_alias=False, round_trip=True, warnings=False)
    writer = _Writer(pack, memory_to_wire)
    tree = writer.both(read, written)
    return tree if type(tree) is Ext and tree.code == MODEL else writer.extension(_ROOT, tree)


class _Writer:
    """Writes the two forms of one model as one tree."""

    __slots__ = ("_memory_to_wire", "_pack")

    def __init__(self, pack: Pack, memory_to_wire: Callable[[Any], Any]) -> None:
        self._pack = pack
        self._memory_to_wire = memory_to_wire

    def extension(self, *parts: Any) -> Ext:
        return Ext(MODEL, self._pack(parts))

    def both(self, read: Any, written: Any) -> Any:
        kind = type(read)
        if kind is not type(written):
            return self.extension(_BOTH, self.both(read, read), self.both(written, written))
        if kind is dict:
            return self._table(read, written)
        if kind is list and len(read) == len(written):
            if _LEAVES.issuperset(map(type, read)) and read == written:
                return read
            return list(map(self.both, read, written))
        if kind in (tuple, collections.deque) and len(read) == len(written):
            return self.extension(_TYPES[kind], list(map(self.both, read, written)))
        if read is not written and not (kind in _COMPARABLE and read == written):
            return self.extension(_BOTH, self.both(read, read), self.both(written, written))
        return self._one(kind, read)

    def _table(self, read: dict[Any, Any], written: dict[Any, Any]) -> Any:
        names, others = list(read), list(written)
        if names == others:
            if _LEAVES.issuperset(map(type, names)):
                return {key: self.both(value, written[key]) for key, value in read.items()}
            keys = [self.both(key, key) for key in names]
            return self.extension(_TABLE, keys, None, list(map(self.both, read.values(), written.values())))
        if len(names) > len(others):
            return self.extension(_BOTH, self.both(read, read), self.both(written, written))
        # Both forms have the fields in the same order, with computed fields last. If a user's serializer changes the
        # order, each pair becomes two different values, which costs bytes but gives the same result.
        values = list(map(self.both, read.values(), written.values()))
        values += [self.both(value, value) for value in list(written.values())[len(names) :]]
        return self.extension(
            _TABLE, [self.both(key, key) for key in names], [self.both(key, key) for key in others], values
        )

    def _one(self, kind: type, value: Any) -> Any:
        if kind in _LEAVES:
            return value
        if kind in (bytes, bytearray, memoryview):
            return self._memory_to_wire(value)
        if kind in (set, frozenset):
            return self.extension(_TYPES[kind], [self.both(each, each) for each in value])
        if kind in _TYPES:
            return self.extension(_TYPES[kind], value)
        if kind is datetime.datetime:
            return self.extension(_DATETIME, value.isoformat())
        if isinstance(value, enum.Enum):
            return self.extension(_ENUM, kind.__module__, kind.__qualname__, self.both(value.value, value.value))
        if is_textual(kind):
            text = to_text(value)
            return self.extension(_TEXT, *named(value), self.both(text, text))
        np = sys.modules.get("numpy")
        if np is not None and isinstance(value, np.generic):
            return self.extension(_SCALAR, self._pack(np.asarray(value)), value)
        skips_field = skip_check(kind)
        if skips_field is not None and skips_field(value):
            return {name: self.both(each, each) for name, each in all_fields(value).items()}
        return value


# Names of types in pydantic's schemas. Values of `_PLAIN` types are written as msgpack's own types. Values of
# `_MADE_AGAIN` types are written as text, lists or values of enums; a field makes them again unless it is strict or a
# union.
_UNIONS = frozenset({"union", "tagged-union"})
_PLAIN = _UNIONS | {
    *("str", "int", "float", "bool", "none", "literal", "list", "dict", "nullable", "default"),
    *("model", "model-fields", "model-field", "definitions", "definition-ref"),
    *("function-before", "function-after", "function-wrap"),
}
_MADE_AGAIN = {"uuid", "decimal", "date", "datetime", "time", "timedelta", "enum", "tuple", "set", "frozenset"}
_BESIDE = frozenset({"metadata", "default", "default_factory", "config", "cls", "function"})  # keys without schemas
_NAMED = frozenset({"fields", "choices"})  # keys that hold schemas under names of the user's


@lru_cache(maxsize=1024)  # more than the models of one program's messages
def has_one_form(kind: Any) -> bool:
    """Return whether each valid model of this class can be made again from its written form, in msgpack's own types.

    False is always safe, but costs time.
    """
    schema: Any = kind.__pydantic_core_schema__
    if type(schema) is not dict:  # the class is not complete yet
        return False
    traits = set(_traits(schema))
    return traits <= _PLAIN | {"strict"} or (traits <= _PLAIN | _MADE_AGAIN and not traits & _UNIONS)


def _traits(schema: Any) -> Iterator[str]:
    """Yield the types in a schema, and a word of our own for each trait that gives a value two forms."""
    if isinstance(schema, (list, tuple)):
        for each in schema:
            yield from _traits(each)
    if not isinstance(schema, dict):
        return
    kind = schema.get("type")
    config = schema.get("config") or {}
    if kind == "literal" or kind == "enum":
        values = [getattr(each, "value", each) for each in schema.get("expected") or schema.get("members") or ()]
        yield kind if _LEAVES.issuperset(map(type, values)) else "odd values"
    elif kind is not None:
        yield str(kind)
    if (
        schema.get("validation_alias") != schema.get("serialization_alias")
        or schema.get("computed_fields")
        or "serialization" in schema
        or "allow" in (schema.get("extra_behavior"), config.get("extra_fields_behavior"))
        or config.get("validate_by_alias") is False
    ):
        yield "two forms"
    if schema.get("strict") or config.get("strict"):
        yield "strict"
    for key, each in schema.items():
        if key in _NAMED and isinstance(each, dict):
            yield from _traits([*each.values()])
        elif key not in _BESIDE:
            yield from _traits(each)


# ---- the receiving side -----------------------------------------------------------------------------------------


def written_form(content: memoryview, hook: ReadExtension) -> Any:
    """Return the written form of a model, in plain values.

    Args:
        content: the content of a `MODEL` extension.
        hook: reads the extensions inside it; it must call this function for those of the kind `MODEL`.

    Raises:
        DecodeError: the content is malformed.
    """
    operation, *operands = msgspec.msgpack.decode(content, ext_hook=hook)
    if operation == _TABLE:
        as_read, as_written, values = operands
        if as_written is None:
            as_written = map(_hashable, as_read)
        return dict(zip(as_written, values, strict=True))
    if operation == _DATETIME:
        (text,) = operands
        moment = datetime.datetime.fromisoformat(text)
        return text if moment.tzinfo is None else moment.astimezone(datetime.UTC)  # like msgpack
    if operation in _OPERANDS and len(operands) == _OPERANDS[operation]:
        return operands[-1]
    raise DecodeError(f"a model with invalid operation {operation!r} of {len(operands)} operands")


def read_form(content: memoryview, hook: ReadExtension) -> Any:
    """Return the read form of a model: by field name, in Python's types. Arguments and errors as in `written_form`."""
    operation, *operands = msgspec.msgpack.decode(content, ext_hook=hook)
    if operation == _TABLE:
        as_read, as_written, values = operands
        if len(values) != len(as_read if as_written is None else as_written) or len(values) < len(as_read):
            raise DecodeError("a model whose names do not match its values")
        return dict(zip(as_read, values, strict=False))  # omits computed fields, which come last
    if operation == _BOTH:
        as_read, _ = operands
        return as_read
    if operation == _TEXT:
        return from_named_text(*operands)
    if operation == _ENUM:
        return _member(*operands)
    if operation == _DATETIME:
        (text,) = operands
        return datetime.datetime.fromisoformat(text)
    if operation == _SCALAR:
        packed, _ = operands
        return msgspec.msgpack.decode(packed, ext_hook=hook)[()]
    (operand,) = operands
    return operand if operation == _ROOT else _RESTORE[operation](operand)


_OPERANDS = {_ROOT: 1, _BOTH: 2, _TEXT: 3, _SCALAR: 2, _ENUM: 3} | dict.fromkeys(_RESTORE, 1)


def _hashable(key: Any) -> Any:
    return tuple(map(_hashable, key)) if isinstance(key, list) else key


def _member(module: str, name: str, value: Any) -> Any:
    """Return the member of an enum if this process knows the enum already, else the value.

    Imports nothing and calls no `__getattr__`. Without the member, a field of type `Colour | str` would get text.
    """
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        if not isinstance(found, (ModuleType, type)):
            return value
        found = vars(found).get(part)
    if not isinstance(found, enum.EnumMeta):
        return value
    try:
        return found(value)
    except ValueError:  # the enum is another version of the sender's
        return value

"""The args and attributes of an exception as values that travel. Values that an answer cannot hold travel as text."""

from __future__ import annotations

import builtins
import reprlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import MemberDescriptorType
from typing import Any

import msgspec

from triton_distributed.errors import REMOTE
from triton_distributed.payload.codec import Message, decode, encode_part
from triton_distributed.payload.fields import field_names, is_model

MAX_STATE = 16 * 1024  # encoded bytes of args and attributes together; more would be data, not an error
MAX_ARGS = 64  # args of an error that travel
MAX_TEXT = 1024  # characters of a text that replaces a value
MAX_REPAIRED = 4 * 1024  # bytes of a value whose unsendable parts are replaced one by one
MAX_LEVELS = 8  # nested containers whose sendable parts are kept
MAX_NAMED = 8  # omitted attributes that the note names
MAX_OBJECT = 4 * 1024  # bytes or characters of a UnicodeError's object

BUILT_IN = frozenset(each for each in vars(builtins).values() if isinstance(each, type))

_KEPT_APART: dict[type[BaseException], tuple[str, ...]] = {
    ImportError: ("name", "path"),
    AttributeError: ("name",),
    NameError: ("name",),
}
"""Attributes that some built-in types keep outside `args` and `__dict__`."""


# ---- the sending side -------------------------------------------------------------------------------------------


def held_by(error: BaseException) -> tuple[list[msgspec.Raw], dict[str, msgspec.Raw], list[str]]:
    """Return the encoded args and attributes of an error, and notes on omitted ones.

    Never raises, even if methods of the error or of the values raise.
    """
    left = MAX_STATE
    words: list[str] = []
    arguments: list[msgspec.Raw] = []
    state: dict[str, msgspec.Raw] = {}
    try:
        for value in _arguments(error, words):
            packed = _packed(value, left) or _SHORT
            left -= len(packed)
            arguments.append(msgspec.Raw(packed))
        unsent = []
        for name, value in _attributes(error):
            data = _packed(value, left - len(name.encode()))
            if data is None:
                unsent.append(name)
            else:
                left -= len(data) + len(name.encode())
                state[name] = msgspec.Raw(data)
        if unsent:
            named = ", ".join(unsent[:MAX_NAMED]) + (", …" if len(unsent) > MAX_NAMED else "")
            words.append(f"({len(unsent)} attribute(s) were too large to travel: {named})")
    except Exception as problem:  # a user's __getattribute__, or names that are not text
        words.append(f"(the args and attributes of the error cannot be read: {type(problem).__name__})")
    return arguments, state, words


_SHORT = msgspec.msgpack.encode("…")


def _arguments(error: BaseException, words: list[str]) -> tuple[Any, ...]:
    if isinstance(error, BaseExceptionGroup):
        return (error.message,)  # its parts travel as errors
    if isinstance(error, OSError):
        return tuple(OSError.__reduce__(error)[1])  # with the file names, which `args` lacks
    arguments: tuple[Any, ...] = _args_of(error)
    for kind, at in ((UnicodeDecodeError, 1), (UnicodeEncodeError, 1), (UnicodeTranslateError, 0)):
        # The error can only be made with an object of the right type, so a large object is cut, not replaced by text.
        if isinstance(error, kind) and len(arguments) == at + 4 and len(arguments[at]) > MAX_OBJECT:
            words.append(f"(the object's length is {len(arguments[at]):,}; only the first {MAX_OBJECT:,} travelled)")
            arguments = (*arguments[:at], arguments[at][:MAX_OBJECT], *arguments[at + 1 :])
    if len(arguments) > MAX_ARGS:
        words.append(f"(the error has {len(arguments):,} args; only the first {MAX_ARGS} travelled)")
    return arguments[:MAX_ARGS]


_args_of: Any = vars(BaseException)["args"].__get__  # a class may define its own `args`


def _attributes(error: BaseException) -> Iterator[tuple[str, Any]]:
    seen = {REMOTE}
    for name, member in members_of(error).items():
        try:
            value = member.__get__(error)
        except AttributeError:  # a slot that was never filled
            continue
        seen.add(name)
        yield name, value
    for name, value in list(object.__getattribute__(error, "__dict__").items()):
        if type(name) is str and not name.startswith("__") and name not in seen:
            yield clean(name), value


def members_of(error: BaseException) -> dict[str, Any]:
    """Return the descriptors of an error's slots, and of the fields that built-in types keep outside `__dict__`."""
    kind: Any = type(error)
    return _members_of(kind)


@lru_cache(maxsize=512)  # more than the types of errors of one program
def _members_of(kind: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in kind.__mro__:
        for name, member in vars(each).items():
            mine = name in _KEPT_APART.get(each, ()) if each in BUILT_IN else not name.startswith("__")
            if mine and type(member) is MemberDescriptorType:
                found.setdefault(name, member)
    return found


def _packed(value: Any, left: int) -> bytes | None:
    """Encode a value in at most `left` bytes: unchanged, else with texts in place of its unsendable parts.

    A value that is too large is encoded as its text. Returns None if that is too large as well.
    """
    if (data := _encoded(value, left)) is not None:
        return data
    try:
        if _fits(value, min(left, MAX_REPAIRED)):
            data = _encoded(_with_texts(value, MAX_LEVELS), left)
    except Exception:  # a property of the user's class
        pass
    if data is not None:
        return data
    return _encoded(text_of(value), left)


def _encoded(value: Any, left: int) -> bytes | None:
    """Encode a value as an answer would be. Return None if it cannot travel or has more than `left` bytes."""
    try:
        data = encode_part(value) if _fits(value, left) else None
    except Exception:  # Methods of a user's class may fail.
        return None
    return None if data is None or isinstance(data, Message) or len(data) > left else data


def _fits(value: Any, left: int) -> bool:
    """Return whether a value may fit in `left` bytes. Looks at no more than `left` parts of it."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        left -= 1
        if isinstance(each, (str, bytes, bytearray)):
            left -= len(each) - 1
        elif isinstance(size := getattr(each, "nbytes", None), int):
            left -= size
        elif isinstance(each, (dict, list, tuple, set, frozenset)):
            if len(each) > left:
                return False
            waiting += each
            if isinstance(each, dict):
                waiting += each.values()
        elif is_model(type(each)):
            waiting += vars(each).values()
        else:
            waiting += (child for _, child in _fields(each))
        if left < 0:
            return False
    return True


def _with_texts(value: Any, levels: int) -> Any:
    """Return a container in which every part can travel. Return the text of any other value."""
    if levels:
        if is_model(type(value)):
            value = value.model_dump(by_alias=True)
        if isinstance(value, dict):
            return {_part(key, 0): _part(child, levels) for key, child in dict.items(value)}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [_part(child, levels) for child in value]
        if fields := _fields(value):
            return {name: _part(child, levels) for name, child in fields}
    return text_of(value)


def _part(value: Any, levels: int) -> Any:
    return value if _encoded(value, MAX_STATE) is not None else _with_texts(value, max(levels - 1, 0))


def _fields(value: Any) -> list[tuple[str, Any]]:
    """Return the fields of an object that travels as a dict, with their keys in that dict."""
    kind: Any = type(value)
    if isinstance(value, msgspec.Struct):
        names = list(zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True))
    else:
        names = [(name, name) for name in field_names(kind)]
    return [(sent, getattr(value, name)) for sent, name in names if hasattr(value, name)]


class _Summary(reprlib.Repr):
    """The `repr` of a container, with a bound on the parts that it visits."""

    def repr_instance(self, value: Any, level: int) -> str:
        fields = list(vars(value).items()) if is_model(type(value)) else _fields(value)
        if not fields:
            return super().repr_instance(value, level)
        words = [f"{name}={self.repr1(child, level - 1)}" for name, child in fields] if level > 0 else ["..."]
        return f"{type(value).__qualname__}({', '.join(words)})"


_summary = _Summary()
_summary.maxother = _summary.maxstring = _summary.maxlong = MAX_TEXT


def text_of(value: Any) -> str:
    """Return the text that replaces a value: its path, its characters, or its `repr`; at most `MAX_TEXT` long."""
    try:
        text = _text(value)
    except Exception as problem:  # The `__repr__` of a user's class may fail.
        text = f"<{type(value).__qualname__} without a text: {type(problem).__name__}>"
    return clean(text, MAX_TEXT)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value):,} bytes: {bytes(value[:64])!r}" + ("…" if len(value) > 64 else "")
    if hasattr(value, "__fspath__"):
        path = value.__fspath__()
        return path if isinstance(path, str) else repr(path)
    if isinstance(value, int) and value.bit_length() > 8192:  # Python refuses to format it, which would take long
        return f"an int of {value.bit_length():,} bits"
    return _summary.repr(value)


def clean(text: str, limit: int | None = None) -> str:
    """Return text that UTF-8 can encode, cut in the middle to `limit` characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode(errors="backslashreplace").decode()
    return text if limit is None else cut(text, limit)


def cut(text: str, limit: int) -> str:
    """Return text cut in the middle to `limit` characters."""
    if len(text) <= limit:
        return text
    half = limit // 2 - 32
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters left out …\n{text[-half:]}"


# ---- the receiving side -----------------------------------------------------------------------------------------


def values_of(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """Return the args that `held_by` encoded. A text with the reason replaces an arg that cannot be read here."""
    return tuple(map(_value, arguments))


def fill(error: BaseException, state: dict[str, Any]) -> None:
    """Set the attributes that `held_by` encoded, without running code of a user's class."""
    members = members_of(error)
    for name, data in state.items():
        if name.startswith("__"):
            continue
        value = _value(data)
        try:
            members[name].__set__(error, value)
        except (KeyError, AttributeError, TypeError):  # not a slot, or a slot that only its own class may write
            object.__getattribute__(error, "__dict__")[name] = value


def _value(data: Any) -> Any:
    if not isinstance(data, msgspec.Raw):
        return data
    try:
        return decode(bytes(data))
    except Exception as problem:  # e.g. an array where NumPy is not installed
        return f"({problem})"

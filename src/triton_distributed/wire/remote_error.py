"""A handler's exception on its way to the caller.

What travels is text and plain values: the names of the types, the message, the traceback. The caller gets an
exception of a type that it has already, or of the nearest base of it; nothing is imported or unpickled because a peer
named it, and no `__init__` of a user's class runs with what a peer sent.
"""

from __future__ import annotations

import builtins
import sys
import traceback
from collections.abc import Iterable
from functools import lru_cache
from types import ModuleType
from typing import Any, cast

import msgspec

from triton_distributed.errors import RemoteError

MAX_TRACEBACK = 64 * 1024  # characters; a page of frames, and every error of a burst holds one
MAX_MESSAGE = 16 * 1024  # characters; a message is read by people
MAX_STATE = 16 * 1024  # encoded bytes of args and attributes together; beyond it they are data, not an error
MAX_TYPES = 32  # bases that are named; deeper hierarchies are caught by the nearest 32
MAX_NOTES = 32  # notes, each cut like a message
MAX_PARTS = 64  # errors of a group, and of the groups in it, together
MAX_ERROR = 192 * 1024  # bytes of the whole, so that it fits a frame; beyond it notes go first, then tracebacks
MAX_CLASSES = 256  # combined classes kept; more than the error types of one program's peers

_BUILT_IN = frozenset(
    each for each in vars(builtins).values() if isinstance(each, type) and issubclass(each, Exception)
)

_ENDS_ITERATION = (StopIteration, StopAsyncIteration)
"""Raised in the caller's loop as themselves they would end it, and the error would pass for a complete answer."""

_MEMBERS: tuple[tuple[type[Exception], tuple[str, ...]], ...] = (
    (ImportError, ("name", "path")),
    (AttributeError, ("name",)),
    (NameError, ("name",)),
)
"""What some built-in types keep outside `args` and `__dict__`."""

_FIELDS = ("type_name", "message", "remote_traceback", "instance_id", "request_id")
_ORIGIN = "_origin"  # the names of the types as the handler's process knew them; carried on by stages in between


class _Error(msgspec.Struct, array_like=True):
    type_name: str
    types: tuple[tuple[str, str], ...]
    message: str
    traceback: str
    notes: list[str]
    args: list[Any] | None
    state: dict[str, Any]
    parts: list[_Error] = []  # of an ExceptionGroup


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Error).decode


def encode_error(error: BaseException) -> bytes:
    """Turn what a handler raised into bytes, at most `MAX_ERROR`. Never raises, whatever the exception's methods do."""
    fields = _described(error, [MAX_PARTS])
    try:
        data = _encode(fields)
        for limit in (MAX_MESSAGE, 1024, 0):
            if len(data) <= MAX_ERROR:
                return data
            _shorten(fields, limit)
            data = _encode(fields)
        if len(data) <= MAX_ERROR:
            return data
    except Exception:  # attributes that were replaced by something odd
        pass
    message = _clean(fields.message, MAX_MESSAGE // 4)
    return _encode(_Error(fields.type_name, fields.types[:4], message, "", [], None, {}))


def _shorten(fields: _Error, limit: int) -> None:
    """Leave the notes out, and of tracebacks and messages all but `limit` characters, at all levels of a group."""
    fields.notes = []
    fields.traceback = _cut(fields.traceback, limit) if limit else ""
    fields.message = _cut(fields.message, limit or 256)
    if not limit:
        fields.args, fields.state = None, {}
    for part in fields.parts:
        _shorten(part, limit)


def _described(error: BaseException, left: list[int]) -> _Error:
    arguments, state = _contents(error)
    fields = _Error(
        type_name=_clean(type(error).__name__, 255),
        types=_types(type(error)),
        message=_text(error),
        traceback=_cut(_clean(_formatted(error)), MAX_TRACEBACK),
        notes=_notes(error),
        args=arguments,
        state=state,
    )
    if isinstance(error, ExceptionGroup):
        for each in error.exceptions:
            left[0] -= 1
            if left[0] < 0:
                break
            part = _described(each, left)
            part.traceback = ""  # the group's own shows its parts
            fields.parts.append(part)
    if isinstance(error, RemoteError) and _ORIGIN in error.__dict__:
        # A stage in between passes on what it got: the first error stays the error.
        fields.type_name = _clean(str(error.type_name), 255)
        fields.message = _clean(str(error.message), MAX_MESSAGE)
        fields.types = error.__dict__[_ORIGIN]
    return fields


def decode_error(data: bytes | bytearray | memoryview, *, instance_id: int, request_id: str) -> RemoteError:
    """Turn bytes into the exception to raise. Never raises; bytes that are none become an error that says so.

    Args:
        data: what `encode_error` returned.
        instance_id: who answered.
        request_id: which request it was.
    """
    try:
        fields = _decode(data)
    except Exception as problem:
        message = f"the handler raised, and its error cannot be read: {problem}"
        fields = _Error("Exception", (), message, "", [], None, {})
    return _raised(fields, instance_id, request_id)


def _raised(fields: _Error, instance_id: int, request_id: str) -> RemoteError:
    arguments: Iterable[Any] = fields.args or ()
    if fields.parts:
        arguments = (
            fields.message.rpartition(" (")[0],
            [_raised(each, instance_id, request_id) for each in fields.parts],
        )
    error = _built(fields.types[:MAX_TYPES], arguments, fields.state)
    error.__dict__.update(
        type_name=fields.type_name,
        message=fields.message,
        remote_traceback=_cut(fields.traceback, MAX_TRACEBACK),
        instance_id=instance_id,
        request_id=request_id,
    )
    notes = fields.notes[:MAX_NOTES]
    if fields.traceback:
        notes.append(_heading(error) + error.remote_traceback)
    if notes:
        error.__dict__["__notes__"] = notes  # as add_note would, but past a user's __setattr__
    return error


def _heading(error: RemoteError) -> str:
    request = f", request {error.request_id}" if error.request_id else ""
    return f"\nIn instance {error.instance_id}{request}:\n"


# ---- the sending side -------------------------------------------------------------------------------------------


def _types(kind: type[BaseException]) -> tuple[tuple[str, str], ...]:
    if not issubclass(kind, Exception):
        return ()
    named = (each for each in kind.__mro__ if issubclass(each, Exception) and each is not Exception)
    return tuple((_clean(str(each.__module__), 255), _clean(each.__qualname__, 255)) for each in named)[:MAX_TYPES]


def _text(error: BaseException) -> str:
    try:
        made_here = isinstance(error, RemoteError) and _ORIGIN not in error.__dict__
        return _clean(Exception.__str__(error) if made_here else str(error), MAX_MESSAGE)
    except Exception as problem:
        return f"(its text cannot be had: {type(problem).__name__})"


def _formatted(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except Exception as problem:
        return f"(its traceback cannot be had: {type(problem).__name__})\n"


def _notes(error: BaseException) -> list[str]:
    notes = getattr(error, "__notes__", ())
    if not isinstance(notes, list):
        return []
    if isinstance(error, RemoteError) and error.remote_traceback:
        inner = _heading(error) + error.remote_traceback  # stands in this error's own traceback already
        notes = [note for note in notes if note != inner]
    return [_clean(note, MAX_MESSAGE) for note in notes if isinstance(note, str)][:MAX_NOTES]


def _contents(error: BaseException) -> tuple[list[Any] | None, dict[str, Any]]:
    """Return args and attributes as far as they are plain values and few bytes."""
    try:
        left = MAX_STATE
        arguments: list[Any] | None = [_path(each) for each in _arguments(error)]
        size = _size(arguments)
        if size is None or size > left:
            arguments = None
        else:
            left -= size
        state: dict[str, Any] = {}
        for name, value in _attributes(error):
            size = _size(value)
            if size is not None and size + len(name) <= left:
                left -= size + len(name)
                state[name] = value
        return arguments, state
    except Exception:  # a user's property, __getattribute__ or mapping
        return None, {}


def _arguments(error: BaseException) -> tuple[Any, ...]:
    if isinstance(error, OSError):
        reduced = OSError.__reduce__(error)
        return tuple(reduced[1])  # with the file names, which `args` lacks
    return error.args


def _attributes(error: BaseException) -> Iterable[tuple[str, Any]]:
    yield from _members(error)
    for name, value in list(vars(error).items()):
        if not name.startswith("__") and name != _ORIGIN and name not in _FIELDS:
            yield name, value


def _members(error: BaseException) -> list[tuple[str, Any]]:
    return [(name, getattr(error, name, None)) for kind, names in _MEMBERS if isinstance(error, kind) for name in names]


def _path(value: Any) -> Any:
    return str(value) if hasattr(value, "__fspath__") and not isinstance(value, (str, bytes)) else value


def _size(value: Any) -> int | None:
    """Bytes that a plain value takes, or None where it is not plain."""
    try:
        return len(_encode(value)) if _is_plain(value, 8) else None
    except Exception:
        return None


def _is_plain(value: Any, depth: int) -> bool:
    kind = type(value)
    if kind in (type(None), bool, int, float, str, bytes):
        return True
    if not depth:
        return False
    if kind in (list, tuple):
        return all(_is_plain(each, depth - 1) for each in value)
    return kind is dict and all(type(key) is str and _is_plain(each, depth - 1) for key, each in value.items())


def _clean(text: str, limit: int | None = None) -> str:
    """Text that can be encoded, cut in the middle to `limit` characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode(errors="backslashreplace").decode()
    return text if limit is None else _cut(text, limit)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2 - 32
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters left out …\n{text[-half:]}"


# ---- the receiving side -----------------------------------------------------------------------------------------


def _built(types: Iterable[tuple[str, str]], arguments: Iterable[Any], state: dict[str, Any]) -> RemoteError:
    arguments = tuple(arguments)
    origin = tuple((module, name) for module, name in types)
    error = None
    for module, name in origin:
        known = _known(module, name)
        if known is not None and (error := _instance(known, arguments)) is not None:
            break
    if error is None:
        error = RemoteError(*arguments)
    error.__dict__.update((key, value) for key, value in state.items() if not key.startswith("__"))
    error.__dict__[_ORIGIN] = origin
    for member, _ in _members(error):
        object.__setattr__(error, member, error.__dict__.pop(member, None))
    return error


def _known(module_name: str, qualname: str) -> type[Exception] | None:
    """Find an exception class that this process has already. Runs no module's or class's `__getattr__`."""
    module = builtins if module_name == "builtins" else sys.modules.get(module_name)
    if not isinstance(module, ModuleType):
        return None
    found: Any = module
    for part in qualname.split("."):
        if found is not module and not isinstance(found, type):
            return None
        found = (ModuleType if found is module else type).__getattribute__(found, "__dict__").get(part)
    if not isinstance(found, type) or not issubclass(found, Exception) or issubclass(found, _ENDS_ITERATION):
        return None
    return found


def _instance(known: Any, arguments: tuple[Any, ...]) -> RemoteError | None:
    combined: type[RemoteError] | None = _combined(known)
    if combined is None:
        return None
    # The built-in base makes the object: it fills errno, filename and the like, and no code of a user's class runs.
    base: Any = next(each for each in known.__mro__ if each in _BUILT_IN)
    try:
        try:
            error = base.__new__(combined, *arguments)
        except TypeError:  # MemoryError makes only its own kind, of the layout that every exception has
            error = BaseException.__new__(combined, *arguments)
        base.__init__(error, *arguments)
    except Exception:
        return None
    return error if isinstance(error, RemoteError) else None


@lru_cache(maxsize=MAX_CLASSES)
def _combined(known: Any) -> type[RemoteError] | None:
    """Return a class that is both `RemoteError` and `known`, or None where the two cannot be combined."""
    if issubclass(RemoteError, known):
        return RemoteError
    if issubclass(known, RemoteError):
        return cast("type[RemoteError]", known)
    namespace = {
        "__module__": RemoteError.__module__,
        "__doc__": f"What a handler raised as {known.__qualname__}.",
        "__reduce__": _reduce,
    }
    try:
        return cast("type[RemoteError]", type("RemoteError", (RemoteError, known), namespace))
    except Exception:  # layouts or metaclasses that do not fit, or a class that refuses to have subclasses
        return None


def _reduce(error: RemoteError) -> Any:
    return _restored, (error.__dict__.get(_ORIGIN, ()), _arguments(error), dict(_members(error)), dict(error.__dict__))


def _restored(
    origin: tuple[tuple[str, str], ...],
    arguments: tuple[Any, ...],
    members: dict[str, Any],
    attributes: dict[str, Any],
) -> RemoteError:
    error = _built(origin, arguments, members)
    error.__dict__.update(attributes)
    return error

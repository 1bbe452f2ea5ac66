"""A handler's exception on its way to the caller.

Only text and plain values travel: the names of the types, the message, the traceback, args and attributes. The caller
gets an exception of the same type if its process knows the type, else of the nearest known base. Nothing is imported or
unpickled because a peer named it, and no `__init__` of a user's class runs with data from a peer.

The traceback travels once, from the place that raised the error. A handler that lets the error of its own call through
only adds one line to it.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterable
from functools import lru_cache
from traceback import TracebackException
from types import ModuleType
from typing import Any, cast

import msgspec

from triton_distributed.errors import REMOTE, RemoteCause, RemoteError
from triton_distributed.payload.exception_values import BUILT_IN, clean, cut, fill, held_by, members_of, values_of
from triton_distributed.payload.tracebacks import no_traceback, trace_of

MAX_TRACEBACK = 64 * 1024  # characters of a traceback: enough to read, and small enough for a burst of errors
MAX_MESSAGE = 16 * 1024  # characters of a message; people have to read it
MAX_TYPES = 32  # base classes that travel, nearest first
MAX_NOTES = 32  # notes that travel, each cut like a message
MAX_PARTS = 64  # errors in a group, counting the groups inside it
MAX_HOPS = 32  # hops that are kept: the first one, and the last ones before the caller
MAX_ERROR = 192 * 1024  # bytes of an encoded error, to fit a frame; notes are cut first, then tracebacks
MAX_CLASSES = 256  # cached combined classes; more than the error types of one program's peers

_ENDS_ITERATION = (StopIteration, StopAsyncIteration)
"""Types that would end the caller's loop silently, so that the answer would look complete."""

_FIELDS = ("type_name", "message", "remote_traceback", "instance_id", "request_id", "remote")
"""Attributes of `RemoteError` that an attribute of the same name in the raised type replaces."""


class _Error(msgspec.Struct, array_like=True):
    type_name: str
    types: tuple[tuple[str, str], ...]
    message: str
    traceback: str  # a group's own traceback, without those of its parts
    notes: list[str]
    args: list[msgspec.Raw] | None
    state: dict[str, msgspec.Raw]
    parts: list[_Error] = []  # of an ExceptionGroup
    hops: list[tuple[int, str]] = []  # the handlers that the error passed before this one


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Error).decode


def encode_error(error: BaseException, *, full_tracebacks: bool = False) -> bytes:
    """Turn a handler's error into at most `MAX_ERROR` bytes. Never raises, even if the error's methods raise.

    Args:
        error: the error that the handler raised.
        full_tracebacks: keep the frames of this package in the traceback.
    """
    trace: TracebackException | str
    try:
        trace = trace_of(error, full=full_tracebacks)
    except Exception as problem:  # Methods of a user's exception may fail.
        trace = no_traceback(problem)
    fields = _described(error, trace, [MAX_PARTS])
    try:
        data = _encode(fields)
        for limit in (MAX_MESSAGE, 1024, 0):
            if len(data) <= MAX_ERROR:
                return data
            _shorten(fields, limit)
            data = _encode(fields)
        if len(data) <= MAX_ERROR:
            return data
    except Exception:  # `_encode` refuses a value that the error's class replaced
        pass
    message = clean(fields.message, MAX_MESSAGE // 4)
    return _encode(_Error(fields.type_name, fields.types[:4], message, "", [], None, {}))


def name_and_text(error: BaseException) -> tuple[str, str]:
    """Return the name of an error's type and the error's text, as they travel. Those of another worker's error stay.

    Never raises, even if the error's methods raise.
    """
    known = RemoteError.cause_of(error)
    if known is not None:
        return clean(str(known.type_name), 255), clean(str(known.message), MAX_MESSAGE)
    return clean(type(error).__name__, 255), _text(error)


def let_through(error: BaseException) -> RemoteCause | None:
    """Return the cause of an error that the handler's own call raised and the handler let through; None for others.

    An error with a cause or context of its own does not count: its traceback must show the other error too.
    """
    if error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__):
        return None
    return RemoteError.cause_of(error)


def _shorten(fields: _Error, limit: int) -> None:
    """Drop the notes, and cut tracebacks and messages to `limit` characters, at all levels of a group."""
    fields.notes = []
    fields.traceback = cut(fields.traceback, limit) if limit else ""
    fields.message = cut(fields.message, limit or 256)
    if not limit:
        fields.args, fields.state = None, {}
    for part in fields.parts:
        _shorten(part, limit)


def _described(error: BaseException, trace: TracebackException | str, left: list[int]) -> _Error:
    known, through = RemoteError.cause_of(error), let_through(error)
    name, text = name_and_text(error)
    arguments, state, unsent = held_by(error)
    ours = _note(known) if known else ""
    notes = [note for note in _notes(error) if note != ours]
    fields = _Error(
        type_name=name,
        types=_types(type(error)) if known is None else known.types,
        message=text,
        traceback="",
        notes=[clean(note, MAX_MESSAGE) for note in [*notes, *unsent] if isinstance(note, str)][:MAX_NOTES],
        args=arguments,
        state=state,
    )
    if isinstance(error, ExceptionGroup):
        traces = _parts_of(trace)
        for number, each in enumerate(error.exceptions):
            left[0] -= 1
            if left[0] < 0:
                break
            fields.parts.append(_described(each, traces[number] if number < len(traces) else "", left))
    if through is not None:
        fields.traceback, fields.hops = through.own_traceback, list(through.hops)
    else:
        fields.traceback = cut(clean(_formatted(trace, ours)), MAX_TRACEBACK)
    return fields


def _parts_of(trace: TracebackException | str) -> list[TracebackException]:
    """Remove the traces of a group's parts from the group's trace and return them: each part travels with its own."""
    if isinstance(trace, str):
        return []
    parts, trace.exceptions = trace.exceptions or [], None
    return parts


def _formatted(trace: TracebackException | str, note: str) -> str:
    if isinstance(trace, str):
        return trace
    try:
        trace.__notes__ = [note] if note else []  # the other notes travel outside the traceback
        return "".join(trace.format())
    except Exception as problem:  # As in `encode_error`.
        return no_traceback(problem)


def decode_error(data: bytes | bytearray | memoryview, *, instance_id: int, request_id: str) -> RemoteError:
    """Turn bytes into the exception to raise. Never raises: malformed bytes become an error that reports this.

    Args:
        data: the bytes that `encode_error` returned.
        instance_id: the instance that answered.
        request_id: the request that it answered.
    """
    try:
        fields = _decode(data)
    except Exception as problem:  # An error that arrived always becomes an error, whatever is in it.
        message = f"the handler raised an error that cannot be read: {problem}"
        fields = _Error("Exception", (), message, "", [], None, {})
    return _raised(fields, (instance_id, request_id))


def _raised(fields: _Error, answered: tuple[int, str]) -> RemoteError:
    arguments = values_of(fields.args or ())
    parts = [_raised(each, answered) for each in fields.parts]
    if parts:
        message = arguments[0] if arguments else fields.message.rpartition(" (")[0]
        arguments = (str(message), parts)
    hops = [*fields.hops, answered]
    remote = RemoteCause(
        type_name=fields.type_name,
        message=fields.message,
        own_traceback=cut(fields.traceback, MAX_TRACEBACK),
        hops=(*hops[:1], *hops[1:][1 - MAX_HOPS :]),
        types=fields.types[:MAX_TYPES],
        parts=tuple(cause for each in parts if (cause := RemoteError.cause_of(each)) is not None),
    )
    error = _built(remote.types, arguments)
    fill(error, fields.state)
    error.__dict__[REMOTE] = remote
    notes = fields.notes[:MAX_NOTES]
    if note := _note(remote):
        notes.append(note)
    if notes:
        error.__dict__["__notes__"] = notes  # like add_note, but without a user's __setattr__
    return error


def _note(remote: RemoteCause) -> str:
    """Return a note on the place that raised an error, and on the handlers that let it through."""
    if not remote.own_traceback and len(remote.hops) < 2:
        return ""
    first, *others = remote.hops or [(0, "")]
    lines = [f"Passed on by {_place(hop)}.\n" for hop in others]
    return f"\nIn {_place(first)}:\n{remote.own_traceback}" + "".join(lines)


def _place(hop: tuple[int, str]) -> str:
    return f"instance {hop[0]}, request {hop[1]}" if hop[1] else f"instance {hop[0]}"


def _types(kind: type[BaseException]) -> tuple[tuple[str, str], ...]:
    if not issubclass(kind, Exception):
        return ()
    named = (each for each in kind.__mro__ if issubclass(each, Exception) and each is not Exception)
    return tuple((clean(str(each.__module__), 255), clean(each.__qualname__, 255)) for each in named)[:MAX_TYPES]


def _text(error: BaseException) -> str:
    try:
        # The text of a RemoteError that a handler made itself would repeat the name of its type.
        ours = isinstance(error, RemoteError) and type(error).__str__ is RemoteError.__str__
        return clean(Exception.__str__(error) if ours else str(error), MAX_MESSAGE)
    except Exception as problem:  # The `__str__` of a user's exception may fail.
        return f"(its text cannot be read: {type(problem).__name__})"


def _notes(error: BaseException) -> list[Any]:
    try:
        notes = getattr(error, "__notes__", ())
    except Exception:  # The `__getattr__` of a user's exception may fail.
        notes = ()
    return notes if isinstance(notes, list) else []


# ---- the receiving side -----------------------------------------------------------------------------------------


def _built(types: Iterable[tuple[str, str]], arguments: tuple[Any, ...]) -> RemoteError:
    for module, name in types:
        known = _known(module, name)
        if known is not None and (error := _instance(known, arguments)) is not None:
            return error
    return RemoteError(*arguments)


def _known(module_name: str, qualname: str) -> type[Exception] | None:
    """Find an exception class that this process knows already, without calling any `__getattr__`."""
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
    # A class that is also a CancelledError or a SystemExit would act as one in the caller.
    bases = [each for each in found.__mro__ if issubclass(each, BaseException) and each is not BaseException]
    return found if all(issubclass(each, (Exception, BaseExceptionGroup)) for each in bases) else None


def _instance(known: Any, arguments: tuple[Any, ...]) -> RemoteError | None:
    combined: type[RemoteError] | None = _combined(known)
    if combined is None:
        return None
    # The built-in base class makes the object. It fills errno, filename and the like, and no user code runs.
    base: Any = next(each for each in known.__mro__ if each in BUILT_IN)
    try:
        try:
            error = base.__new__(combined, *arguments)
        except TypeError:  # MemoryError.__new__ takes no subclass, but its layout is that of every exception
            error = BaseException.__new__(combined, *arguments)
        base.__init__(error, *arguments)
    except Exception:  # The `__init__` of a user's exception may fail.
        return None
    return error if isinstance(error, RemoteError) else None


@lru_cache(maxsize=MAX_CLASSES)
def _combined(known: Any) -> type[RemoteError] | None:
    """Return a class derived from `RemoteError` and `known`, or None if the two cannot be combined."""
    if issubclass(RemoteError, known):
        return RemoteError
    if issubclass(known, RemoteError):
        return cast("type[RemoteError]", known)
    namespace = {
        "__module__": RemoteError.__module__,
        "__doc__": f"An error that a handler raised as {known.__qualname__}.",
        "__reduce__": _reduce,
    }
    for name in _FIELDS:
        own = [vars(each)[name] for each in known.__mro__ if name in vars(each)]
        if own:
            namespace[name] = own[0]
    try:
        return cast("type[RemoteError]", type("RemoteError", (RemoteError, known), namespace))
    except Exception:  # incompatible layouts or metaclasses, or a class that forbids subclasses
        return None


def _reduce(error: RemoteError) -> Any:
    remote = RemoteError.cause_of(error) or RemoteCause()
    members = {}
    for name, member in members_of(error).items():
        try:
            members[name] = member.__get__(error)
        except AttributeError:  # a slot that was never filled
            continue
    arguments: Any = OSError.__reduce__(error)[1] if isinstance(error, OSError) else error.args
    return _restored, (remote.types, arguments, members, dict(error.__dict__))


def _restored(
    types: tuple[tuple[str, str], ...],
    arguments: tuple[Any, ...],
    members: dict[str, Any],
    attributes: dict[str, Any],
) -> RemoteError:
    error = _built(types, arguments)
    fill(error, members)
    error.__dict__.update(attributes)
    return error

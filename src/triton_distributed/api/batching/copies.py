"""Copies of an error, so that each caller of a batch raises its own.

An error that several tasks raise grows by a traceback entry for each of them, and keeps the frames of all alive.
"""

from __future__ import annotations

from typing import Any

from triton_distributed.payload.exception_values import BUILT_IN, members_of


def own_copy(error: BaseException) -> BaseException:
    """Return an error of the same type with the same args, attributes, notes, causes and traceback.

    No `__init__` of a user's class runs. If the type cannot be copied, the result is a RuntimeError with its text.
    """
    try:
        made = _copied(error)
    except Exception:  # A class with a `__new__` or a base of its own may refuse in any way.
        made = RuntimeError(f"{type(error).__qualname__}: {error}")
    made.__cause__, made.__context__ = error.__cause__, error.__context__
    made.__suppress_context__ = error.__suppress_context__
    return made.with_traceback(error.__traceback__)


def _copied(error: BaseException) -> BaseException:
    kind: Any = type(error)
    base: Any = next(each for each in kind.__mro__ if each in BUILT_IN)
    arguments = OSError.__reduce__(error)[1] if isinstance(error, OSError) else error.args
    try:
        made: BaseException = base.__new__(kind, *arguments)
    except TypeError:  # MemoryError.__new__ takes no subclass.
        made = BaseException.__new__(kind, *arguments)
    base.__init__(made, *arguments)
    for member in members_of(error).values():
        try:
            member.__set__(made, member.__get__(error))
        except AttributeError:  # A slot that was never filled.
            continue
    made.__dict__.update(error.__dict__)
    return made

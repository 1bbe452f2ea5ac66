"""Reads the signature of a function that takes a batch: whether it is a method, and the types of one item."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

from triton_distributed.serving.signatures import resolved, written

_LISTS = (list, collections.abc.Sequence)
_ANSWERS = (list, tuple, collections.abc.Sequence)
_UNTYPED: tuple[Any, ...] = (inspect.Parameter.empty, Any, object)


class BatchSignature(NamedTuple):
    """The facts that the signature of a batch function gives.

    Attributes:
        is_method: its first parameter is the object.
        on_loop: it is async.
        takes_second: it has a second parameter after the batch.
        batch, answers: the annotations of its first parameter and of its result; `inspect.Parameter.empty` for none.
    """

    is_method: bool
    on_loop: bool
    takes_second: bool
    batch: Any
    answers: Any


def read(function: Callable[..., Any], decorator: str, second: str, *, needed: bool) -> BatchSignature:
    """Read the signature of a batch function.

    Args:
        function: the function.
        decorator: the decorator's name, for errors.
        second: the name of the parameter after the batch.
        needed: the function must have this parameter.

    Raises:
        TypeError: it is not a function, is a generator, has other parameters, or an annotation cannot be resolved.
    """
    form = f"a batch function takes the requests{'' if needed else ' and optionally'}{' and' * needed} `{second}`"
    if not callable(function):
        raise TypeError(f"{decorator} decorates a function, not {type(function).__name__}: {function!r}")
    name = getattr(function, "__qualname__", None) or repr(function)
    plain: Any = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    if not inspect.isroutine(plain):
        plain = plain.__call__
    if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise TypeError(f"{decorator}: {name} is a generator: a batch function returns a list of answers")
    parameters = list(inspect.signature(function).parameters.values())
    is_method = bool(parameters) and parameters[0].name in ("self", "cls")
    names = [each.name for each in parameters[is_method:]]
    positional = all(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in parameters)
    fits = len(names) == 2 if needed else bool(names) and names[1:] in ([], [second])
    if not fits or not positional:
        shown = ", ".join(str(each) for each in parameters)
        raise TypeError(f"{decorator}: {name} has the parameters ({shown}): {form}; a method has `self` before them")
    inner = inspect.unwrap(plain)
    hints = getattr(inner, "__annotations__", {})
    batch = resolved(hints.get(names[0], inspect.Parameter.empty), inner, f"{decorator}: {name}: `{names[0]}`")
    answers = resolved(hints.get("return", inspect.Parameter.empty), inner, f"{decorator}: {name}: its return value")
    if typing.get_origin(answers) in (collections.abc.Awaitable, collections.abc.Coroutine):
        answers = typing.get_args(answers)[-1]
    return BatchSignature(is_method, inspect.iscoroutinefunction(plain), len(names) == 2, batch, answers)


def request_type(hint: Any, where: str) -> Any:
    """The type of one request, given the annotation of the batch.

    Raises:
        TypeError: the annotation is not a list.
    """
    return _item(hint, _LISTS, f"{where}: its requests are annotated with", "list[Request]")


def answer_type(hint: Any, where: str) -> Any:
    """The type of one answer, given the return annotation. Exceptions in a union are left out.

    Raises:
        TypeError: the annotation is not a list.
    """
    item = _item(hint, _ANSWERS, f"{where}: its return value is annotated with", "list[Answer]")
    if typing.get_origin(item) not in (typing.Union, types.UnionType):
        return item
    kept = [each for each in typing.get_args(item) if not (isinstance(each, type) and issubclass(each, BaseException))]
    return typing.Union[tuple(kept)] if kept else Any  # noqa: UP007


def _item(hint: Any, kinds: tuple[Any, ...], where: str, form: str) -> Any:
    if any(hint is each for each in _UNTYPED):
        return Any
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin not in kinds or (origin is tuple and arguments[1:] != (Ellipsis,) and arguments):
        raise TypeError(f"{where} {written(hint)}: must be {form}")
    return arguments[0] if arguments else Any

"""Fields of objects that msgspec's encoder passes over.

It takes the fields of a dataclass from the instance. A field whose value is only the default in the class is left out:
one with `init=False`, or one that an `__init__` of the user's own does not set. Of an attrs object it leaves out each
field whose name begins with an underscore. Here such objects are found, and turned into dicts of all their fields.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from gc import is_tracked
from typing import Any

import msgspec

Look = Callable[[Any], Iterable[Any] | None]
"""Returns the objects inside an object, or None where the encoder passes a field of it over."""

_unknown: Any = object()
_looks: dict[Any, Look | None] = {}
_MOST_LOOKS = 1024  # more than the types of one program's messages


def is_model(kind: Any) -> bool:
    """Whether it is the class of a pydantic model, without importing pydantic."""
    base = getattr(sys.modules.get("pydantic"), "BaseModel", None)
    return base is not None and isinstance(kind, type) and issubclass(kind, base)


def has_passed_over(value: Any) -> bool:
    """Whether the encoder passes a field over anywhere in a value that it is able to encode.

    Call it only where `gc.is_tracked(value)`. The garbage collector does not track text, numbers and dicts of nothing
    else, and they hold no object with fields.

    Raises:
        RecursionError: the value nests too deeply.
    """
    kind = value.__class__
    if kind is dict:
        children: Iterable[Any] = value.values()
    elif kind is list:
        children = value
    else:
        look = _looks.get(kind, _unknown)
        if look is _unknown:
            look = _learn(kind)
        found = () if look is None else look(value)
        if found is None:
            return True
        children = found
    for child in children:  # noqa: SIM110 - any() would take twice as long
        if is_tracked(child) and has_passed_over(child):
            return True
    return False


def all_fields(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass or an attrs object."""
    fields = {name: getattr(value, name, msgspec.UNSET) for name in field_names(type(value))}
    return {name: each for name, each in fields.items() if each is not msgspec.UNSET}


def field_names(kind: Any) -> tuple[str, ...]:
    """The names of the fields of a dataclass or an attrs class; none for any other class."""
    if dataclasses.is_dataclass(kind):
        return tuple(each.name for each in dataclasses.fields(kind))
    return tuple(each.name for each in getattr(kind, "__attrs_attrs__", ()))


@lru_cache(maxsize=1024)  # more than the types of one program's messages
def can_be_passed_over(kind: Any) -> Callable[[Any], bool] | None:
    """Return a function that says of an instance whether one of its fields is passed over; None where none ever is."""
    names = field_names(kind)
    if not dataclasses.is_dataclass(kind):
        return (lambda value: True) if any(name.startswith("_") for name in names) else None
    defaults = frozenset(name for name in names if _is_default(kind, name))
    return (lambda value: not defaults.issubset(getattr(value, "__dict__", ()))) if defaults else None


def _is_default(kind: Any, name: str) -> bool:
    """Whether the class itself has a value for a field, and not a slot or a property that stands for it."""
    for each in kind.__mro__:
        if name in vars(each):
            return not hasattr(type(vars(each)[name]), "__set__")
    return False


def _learn(kind: Any) -> Look | None:
    if len(_looks) >= _MOST_LOOKS:
        _looks.clear()
    look = _looks[kind] = _look(kind)
    return look


def _look(kind: Any) -> Look | None:
    if issubclass(kind, dict):
        return dict.values
    if issubclass(kind, (list, tuple, set, frozenset)):
        return iter
    if is_model(kind):
        return _inside_model
    names: tuple[str, ...] = kind.__struct_fields__ if issubclass(kind, msgspec.Struct) else field_names(kind)
    if not names:
        return None
    every = frozenset(names)
    passed_over = can_be_passed_over(kind)

    def look(value: Any) -> Iterable[Any] | None:
        if passed_over is not None and passed_over(value):
            return None
        return [getattr(value, name, None) for name in names]

    def look_quickly(value: Any) -> Iterable[Any] | None:
        attributes = value.__dict__
        return attributes.values() if every.issubset(attributes) else look(value)

    return look_quickly if dataclasses.is_dataclass(kind) and _has_dict(kind) else look


def _inside_model(model: Any) -> Iterable[Any]:
    return [*vars(model).values(), *(getattr(model, "__pydantic_extra__", None) or {}).values()]


def _has_dict(kind: Any) -> bool:
    return bool(kind.__dictoffset__)

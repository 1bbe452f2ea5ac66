"""Fields that msgspec's encoder skips.

msgspec takes the fields of a dataclass from the instance. It skips a field whose value is only the default in the
class: a field with `init=False`, or a field that a custom `__init__` does not set. In an attrs object it skips each
field whose name begins with an underscore. This module finds such objects and turns each into a dict of all its fields.
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
"""A function that returns the objects inside an object, or None if the encoder skips a field of the object."""

_unknown: Any = object()
_looks: dict[Any, Look | None] = {}
_MOST_LOOKS = 1024  # more than the types of one program's messages


def is_model(kind: Any) -> bool:
    """Return whether `kind` is the class of a pydantic model, without importing pydantic."""
    base = getattr(sys.modules.get("pydantic"), "BaseModel", None)
    return base is not None and isinstance(kind, type) and issubclass(kind, base)


def has_skipped_field(value: Any) -> bool:
    """Return whether the encoder skips a field anywhere in a value that it is able to encode.

    Call this only if `gc.is_tracked(value)`. The garbage collector does not track text, numbers and dicts of these, and
    such values contain no object with fields.

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
        if is_tracked(child) and has_skipped_field(child):
            return True
    return False


def all_fields(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass or an attrs object."""
    fields = {name: getattr(value, name, msgspec.UNSET) for name in field_names(type(value))}
    return {name: each for name, each in fields.items() if each is not msgspec.UNSET}


def field_names(kind: Any) -> tuple[str, ...]:
    """Return the field names of a dataclass or an attrs class; an empty tuple for any other class."""
    if dataclasses.is_dataclass(kind):
        return tuple(each.name for each in dataclasses.fields(kind))
    return tuple(each.name for each in getattr(kind, "__attrs_attrs__", ()))


@lru_cache(maxsize=1024)  # more than the types of one program's messages
def skip_check(kind: Any) -> Callable[[Any], bool] | None:
    """Return a function that checks whether an instance has a skipped field; None if no instance can have one."""
    names = field_names(kind)
    if not dataclasses.is_dataclass(kind):
        return (lambda value: True) if any(name.startswith("_") for name in names) else None
    defaults = frozenset(name for name in names if _is_default(kind, name))
    return (lambda value: not defaults.issubset(getattr(value, "__dict__", ()))) if defaults else None


def _is_default(kind: Any, name: str) -> bool:
    """Return whether the class itself has a value for a field, instead of a slot or a property."""
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
    skips_field = skip_check(kind)

    def look(value: Any) -> Iterable[Any] | None:
        if skips_field is not None and skips_field(value):
            return None
        return [getattr(value, name, None) for name in names]

    def look_quickly(value: Any) -> Iterable[Any] | None:
        attributes = value.__dict__
        return attributes.values() if every.issubset(attributes) else look(value)

    def look_at_struct(value: Any) -> Iterable[Any] | None:
        try:
            return msgspec.structs.astuple(value)
        except AttributeError:  # A field is not set.
            return look(value)

    if issubclass(kind, msgspec.Struct):
        return look_at_struct
    return look_quickly if dataclasses.is_dataclass(kind) and _has_dict(kind) else look


def _inside_model(model: Any) -> Iterable[Any]:
    return [*vars(model).values(), *(getattr(model, "__pydantic_extra__", None) or {}).values()]


def _has_dict(kind: Any) -> bool:
    return bool(kind.__dictoffset__)

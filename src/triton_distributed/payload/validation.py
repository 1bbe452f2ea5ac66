"""Validation by pydantic: of models, and of hints that msgspec cannot check."""

from __future__ import annotations

import functools
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from triton_distributed.payload.annotations import Contents, can_arrive
from triton_distributed.payload.codec import Own


def _pydantic() -> Any:
    pydantic = importlib.import_module("pydantic")
    if tuple(map(int, pydantic.VERSION.split(".")[:2])) < (2, 11):  # the first version with `by_name`
        raise TypeError(f"pydantic 2.11 or newer is needed, but {pydantic.VERSION} is installed")
    return pydantic


def must_be_complete(model: Any) -> None:
    """Check that a model's annotations can be resolved.

    Raises:
        TypeError: an annotation cannot be resolved, or pydantic is too old.
    """
    _pydantic()
    try:
        model.model_rebuild()
    except Exception as error:  # a name that only a type checker knows, or a class inside a function
        text = str(error).partition("\n")[0]
        raise TypeError(f"the model {model.__qualname__} is not complete ({text})") from None


@functools.lru_cache(maxsize=1024)  # more than the models of one program's handlers
def _adapter(kind: Any) -> Any:
    return _pydantic().TypeAdapter(kind)


def model_of(kind: Any, value: Any, models: Own, arriving: bool) -> Any:
    """Make a model from a value.

    Args:
        kind: the model's class.
        value: a value that arrived, or a handler's answer.
        models: the parts of the value that were sent as models.
        arriving: whether the value arrived.

    Raises:
        ValueError: the value does not fit; the text says where and why, and shows no values.
    """
    adapter = _adapter(kind)
    try:
        return _validated(adapter, value, models, [kind], by_name=not arriving)
    except ValueError as error:
        refused = ValueError(_pydantic_words(error))
    if not arriving and isinstance(value, dict):
        try:
            return _validated(adapter, _by_field_name(kind, value), models, [kind], by_name=True)
        except ValueError:
            pass
    # Not chained to pydantic's error: its text shows values, and one of them may be a secret.
    raise refused from None


def _by_field_name(kind: Any, written: dict[Any, Any]) -> dict[Any, Any]:
    """Undo the changes that a model's class makes to the keys of its fields when it writes them."""
    names = {field.serialization_alias: name for name, field in kind.model_fields.items()}
    computed = {name for key, each in kind.model_computed_fields.items() for name in (key, each.alias)}
    return {names.get(key, key): value for key, value in written.items() if key not in computed}


def adapted(hint: Any, found: Contents, arriving: bool) -> Callable[[Any, Own], Any]:
    """Return a function that makes values of a hint, with pydantic alone.

    Args:
        hint: the hint.
        found: the contents of the hint.
        arriving: whether values come from a message; then classes that no message can hold are refused.

    Raises:
        ImportError: pydantic is not installed.
        Exception: pydantic cannot check the hint; the first line of the text says why.
    """
    pydantic = _pydantic()
    # The hint is put in a tuple, since a standard dataclass takes its configuration only from an outer type.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* is not a Python type")  # with only a warning, pydantic would check nothing
        adapter = pydantic.TypeAdapter(tuple[hint], config=pydantic.ConfigDict(arbitrary_types_allowed=True))
        adapter.rebuild(raise_errors=True)  # an undefined name raises only here
    for schema in _schemas(adapter.core_schema):
        _must_be_usable(schema, arriving)

    def convert(value: Any, models: Own) -> Any:
        try:
            return _validated(adapter, (value,), models, found.models, by_name=found.by_name or not arriving)[0]
        except pydantic.ValidationError as error:
            refused = ValueError(_pydantic_words(error, 1))
        raise refused  # outside of `except`, for the reason given in `model_of`

    return convert


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield the parts of a pydantic schema that validate arriving values, except the parts of models.

    The configuration of a model decides what the model may hold.
    """
    if isinstance(schema, dict):
        kind = schema.get("type")
        if isinstance(kind, str):
            yield schema
        if kind == "model":
            return
        for key, each in schema.items():
            if key not in ("metadata", "default", "expected", "python_schema", "strict_schema"):
                yield from _schemas(each)
    elif isinstance(schema, (list, tuple)):
        for each in schema:
            yield from _schemas(each)


def _must_be_usable(schema: dict[str, Any], arriving: bool) -> None:
    if schema["type"] in ("callable", "generator", "is-subclass"):
        raise TypeError(f"a {_NO_VALUES[schema['type']]} is not a value that can be checked")
    if schema["type"] == "is-instance" and arriving:
        kind = schema["cls"]
        np = sys.modules.get("numpy")
        if not can_arrive(kind) or (np is not None and issubclass(kind, np.generic)):
            raise TypeError(f"a message cannot hold a {kind.__module__}.{kind.__qualname__}")


_NO_VALUES = {"callable": "function", "generator": "generator", "is-subclass": "class"}


def _validated(adapter: Any, value: Any, models: Own, kinds: list[Any], *, by_name: bool) -> Any:
    """Validate a value, or a tuple with the value as its only element.

    Args:
        adapter: pydantic's adapter for the hint.
        value: the value.
        models: the parts of the value that were sent as models.
        kinds: the models in the hint.
        by_name: whether field names are accepted as keys even if the class reads only aliases.
    """
    declared = {"by_alias": True, "by_name": True} if by_name else {}
    if not models:
        return _validated_as_declared(adapter, value, declared)
    root = value[0] if isinstance(value, tuple) else value
    # All keys are field names only if the whole value was sent as one model. Otherwise aliases take precedence.
    names = {"by_alias": id(root) not in models, "by_name": True}
    read = _as_read(value, models)
    if id(root) in models and not any(_may_be(kind, read[0] if isinstance(value, tuple) else read) for kind in kinds):
        try:
            return _validated_as_declared(adapter, value, declared)
        except ValueError:
            pass
    try:
        return adapter.validate_python(read, **names)
    except ValueError:
        pass
    try:  # a strict model accepts only an instance for a field that is a dataclass
        return adapter.validate_python(read, strict=False, **names)
    except ValueError as error:
        refused = error
    try:  # the model may be of another class, with values of other types
        return _validated_as_declared(adapter, value, declared)
    except ValueError:
        raise refused from None


def _may_be(kind: Any, read: Any) -> bool:
    """Return whether field names match a class, one of its subclasses, or an older or newer version of it.

    Values of a class with other names, e.g. the sender's names for the same aliases, must not be read by name: a field
    with a default would silently get the default.
    """
    if not isinstance(read, dict) or kind.__pydantic_root_model__:
        return True
    fields = {name for name, field in kind.model_fields.items() if not field.exclude}
    return fields <= read.keys() or read.keys() <= fields


def _validated_as_declared(adapter: Any, value: Any, names: dict[str, Any]) -> Any:
    try:
        return adapter.validate_python(value, **names)
    except ValueError as error:
        text = _json(value)
        if text is None:
            raise
        try:
            return adapter.validate_json(text, **names)
        except ValueError as again:
            # The Python error has the better text, unless it names places where the JSON error has no fault.
            raise (error if _places(error) == _places(again) else again) from None


def _json(value: Any) -> str | None:
    """Return the value as JSON, or None if JSON cannot hold all of it."""
    return json.dumps(value, default=datetime.isoformat) if _is_json(value) else None


def _is_json(value: Any) -> bool:
    kind = type(value)
    if kind in (list, tuple):
        return all(map(_is_json, value))
    if kind is dict:
        return all(type(key) is str for key in value) and all(map(_is_json, value.values()))
    return kind in _IN_JSON


_IN_JSON = frozenset({type(None), bool, int, float, str, datetime})


def _as_read(value: Any, models: Own) -> Any:
    """Replace all models by their read forms."""
    if (found := models.get(id(value))) is not None:
        return found[1]()
    if isinstance(value, dict):
        return {key: _as_read(each, models) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_as_read(each, models) for each in value)
    return value


def _places(error: Any) -> list[Any] | None:
    if not hasattr(error, "errors"):  # a plain ValueError
        return None
    return [each["loc"] for each in error.errors(include_url=False, include_context=False, include_input=False)]


def _pydantic_words(error: Any, skip: int = 0) -> str:
    """Say what does not fit and where, without the values.

    Args:
        error: the error that pydantic raised.
        skip: the number of steps of each place that lie outside of the value.
    """
    try:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
    except AttributeError:  # a plain ValueError from a user's validator
        return str(error)
    places = [(".".join(map(str, each["loc"][skip:])), each["msg"]) for each in faults]
    return "; ".join(f"{where}: {text}" if where else text for where, text in places)

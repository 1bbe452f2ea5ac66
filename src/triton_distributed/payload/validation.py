"""pydantic at work: values against models, and against hints that msgspec cannot check."""

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
    if tuple(map(int, pydantic.VERSION.split(".")[:2])) < (2, 11):  # the first that can be told to read by name
        raise TypeError(f"pydantic 2.11 or newer is needed, and {pydantic.VERSION} is installed")
    return pydantic


def must_be_complete(model: Any) -> None:
    """Check that a model's annotations can be resolved.

    Raises:
        TypeError: one of them cannot, or pydantic is too old.
    """
    _pydantic()
    try:
        model.model_rebuild()
    except Exception as error:  # a name in it that only a type checker knows, or a class inside a function
        text = str(error).partition("\n")[0]
        raise TypeError(f"the model {model.__qualname__} is not complete ({text})") from None


@functools.lru_cache(maxsize=1024)  # more than the models of one program's handlers
def _adapter(kind: Any) -> Any:
    return _pydantic().TypeAdapter(kind)


def model_of(kind: Any, value: Any, models: Own, arriving: bool) -> Any:
    """Make a model of a value.

    Args:
        kind: the model's class.
        value: what arrived, or what a handler answers with.
        models: the parts of it that were sent as models.
        arriving: it is what arrived.

    Raises:
        ValueError: it does not fit; the text says where and why, and shows no values.
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
    # Not chained to pydantic's error, which shows the values in its text: one of them may be a secret.
    raise refused from None


def _by_field_name(kind: Any, written: dict[Any, Any]) -> dict[Any, Any]:
    """Undo what a model's class does to the keys of its own fields when it writes them."""
    names = {field.serialization_alias: name for name, field in kind.model_fields.items()}
    computed = {name for key, each in kind.model_computed_fields.items() for name in (key, each.alias)}
    return {names.get(key, key): value for key, value in written.items() if key not in computed}


def adapted(hint: Any, found: Contents, arriving: bool) -> Callable[[Any, Own], Any]:
    """Return what makes values of a hint, with pydantic alone.

    Args:
        hint: the hint.
        found: what stands in it.
        arriving: values come from a message, so classes that none holds are refused.

    Raises:
        ImportError: pydantic is not installed.
        Exception: pydantic cannot check it; the first line of the text says why.
    """
    pydantic = _pydantic()
    # Inside a tuple, since a dataclass of the standard library takes its configuration only from what holds it.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* is not a Python type")  # pydantic would check nothing
        adapter = pydantic.TypeAdapter(tuple[hint], config=pydantic.ConfigDict(arbitrary_types_allowed=True))
        adapter.rebuild(raise_errors=True)  # a name that is not defined raises only here
    for schema in _schemas(adapter.core_schema):
        _must_be_usable(schema, arriving)

    def convert(value: Any, models: Own) -> Any:
        try:
            return _validated(adapter, (value,), models, found.models, by_name=found.by_name or not arriving)[0]
        except pydantic.ValidationError as error:
            refused = ValueError(_pydantic_words(error, 1))
        raise refused  # outside of `except`, for the reason in `model_of`

    return convert


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield the parts of a schema of pydantic's that see what arrives, without those of models.

    What a model may hold is set by its own configuration.
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
        raise TypeError(f"a {_NO_VALUES[schema['type']]} is no value to check")
    if schema["type"] == "is-instance" and arriving:
        kind = schema["cls"]
        np = sys.modules.get("numpy")
        if not can_arrive(kind) or (np is not None and issubclass(kind, np.generic)):
            raise TypeError(f"no message holds a {kind.__module__}.{kind.__qualname__}")


_NO_VALUES = {"callable": "function", "generator": "generator", "is-subclass": "class"}


def _validated(adapter: Any, value: Any, models: Own, kinds: list[Any], *, by_name: bool) -> Any:
    """Validate a value, or a tuple that holds it.

    Args:
        adapter: pydantic's, of the hint.
        value: the value.
        models: the parts of it that were sent as models.
        kinds: the models in the hint.
        by_name: whether names of fields count as keys also where the class does not read them.
    """
    declared = {"by_alias": True, "by_name": True} if by_name else {}
    if not models:
        return _validated_as_declared(adapter, value, declared)
    root = value[0] if isinstance(value, tuple) else value
    # Only where all of it was sent as one model are all keys names of fields. Else an alias goes first.
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
    try:  # a strict model takes a dataclass in it only as one
        return adapter.validate_python(read, strict=False, **names)
    except ValueError as error:
        refused = error
    try:  # a model of another class, whose values are of other types
        return _validated_as_declared(adapter, value, declared)
    except ValueError:
        raise refused from None


def _may_be(kind: Any, read: Any) -> bool:
    """Whether names of fields are those of a class, of one of its subclasses, or of an older or newer version of it.

    A class with other names, e.g. the sender's own for the same aliases, must not be read by name: a field with a
    default would get it, and nobody would know.
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
            # Python's words are better, unless they speak of places where JSON's do not see a fault.
            raise (error if _places(error) == _places(again) else again) from None


def _json(value: Any) -> str | None:
    """Return JSON that says all that a value is, or None."""
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
    """Put what their classes read in the place of all models."""
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
        error: of pydantic's.
        skip: how many steps of each place lie outside of the value.
    """
    try:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
    except AttributeError:  # a plain ValueError of a user's validator
        return str(error)
    places = [(".".join(map(str, each["loc"][skip:])), each["msg"]) for each in faults]
    return "; ".join(f"{where}: {text}" if where else text for where, text in places)

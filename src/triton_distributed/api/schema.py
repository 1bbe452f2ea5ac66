"""Describes the types of a contract as plain JSON, and compares two descriptions. Pure.

A description is a JSON schema without references, titles, defaults and bounds. Two descriptions fit unless a message
of one side must fail on the other: a field is missing that the receiver requires, a type differs, or a field's name is
spelled in two ways. A new optional field fits, so that workers and clients can be replaced one after the other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from triton_distributed.payload.annotations import checks_nothing

Schema = Mapping[str, Any]

_KEPT = ("type", "enum", "const", "required", "additionalProperties", "format")
_ALIKE = 0.75  # The similarity from which two field names are spellings of one name; see difflib.


def schema_of(hint: Any) -> Schema:
    """Describe a type. `Any`, and a type that neither msgspec nor pydantic can describe, give an empty description.

    Args:
        hint: a resolved annotation.
    """
    if checks_nothing(hint):
        return {}
    try:
        (schema,), components = msgspec.json.schema_components((hint,), schema_hook=_described)
        return _plain(schema, components, ())
    except (TypeError, NameError):
        pass
    pydantic = sys.modules.get("pydantic")
    try:
        return {} if pydantic is None else _of_pydantic(pydantic.TypeAdapter(hint).json_schema)
    except Exception:  # pydantic has many error classes for hints that it cannot describe.
        return {}


def _described(kind: type) -> dict[str, Any]:
    """Describe a class that msgspec does not know."""
    if hasattr(kind, "model_json_schema"):
        return dict(_of_pydantic(kind.model_json_schema))
    return {"type": f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"}


def _of_pydantic(make: Callable[[], dict[str, Any]]) -> Schema:
    schema = make()
    return _plain(schema, schema.get("$defs", {}), ())


def _plain(schema: Schema, components: Schema, inside: tuple[str, ...]) -> dict[str, Any]:
    """Resolve references, and keep what decides whether a value fits. A recursive reference stays as its name."""
    reference = schema.get("$ref")
    if reference is not None:
        name = reference.rpartition("/")[2]
        if name in inside or name not in components:
            return {"$ref": name}
        return _plain(components[name], components, (*inside, name))
    found: dict[str, Any] = {each: schema[each] for each in _KEPT if each in schema}
    if isinstance(extra := found.get("additionalProperties"), Mapping):
        found["additionalProperties"] = _plain(extra, components, inside)
    if "const" in found:
        found["enum"] = [found.pop("const")]
    if properties := schema.get("properties"):
        found["properties"] = {name: _plain(each, components, inside) for name, each in properties.items()}
    for key in ("items", "prefixItems", "anyOf", "allOf"):
        inner = schema.get(key)
        if isinstance(inner, Mapping):
            found[key] = _plain(inner, components, inside)
        elif isinstance(inner, list):
            found[key] = [_plain(each, components, inside) for each in inner]
    if len(found.get("allOf", ())) == 1:
        found = {**found.pop("allOf")[0], **found}
    if "oneOf" in schema:
        found["anyOf"] = [_plain(each, components, inside) for each in schema["oneOf"]]
    return found


def differences(ours: Schema, theirs: Schema) -> list[str]:
    """The differences between the caller's contract and the worker's that make calls fail; empty if they fit.

    Args:
        ours: the schema of the caller's contract.
        theirs: the schema of the worker's contract.
    """
    if ours["kind"] != theirs["kind"]:
        return [f"this process calls it as {ours['kind']}, and the worker serves it as {theirs['kind']}"]
    request = _misfits(ours["request"], theirs["request"], "request", "this process", "the worker")
    answer = _misfits(theirs["answer"], ours["answer"], "answer", "the worker", "this process")
    return [*request, *answer]


def _misfits(sent: Schema, taken: Schema, path: str, sender: str, receiver: str) -> Iterator[str]:
    if not sent or not taken or "$ref" in sent or "$ref" in taken:
        return
    found: list[str] = []
    for one in _variants(sent):
        for other in _variants(taken):
            if not one or not other:
                return
            if not (_types(one) | _wider(one)).isdisjoint(_types(other)):
                found = list(_inner(one, other, path, sender, receiver))
                if not found:
                    return
    yield from found or [f"{path}: {sender} sends {_name(sent)}, and {receiver} takes {_name(taken)}"]


def _inner(sent: Schema, taken: Schema, path: str, sender: str, receiver: str) -> Iterator[str]:
    """The differences between two descriptions of one basic type."""
    if "enum" in sent and "enum" in taken and not set(map(repr, sent["enum"])) & set(map(repr, taken["enum"])):
        yield f"{path}: {sender} sends one of {sent['enum']}, and {receiver} takes one of {taken['enum']}"
    if "items" in sent and "items" in taken and isinstance(sent["items"], Mapping):
        yield from _misfits(sent["items"], taken["items"], f"{path}[…]", sender, receiver)
    if "properties" not in sent or "properties" not in taken:
        return
    has, wants = sent["properties"], taken["properties"]
    unknown = [each for each in has if each not in wants]
    for name, inner in wants.items():
        if name in has:
            yield from _misfits(has[name], inner, f"{path}.{name}", sender, receiver)
            continue
        import difflib  # few programs come here

        close = difflib.get_close_matches(name, unknown, 1, _ALIKE)
        if close:
            yield f"{path}: {sender} calls a field {close[0]!r}, and {receiver} calls it {name!r}"
        elif name in taken.get("required", ()):
            yield f"{path}.{name}: {receiver} requires this field, and {sender} does not send it"
    if taken.get("additionalProperties") is False:
        for name in unknown:
            yield f"{path}.{name}: {sender} sends this field, and {receiver} forbids fields that it does not know"


def _variants(schema: Schema) -> list[Schema]:
    return [inner for each in schema["anyOf"] for inner in _variants(each)] if "anyOf" in schema else [schema]


def _types(schema: Schema) -> set[str]:
    """The basic types of a description."""
    kind = schema.get("type", "")
    found = {kind} if isinstance(kind, str) else set(kind)
    if not kind and "enum" in schema:
        found = {_JSON.get(type(each), "object") for each in schema["enum"]}
    return found


def _wider(schema: Schema) -> set[str]:
    """Further types that take values of this description: an integer is also a number."""
    return {"number"} if "integer" in _types(schema) else set()


_JSON: dict[type, str] = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def _name(schema: Schema) -> str:
    """A description in a few words."""
    variants = _variants(schema)
    if len(variants) > 1:
        return " or ".join(dict.fromkeys(map(_name, variants)))
    kind = str(schema.get("type", "another type"))
    if kind == "array" and isinstance(schema.get("items"), Mapping) and schema["items"]:
        return f"array of {_name(schema['items'])}"
    if kind == "string" and "format" in schema:
        return f"string ({schema['format']})"
    return kind

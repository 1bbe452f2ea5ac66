"""The types of a published contract as text, in Python's notation. Pure.

A contract is published as the plain JSON of `api.schema`. Parts that this version does not know become `Any`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

BASIC = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None", "object": "dict"}


def contract_lines(contract: Mapping[str, Any]) -> Iterator[str]:
    """Describe a contract: its kind and types, then a line for each class with its fields."""
    request, answer = (_part(contract, name) for name in ("request", "answer"))
    yield f"{contract.get('kind', '?')}: {type_text(request)} -> {type_text(answer)}"
    classes = {**_classes(request), **_classes(answer)}
    for name, fields in sorted(classes.items()):
        yield f"{name}: {fields}"


def _part(contract: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = contract.get(name)
    return found if isinstance(found, Mapping) else {}


def _classes(schema: Mapping[str, Any]) -> dict[str, str]:
    return {_short(name): _fields(each) for name, each in _part(schema, "$defs").items() if isinstance(each, Mapping)}


def _fields(schema: Mapping[str, Any]) -> str:
    """The fields of a class; one with a default has a question mark."""
    properties = _part(schema, "properties")
    if not properties:
        return type_text(schema)
    required = schema.get("required")
    needed = required if isinstance(required, list | tuple) else list(properties)
    return ", ".join(f"{name}{'' if name in needed else '?'}: {type_text(each)}" for name, each in properties.items())


def type_text(schema: Any) -> str:
    """Describe one type, e.g. `list[int] | None`."""
    if not isinstance(schema, Mapping):
        return "Any"
    if isinstance(name := schema.get("$ref"), str):
        return _short(name)
    if isinstance(values := schema.get("enum"), list | tuple):
        return f"Literal[{', '.join(map(repr, values))}]"
    if isinstance(kinds := schema.get("anyOf"), list | tuple):
        return " | ".join(dict.fromkeys(map(type_text, kinds)))
    kind = schema.get("type")
    if isinstance(kind, list | tuple):
        return " | ".join(BASIC.get(str(each), str(each)) for each in kind)
    if kind == "array":
        parts = schema.get("prefixItems")
        if isinstance(parts, list | tuple):
            return f"tuple[{', '.join(map(type_text, parts))}]"
        return f"list[{type_text(schema['items'])}]" if "items" in schema else "list"
    if kind == "object" and _part(schema, "properties"):
        return f"{{{_fields(schema)}}}"
    if kind == "object" and _part(schema, "additionalProperties"):
        return f"dict[str, {type_text(schema['additionalProperties'])}]"
    return BASIC.get(kind, kind) if isinstance(kind, str) else "Any"


def _short(name: str) -> str:
    """A class's name without the label that distinguishes the classes of several models."""
    return name.rpartition(".")[2]

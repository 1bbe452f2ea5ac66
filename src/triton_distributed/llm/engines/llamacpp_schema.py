"""JSON schemas for llama.cpp: whether it can hold an answer to one, and what it cannot hold. Pure.

llama.cpp is built with llguidance here. If that refuses a schema, llama.cpp logs it and answers with free text. So a
new schema is tried first: a text that the model would not write by itself is put before it in the grammar.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

__all__: list[str] = []

NATIVE = "%llguidance"
"""How a grammar begins that is not GBNF."""

MARK = "~~"
"""Answers under the grammar of `trial` begin with it."""

_TYPES = frozenset(("array", "boolean", "integer", "null", "number", "object", "string"))
_FORMATS = frozenset(("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "unknown", "uuid"))
_NOT_HELD = frozenset(
    (
        *("contains", "maxContains", "maxProperties", "minContains", "minProperties", "not", "propertyNames"),
        *("dependencies", "dependentRequired", "dependentSchemas", "else", "if", "then", "uniqueItems"),
        *("$dynamicRef", "$recursiveRef", "unevaluatedItems", "unevaluatedProperties"),
    )
)
_NAMED = frozenset(("$defs", "definitions", "dependentSchemas", "patternProperties", "properties"))
_VALUES = frozenset(("const", "default", "enum", "example", "examples", "required", "dependentRequired"))


def trial(schema: dict[str, Any]) -> str:
    """Return a grammar whose texts are `MARK` and JSON of a schema."""
    return f"{NATIVE} {{}}\nstart: {json.dumps(MARK)} %json {json.dumps(schema)}"


def not_held(schema: Any) -> list[str]:
    """Return what llama.cpp cannot hold in a schema, e.g. `uniqueItems` or `format "uri"`, in order and once each."""
    return list(dict.fromkeys(_not_held(schema)))


def _not_held(schema: Any) -> Iterator[str]:
    if isinstance(schema, list):
        for each in schema:
            yield from _not_held(each)
    if not isinstance(schema, dict):
        return
    types = schema.get("type", [])
    for each in types if isinstance(types, list) else [types]:
        if not isinstance(each, str) or each not in _TYPES:
            yield f"type {json.dumps(each)}"
    if isinstance(form := schema.get("format", "date"), str) and form not in _FORMATS:
        yield f"format {json.dumps(form)}"
    for name, value in schema.items():
        if name in _NOT_HELD and value is not False:
            yield name
        elif name in _NAMED and isinstance(value, dict):
            for each in value.values():
                yield from _not_held(each)
        elif name not in _VALUES:
            yield from _not_held(value)

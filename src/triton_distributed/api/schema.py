"""Describes the types of a contract as plain JSON, and compares two descriptions. Pure.

A description is a JSON schema without titles, defaults and bounds. Two descriptions fit unless a message of one side
must fail on the other: a field is missing that the receiver requires, a type differs, or a field's name is spelled in
two ways. A new optional field fits, so that workers and clients can be replaced one after the other. In doubt they fit,
because values are checked when they arrive.

A pydantic model is described by the names of its fields; `names` has their aliases. What a model writes may differ from
what it reads, for example by computed fields. Then a second description says what is sent.
"""

from __future__ import annotations

import collections.abc
import functools
import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from triton_distributed.payload.annotations import checks_nothing
from triton_distributed.payload.leaf_types import is_made_from_text

Schema = Mapping[str, Any]

_KEPT = ("type", "enum", "const", "required", "additionalProperties", "format")
_ALIKE = 0.82  # The similarity from which two field names are spellings of one name; see difflib.
_NAMES = "x-names"  # The aliases of a field, in the schemas that pydantic makes for this module.


# ---- describing -------------------------------------------------------------------------------------------------


def described(request: Any, answer: Any) -> dict[str, Any]:
    """Describe the types of a contract.

    Args:
        request, answer: resolved annotations.

    Returns:
        The descriptions `request` and `answer`; also `request_sent` and `answer_sent` where values are sent in another
        form than they are read.
    """
    found: dict[str, Any] = {}
    for name, hint in (("request", request), ("answer", answer)):
        found[name] = schema_of(hint)
        sent = schema_of(hint, "serialization")
        if sent != _without_required(found[name]):
            found[f"{name}_sent"] = sent
    return found


def schema_of(hint: Any, mode: str = "validation") -> Schema:
    """Describe a type. `Any`, and a type that neither msgspec nor pydantic can describe, give an empty description.

    Args:
        hint: a resolved annotation.
        mode: `validation` for the values that are read, `serialization` for those that are sent.
    """
    if checks_nothing(hint):
        return {}
    try:
        describer = _Describer(mode)
        (schema,), components = msgspec.json.schema_components((hint,), schema_hook=describer.other)
        return describer.whole(schema, components)
    except Exception:  # Code of pydantic and of users runs in the hook. A type without a description is not compared.
        pass
    try:
        describer = _Describer(mode)
        return {} if "pydantic" not in sys.modules else describer.whole(describer.of_pydantic(hint), {})
    except Exception:  # The same: pydantic has many classes of errors for what it cannot describe.
        return {}


class _Describer:
    """Makes one description. Each class is in it once, so a description is never larger than the classes' code."""

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._schemas = 0
        self._found: dict[str, Schema] = {}  # The schemas of classes.
        self._defs: dict[str, Schema] = {}  # Their descriptions.

    def other(self, kind: Any) -> dict[str, Any]:
        """Describe a class that msgspec does not know."""
        if hasattr(kind, "model_json_schema"):
            return self.of_pydantic(kind)
        if is_made_from_text(kind):
            return {"type": "string"}
        np = sys.modules.get("numpy")
        if np is not None and issubclass(kind, np.generic):
            return _scalar(np, kind)
        if np is not None and issubclass(kind, np.ndarray):
            return {"type": "numpy.ndarray"}
        if kind.__module__ == "collections":
            return {"type": "object" if issubclass(kind, collections.abc.Mapping) else "array"}
        return {"type": f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"}

    def of_pydantic(self, hint: Any) -> dict[str, Any]:
        """The schema of a type that pydantic describes. Its references get names that no other schema has."""
        adapter = sys.modules["pydantic"].TypeAdapter(hint)
        schema = adapter.json_schema(by_alias=False, mode=self._mode, schema_generator=_generator())
        self._schemas += 1
        label = f"{self._schemas}."
        self._found |= {label + name: _relabelled(each, label) for name, each in schema.pop("$defs", {}).items()}
        return _relabelled(schema, label)  # type: ignore[no-any-return]

    def whole(self, schema: Schema, components: Schema) -> Schema:
        """The description, with those of its classes under `$defs`."""
        self._found |= components
        found = self._plain(schema)
        found = {**found, "$defs": self._defs} if self._defs else found
        return found if self._mode == "validation" else _without_required(found)

    def _plain(self, schema: Schema) -> dict[str, Any]:
        """Keep what decides whether a value fits."""
        if "$ref" in schema:
            name = schema["$ref"].removeprefix("#/$defs/")
            if name not in self._defs and name in self._found:
                self._defs[name] = {}  # For a class that contains itself.
                self._defs[name] = self._plain(self._found[name])
            return {"$ref": name}
        found: dict[str, Any] = {each: schema[each] for each in _KEPT if each in schema}
        if isinstance(extra := found.get("additionalProperties"), Mapping):
            found["additionalProperties"] = self._plain(extra)
        if "const" in found:
            found["enum"] = [found.pop("const")]
        if properties := schema.get("properties"):
            found["properties"] = {name: self._plain(each) for name, each in properties.items()}
            names = {other: name for name, each in properties.items() for other in each.get(_NAMES, ())}
            if names:
                found["names"] = names
        for key in ("items", "prefixItems", "anyOf", "allOf"):
            inner = schema.get(key)
            if isinstance(inner, Mapping):
                found[key] = self._plain(inner)
            elif isinstance(inner, list):
                found[key] = [self._plain(each) for each in inner]
        if len(found.get("allOf", ())) == 1:
            found = {**found.pop("allOf")[0], **found}
        if "oneOf" in schema:
            found["anyOf"] = [self._plain(each) for each in schema["oneOf"]]
        return found


def _scalar(np: Any, kind: Any) -> dict[str, Any]:
    for basic, name in ((np.integer, "integer"), (np.floating, "number"), (np.bool_, "boolean")):
        if issubclass(kind, basic):
            return {"type": name}
    return {}


def _relabelled(schema: Any, label: str) -> Any:
    """A schema of pydantic's with a label before the names of its references."""
    if isinstance(schema, list):
        return [_relabelled(each, label) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _relabelled(each, label) for key, each in schema.items()}
    if isinstance(name := schema.get("$ref"), str):
        found["$ref"] = label + name.removeprefix("#/$defs/")
    return found


def _without_required(schema: Any) -> Any:
    """A description without the lists of required fields."""
    if isinstance(schema, list):
        return [_without_required(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    required = isinstance(schema.get("required"), (list, tuple))
    return {key: _without_required(each) for key, each in schema.items() if key != "required" or not required}


@functools.cache
def _generator() -> Any:
    """pydantic's generator of schemas. This one notes aliases, and leaves out what it cannot describe."""
    from pydantic.json_schema import GenerateJsonSchema

    class Generator(GenerateJsonSchema):
        def model_field_schema(self, schema: Any) -> Any:
            found = super().model_field_schema(schema)
            if self.mode == "serialization":
                names = [schema.get("serialization_alias")]
            else:
                alias = schema.get("validation_alias")
                paths = alias if isinstance(alias, list) else [alias]
                paths = paths if not paths or isinstance(paths[0], list) else [paths]
                if any(len(each) > 1 for each in paths):
                    found = {}  # The value is inside of another one.
                names = [each[0] for each in paths]
            names = [each for each in names if isinstance(each, str)]
            return {**found, _NAMES: names} if names else found

        def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> Any:
            return {}

        def emit_warning(self, kind: Any, detail: str) -> None:
            pass

    return Generator


# ---- comparing --------------------------------------------------------------------------------------------------


def differences(ours: Schema, theirs: Schema) -> list[str]:
    """The differences between the caller's contract and the worker's that make calls fail; empty if they fit.

    Args:
        ours: the schema of the caller's contract.
        theirs: the schema of the worker's contract.
    """
    if ours["kind"] != theirs["kind"]:
        return [f"this process calls it as {ours['kind']}, and the worker serves it as {theirs['kind']}"]
    request = _between(ours, theirs, "request", "this process", "the worker")
    return request + _between(theirs, ours, "answer", "the worker", "this process")


def ignored(ours: Schema, theirs: Schema) -> list[str]:
    """The fields of a request that this process sends and the worker does not know, and those of an answer likewise."""
    found = []
    for place, sender, receiver, words in (
        ("request", ours, theirs, "this process sends it, and the worker ignores it"),
        ("answer", theirs, ours, "the worker sends it, and this process ignores it"),
    ):
        takes = [each for _, each in _variants(receiver[place], receiver[place])]
        objects = [each for each in takes if not _types(each).isdisjoint(("object",))]
        if not all(map(_types, takes)) or not objects or not all(each.get("properties") for each in objects):
            continue  # It takes any fields, or none.
        known = {name for each in objects for name in (*each["properties"], *each.get("names", ()))}
        for _, sent in _variants(sender[place], sender[place]):
            others = {*known, *sent.get("names", {}).values()}
            found += [f"{place}.{each}: {words}" for each in sent.get("properties", ()) if each not in others]
    return found


def _between(sender: Schema, receiver: Schema, place: str, sends: str, takes: str) -> list[str]:
    found = _Comparison(sender[place], receiver[place], sends, takes).result(place)
    if found and f"{place}_sent" in sender:
        found = _Comparison(sender[f"{place}_sent"], receiver[place], sends, takes).result(place)
    return found


Named = tuple[str | None, Schema]
"""The name of a class, or None, and a description."""


class _Comparison:
    """Compares what one side sends with what the other takes."""

    def __init__(self, sent: Schema, taken: Schema, sender: str, receiver: str) -> None:
        self._sent, self._taken = sent, taken
        self._sender, self._receiver = sender, receiver
        self._known: dict[tuple[str, str], list[str]] = {}  # The results for pairs of classes.

    def result(self, path: str) -> list[str]:
        return self._misfits(self._sent, self._taken, path)

    def _misfits(self, sent: Schema, taken: Schema, path: str) -> list[str]:
        found: list[str] = []
        for one in _variants(sent, self._sent):
            for other in _variants(taken, self._taken):
                if not (types := _types(one[1])) or not (others := _types(other[1])):
                    return []
                if "integer" in types:
                    types.add("number")
                if other[1].get("format") == "decimal":
                    others |= {"number", "integer"}
                if not types.isdisjoint(others):
                    found = self._inner(one, other, path)
                    if not found:
                        return []
        if found:
            return found
        names = _name(sent, self._sent), _name(taken, self._taken)
        return [f"{path}: {self._sender} sends {names[0]}, and {self._receiver} takes {names[1]}"]

    def _inner(self, sent: Named, taken: Named, path: str) -> list[str]:
        """The differences between two descriptions of one basic type."""
        if sent[0] is None or taken[0] is None:
            return self._fields(sent[1], taken[1], path)
        pair = sent[0], taken[0]
        if (found := self._known.get(pair)) is None:
            self._known[pair] = []  # For classes that contain themselves.
            found = self._known[pair] = self._fields(sent[1], taken[1], path)
        return found

    def _fields(self, sent: Schema, taken: Schema, path: str) -> list[str]:
        if "enum" in sent and "enum" in taken and not any(each in taken["enum"] for each in sent["enum"]):
            what = f"one of {sent['enum']}, and {self._receiver} takes one of {taken['enum']}"
            return [f"{path}: {self._sender} sends {what}"]
        if isinstance(sent.get("items"), Mapping) and isinstance(taken.get("items"), Mapping):
            return self._misfits(sent["items"], taken["items"], f"{path}[…]")
        has, wants = sent.get("properties"), taken.get("properties")
        if not has or not wants:
            return []
        sent_as = {**sent.get("names", {}), **{name: name for name in has}}
        taken_as = {**taken.get("names", {}), **{name: name for name in wants}}
        pairs = {taken_as[each]: sent_as[each] for each in taken_as if each in sent_as}
        unknown = [each for each in has if each not in pairs.values()]
        found: list[str] = []

        def fits(name: str, inner: Schema) -> bool:
            return not self._misfits(has[name], inner, "")

        for name, inner in wants.items():
            if name in pairs:
                found += self._misfits(has[pairs[name]], inner, f"{path}.{name}")
            elif close := next((each for each in unknown if _alike(each, name) and fits(each, inner)), ""):
                found.append(f"{path}: {self._sender} calls a field {close!r}, and {self._receiver} calls it {name!r}")
            elif name in taken.get("required", ()) and len(inner.get("enum", ())) != 1:  # A tag may be left out.
                found.append(
                    f"{path}.{name}: {self._receiver} requires this field, and {self._sender} does not send it"
                )
        if taken.get("additionalProperties") is False:
            # A field that is not required may be one that is sent only if it is set.
            words = f"{self._sender} sends this field, and {self._receiver} forbids fields that it does not know"
            found += [f"{path}.{each}: {words}" for each in unknown if each in sent.get("required", ())]
        return found


def _alike(one: str, other: str) -> bool:
    """Whether two names are spellings of one name. `top_k` and `top_p`, or `image_1` and `image_2`, are not."""
    if one[:-1] == other[:-1]:
        return False
    import difflib  # Few programs come here.

    return difflib.SequenceMatcher(None, one, other).ratio() >= _ALIKE


def _variants(schema: Schema, whole: Schema, inside: tuple[str, ...] = ()) -> list[Named]:
    """The members of a union, without references."""
    name = schema.get("$ref")
    if name is not None:
        if name in inside:
            return []
        inside = (*inside, name)
        schema = whole.get("$defs", {}).get(name, {})
    if "$ref" in schema:
        return _variants(schema, whole, inside)
    if "anyOf" not in schema:
        return [(name, schema)]
    return [inner for each in schema["anyOf"] for inner in _variants(each, whole, inside)]


def _types(schema: Schema) -> set[str]:
    """The basic types of a description; empty if they are not known."""
    kind = schema.get("type", "")
    if kind:
        return {kind} if isinstance(kind, str) else set(kind)
    return {_JSON.get(type(each), "object") for each in schema.get("enum", ())}


_JSON: dict[type, str] = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def _name(schema: Schema, whole: Schema) -> str:
    """A description in a few words."""
    variants = _variants(schema, whole)
    if len(variants) > 1:
        return " or ".join(dict.fromkeys(_name(each, whole) for _, each in variants))
    plain = variants[0][1] if variants else {}
    kind = str(plain.get("type") or " or ".join(sorted(_types(plain))) or "another type")
    if kind == "array" and isinstance(plain.get("items"), Mapping) and plain["items"]:
        return f"array of {_name(plain['items'], whole)}"
    if kind == "string" and "format" in plain:
        return f"string ({plain['format']})"
    return kind

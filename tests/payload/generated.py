"""Classes and instances that Hypothesis makes up: fields of each type that travels, in containers, with each option."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import ipaddress
import pathlib
import re
import types
import uuid
import zoneinfo
from typing import Any, Literal

import msgspec
import pydantic
from hypothesis import strategies as st


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Corner(enum.Enum):
    TOP = (0, 1)
    LEFT = (1.5, 0)


class Cat(pydantic.BaseModel):
    lives: int


class Dog(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    id: uuid.UUID = pydantic.Field(alias="dogId")


class WithComputed(pydantic.BaseModel):
    prefix: str

    @pydantic.computed_field(alias="computedTwice")  # type: ignore[prop-decorator]
    @property
    def twice(self) -> str:
        return self.prefix * 2


@dataclasses.dataclass
class Point:
    x: int
    at: datetime.date


of = types.GenericAlias  # `of(list, hint)` is `list[hint]`; a type checker takes no variable in the brackets

Typed = tuple[Any, st.SearchStrategy[Any]]
"""An annotation, and values of it."""

text = st.text(max_size=4)
offsets = st.none() | st.integers(-12, 12).map(lambda hours: datetime.timezone(datetime.timedelta(hours=hours)))
cats = st.builds(Cat, lives=st.integers(0, 9))
dogs = st.builds(Dog, dogId=st.uuids())

PLAIN: list[Typed] = [
    (int, st.integers(-(2**63), 2**63)),
    (float, st.floats(allow_nan=False)),
    (str, text),
    (bool, st.booleans()),
    (bytes, st.binary(max_size=6)),
    (uuid.UUID, st.uuids()),
    (decimal.Decimal, st.decimals(allow_nan=False, allow_infinity=False, places=3)),
    (datetime.date, st.dates()),
    (datetime.time, st.times(timezones=offsets)),
    (datetime.timedelta, st.timedeltas()),
    (datetime.datetime, st.datetimes(datetime.datetime(1900, 1, 1), datetime.datetime(2200, 1, 1), timezones=offsets)),  # type: ignore[arg-type]
    (Colour, st.sampled_from(Colour)),
    (Level, st.sampled_from(Level)),
    (Literal["a", "b"], st.sampled_from(["a", "b"])),
    (pathlib.Path, text.map(lambda each: pathlib.Path("/tmp", each.replace("\0", "")))),
    (ipaddress.IPv4Address, st.ip_addresses(v=4)),
    (ipaddress.IPv6Address, st.ip_addresses(v=6)),
    (ipaddress.IPv4Interface, st.ip_addresses(v=4).map(lambda each: ipaddress.IPv4Interface(f"{each}/24"))),
    (ipaddress.IPv6Network, st.just(ipaddress.IPv6Network("2001:db8::/32"))),
    (fractions.Fraction, st.fractions(max_denominator=100)),
    (zoneinfo.ZoneInfo, st.just(zoneinfo.ZoneInfo("UTC"))),
    (re.Pattern[str], st.sampled_from(["a+", "(?i)b"]).map(re.compile)),
    (Cat, cats),
    (Dog, dogs),
    (Point, st.builds(Point, x=st.integers(0, 9), at=st.dates())),
]
PYDANTIC: list[Typed] = [
    *PLAIN,
    (pydantic.SecretStr, text.map(pydantic.SecretStr)),
    (pydantic.SecretBytes, st.binary(max_size=4).map(pydantic.SecretBytes)),
    (pydantic.HttpUrl, st.sampled_from(["a", "b/p?q=1", "u:p@c:80/x"]).map(lambda x: pydantic.HttpUrl(f"http://{x}"))),
    (pydantic.AnyUrl, st.just(pydantic.AnyUrl("ftp://a/b"))),
    (pydantic.PostgresDsn, st.just(pydantic.PostgresDsn("postgres://u:p@a,b:1/db"))),
    (pydantic.IPvAnyAddress, st.ip_addresses()),
    (pydantic.ByteSize, st.integers(0, 2**40).map(pydantic.ByteSize)),
    (pydantic.PositiveInt, st.integers(1, 9)),
    (Cat | Dog, cats | dogs),
]
MODEL: list[Typed] = [
    *PYDANTIC,
    (Corner, st.sampled_from(Corner)),
    (pydantic.Json[list[int]], st.lists(st.integers(0, 9), max_size=3)),
    (pydantic.Base64Bytes, st.binary(max_size=6)),
    (Any, st.recursive(st.none() | text | st.uuids() | st.dates(), lambda each: st.tuples(each) | st.lists(each))),
]

_IS_TEXT = re.compile("Fraction|ZoneInfo|Pattern")  # they arrive as text beside text
_NOT_HASHABLE = re.compile(r"Cat|Dog|Point|Json|Any|list|dict|deque|(?<!frozen)set\[")


@st.composite
def field_types(draw: Any, leaves: list[Typed], more: list[str], depth: int = 2) -> Typed:
    """A field's annotation, and a strategy for its values.

    Args:
        leaves: what stands innermost.
        more: shapes beside those that every class can have.
        depth: most containers inside each other.
    """
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(leaves))  # type: ignore[no-any-return]
    hint, values = draw(field_types(leaves, more, depth - 1))
    shapes = ["list", "dict", "tuple", "optional", "pair", *more]
    if _IS_TEXT.search(str(hint)):
        shapes = [each for each in shapes if "text" not in each]
    shapes += [] if _NOT_HASHABLE.search(str(hint)) else ["set", "frozenset", "keys"]
    few: dict[str, Any] = {"max_size": 3}
    return {
        "list": lambda: (of(list, hint), st.lists(values, **few)),
        "dict": lambda: (of(dict, (str, hint)), st.dictionaries(text, values, **few)),
        "tuple": lambda: (of(tuple, (hint, ...)), st.lists(values, **few).map(tuple)),
        "optional": lambda: (hint | None if hint is not Any else Any, st.none() | values),
        "pair": lambda: (of(tuple, (hint, str)), st.tuples(values, text)),
        "deque": lambda: (of(collections.deque, hint), st.lists(values, **few).map(collections.deque)),
        "or text": lambda: (hint | str if hint is not Any else Any, values | text),
        "text or": lambda: (str | hint if hint is not Any else Any, values | text),
        "set": lambda: (of(set, hint), st.sets(values, **few)),
        "frozenset": lambda: (of(frozenset, hint), st.frozensets(values, **few)),
        "keys": lambda: (of(dict, (hint, int)), st.dictionaries(values, st.integers(0, 9), **few)),
    }[draw(st.sampled_from(shapes))]()


names = st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True)


@st.composite
def models(draw: Any) -> Any:
    """An instance of a pydantic model that was made up with it."""
    fields: dict[str, Any] = {}
    values: dict[str, Any] = {"prefix": "p"}
    for name in draw(names):
        hint, strategy = draw(field_types(MODEL, ["deque", "or text", "text or"]))
        options: dict[str, Any] = draw(
            st.sampled_from(
                [
                    {},
                    {},
                    {"alias": f"{name}Alias"},
                    {"validation_alias": draw(st.sampled_from("abcdx"))},  # may be the name of another field
                    {"serialization_alias": f"{name}Out"},
                    {"validation_alias": f"{name}In", "serialization_alias": f"{name}Out"},
                    {"validation_alias": pydantic.AliasChoices(f"{name}1", f"{name}2")},
                    {"validation_alias": pydantic.AliasPath(f"{name}Path", 0)},
                ]
            )
        )
        if hint is not Any and draw(st.booleans()):
            hint, options = hint | None, {**options, "default": None}
        fields[name] = (hint, pydantic.Field(**options))
        values[name] = draw(strategy)
    config = pydantic.ConfigDict(
        strict=draw(st.booleans()),
        extra=draw(st.sampled_from(["ignore", "forbid", "allow"])),
        validate_by_name=draw(st.booleans()),
        frozen=draw(st.booleans()),
        alias_generator=draw(st.sampled_from([None, None, str.upper])),
    )
    kind: Any = pydantic.create_model("Generated", __config__=config, **fields)
    if draw(st.booleans()):
        kind = type("Generated", (WithComputed, kind), {})
    model = kind.model_construct()
    model.__dict__.clear()  # by field name, past all aliases
    model.__dict__.update({name: values[name] for name in kind.model_fields})
    if model.__pydantic_extra__ is not None:
        model.__pydantic_extra__["more"] = (1, {"of": uuid.UUID(int=1)})
    return model


@st.composite
def records(draw: Any) -> Any:
    """An instance of a dataclass, a Struct or a NamedTuple that was made up with it."""
    shape = draw(st.sampled_from(["dataclass", "slots", "Struct", "renamed", "array", "NamedTuple"]))
    pydantic_checks = shape in ("dataclass", "slots") and draw(st.booleans())
    leaves = PYDANTIC if pydantic_checks else PLAIN[:-4] + PLAIN[-3:]  # without a Pattern, which only pydantic makes
    typed = {name: draw(field_types(leaves, ["deque"] if pydantic_checks else [])) for name in draw(names)}
    fields = [(name, hint) for name, (hint, _) in typed.items()]
    values = {name: draw(strategy) for name, (_, strategy) in typed.items()}
    if shape in ("dataclass", "slots"):
        kind: Any = dataclasses.make_dataclass("Generated", fields, slots=shape == "slots", kw_only=shape == "slots")
    elif shape == "NamedTuple":
        kind = collections.namedtuple("Generated", typed)  # type: ignore[misc, no-redef]
        kind.__annotations__ = dict(fields)
    else:
        kind = msgspec.defstruct(
            "Generated", fields, rename="camel" if shape == "renamed" else None, array_like=shape == "array", tag=True
        )
    return kind(**values)

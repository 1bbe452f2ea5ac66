"""All fields of a dataclass and of an attrs object travel, also those that its instances do not hold themselves."""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any, ClassVar

import attrs
import msgspec
import pydantic
import pydantic.dataclasses
import pytest

from tests.payload.test_codec import BIG, both_ways_in, travel
from triton_distributed.payload.codec import decode, encode
from triton_distributed.payload.fields import has_skipped_field
from triton_distributed.payload.typed import typed_decoder

__all__ = ["both_ways_in"]  # each test runs with and without memory that is looked for first


@dataclasses.dataclass
class NotInInit:
    x: int
    y: Any = dataclasses.field(init=False, default=3)
    z: Any = dataclasses.field(init=False, default_factory=list)


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: int
    y: Any = dataclasses.field(init=False, default=3)


@dataclasses.dataclass(slots=True, kw_only=True)
class Slots:
    x: int
    y: Any = dataclasses.field(init=False, default=3)


@dataclasses.dataclass(slots=True)
class SlotsOverDict(NotInInit):
    w: int = 4


@dataclasses.dataclass
class HandSlots:
    __slots__ = ("x",)
    x: int
    y: ClassVar[int] = 5


@dataclasses.dataclass(init=False)
class OwnInit:
    x: int
    y: int = 3

    def __init__(self, x: int) -> None:
        self.x = x


class OwnInitBelow(NotInInit):
    def __init__(self, x: int) -> None:
        self.x = x
        self.z = []


@dataclasses.dataclass
class Extra:
    """As many attributes as fields, and not the same."""

    x: int
    y: int = dataclasses.field(init=False, default=3)

    def __post_init__(self) -> None:
        self.unlisted = 5

    @functools.cached_property
    def computed(self) -> int:
        return 6


@dataclasses.dataclass
class InitOnly:
    x: int
    seed: dataclasses.InitVar[int] = 3
    y: int = dataclasses.field(init=False, default=3)

    def __post_init__(self, seed: int) -> None:
        self.x += seed


@dataclasses.dataclass
class Underscored:
    _x: int = 1
    __y: int = dataclasses.field(init=False, default=3)


class Remembered:
    """A descriptor that is no field of the instance's `__dict__` either."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_kept_{name}"

    def __get__(self, instance: Any, owner: type) -> Any:
        return 3 if instance is None else getattr(instance, self.name)

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance, self.name, value)


@dataclasses.dataclass
class Described:
    x: int
    y: Any = Remembered()
    z: int = dataclasses.field(init=False, default=3)


@pydantic.dataclasses.dataclass
class Validated:
    x: int
    y: int = pydantic.Field(init=False, default=3)
    z: int = dataclasses.field(init=False, default=4)


@attrs.define
class Attrs:
    x: int
    _y: int = 2
    z: int = attrs.field(init=False, default=3)


@attrs.define(slots=False)
class AttrsWithDict:
    x: int
    _y: int = 2


def deleted() -> OwnInit:
    value = OwnInit(1)
    value.y = 4
    del value.y  # the class's own is what the field reads as
    return value


CASES = [
    (NotInInit(1), {"x": 1, "y": 3, "z": []}),
    (Frozen(1), {"x": 1, "y": 3}),
    (Slots(x=1), {"x": 1, "y": 3}),
    (SlotsOverDict(1), {"x": 1, "y": 3, "z": [], "w": 4}),
    (HandSlots(1), {"x": 1}),
    (OwnInit(1), {"x": 1, "y": 3}),
    (OwnInitBelow(1), {"x": 1, "y": 3, "z": []}),
    (Extra(1), {"x": 1, "y": 3}),
    (InitOnly(1), {"x": 4, "y": 3}),
    (Underscored(), {"_x": 1, "_Underscored__y": 3}),
    (Described(1), {"x": 1, "y": 3, "z": 3}),
    (Validated(1), {"x": 1, "y": 3, "z": 4}),
    (Attrs(1), {"x": 1, "_y": 2, "z": 3}),
    (AttrsWithDict(1), {"x": 1, "_y": 2}),
    (deleted(), {"x": 1, "y": 3}),
]


class Holder(msgspec.Struct):
    held: Any
    n: int = 0


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    held: Any


@dataclasses.dataclass
class Around:
    held: Any
    n: int = 0


@dataclasses.dataclass(slots=True)
class AroundSlots:
    held: Any


Pair = collections.namedtuple("Pair", "a b")


def places(value: Any) -> list[tuple[Any, Any]]:
    """The value in each kind of container, and how to find it where it arrives."""
    return [
        (value, lambda got: got),
        ([value], lambda got: got[0]),
        ([*range(200), value], lambda got: got[200]),
        ((value,), lambda got: got[0]),
        ({"held": value}, lambda got: got["held"]),
        ({"a": [{"b": (1, value)}]}, lambda got: got["a"][0]["b"][1]),
        (collections.OrderedDict(held=value), lambda got: got["held"]),
        (Pair(1, value), lambda got: got[1]),
        (Holder(value), lambda got: got["held"]),
        (Around(value), lambda got: got["held"]),
        (AroundSlots(value), lambda got: got["held"]),
        (Around([Holder({"k": value})]), lambda got: got["held"][0]["held"]["k"]),
        (Model(held=value), lambda got: got["held"]),
        (Model(held=[{"k": value}]), lambda got: got["held"][0]["k"]),
        ({"held": value, "memory": bytes(BIG)}, lambda got: got["held"]),
    ]


@pytest.mark.parametrize(("value", "arrives"), CASES, ids=lambda each: type(each).__name__)
def test_every_field_arrives_wherever_the_object_is(value: Any, arrives: dict[str, Any]) -> None:
    for wrapped, find in places(value):
        assert find(travel(wrapped)) == arrives, wrapped


def test_a_frozen_one_in_a_set() -> None:
    assert travel({Frozen(1)}) == [{"x": 1, "y": 3}]


def test_a_value_in_such_a_field_is_treated_as_any_other() -> None:
    value = NotInInit(1)
    value.y, value.z = Frozen(2), [bytearray(BIG)]
    assert travel(value) == {"x": 1, "y": {"x": 2, "y": 3}, "z": [bytearray(BIG)]}

    @dataclasses.dataclass
    class Bad:
        x: int = 1
        y: Any = dataclasses.field(init=False, default=object())

    with pytest.raises(TypeError, match=r'^value\["a"\]\[0\]\.y: <class .object.> cannot travel'):
        encode({"a": [Bad()]})


def test_a_field_that_is_unset_stays_away() -> None:
    @dataclasses.dataclass
    class Partial:
        x: int = 1
        y: Any = dataclasses.field(init=False, default=msgspec.UNSET)
        z: int = dataclasses.field(init=False, default=3)

    assert travel([Partial()]) == [{"x": 1, "z": 3}]


@pytest.mark.parametrize("kind", [NotInInit, Slots, OwnInit, Attrs])
def test_a_handlers_annotation_gets_them_back(kind: Any) -> None:
    value = kind(x=1)
    if kind is NotInInit:
        value.y = 8
    got = typed_decoder(kind)(encode(value))
    assert got == value


def test_the_class_of_a_program_that_makes_many() -> None:
    for number in range(1100):  # more than the cache of `payload.fields` holds
        kind = dataclasses.make_dataclass(
            f"Made{number}", [("x", int), ("y", int, dataclasses.field(init=False, default=3))]
        )
        assert decode(encode([kind(number)])) == [{"x": number, "y": 3}]  # type: ignore[arg-type]


def test_nothing_is_found_where_nothing_is_passed_over() -> None:
    for value in ([1, "a", {"b": [None]}], Around(1), Holder({"a": Around([1])}), {"a": {1, 2}}, Model(held=1)):
        assert not has_skipped_field(value)


def test_a_value_that_nests_deeply_is_sent_or_named() -> None:
    deep: Any = Frozen(1)
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="nests too deeply"):
        encode(deep)

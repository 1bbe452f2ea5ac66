"""pydantic models at handlers of their own class, in other places, and where nobody has their class."""

from __future__ import annotations

import collections
import dataclasses
import enum
import ipaddress
import pathlib
import sys
import traceback
import uuid
from typing import Annotated, Any, Generic, NamedTuple, NewType, TypedDict, TypeVar

import attrs
import msgspec
import numpy as np
import pydantic
import pydantic.dataclasses
import pytest
import typing_extensions

from tests.payload.test_codec import BIG, received, travel
from triton_distributed.errors import DecodeError, InvalidRequest
from triton_distributed.payload.codec import Message, decode_models, encode
from triton_distributed.payload.outofband import MODEL, encode_header
from triton_distributed.payload.typed import typed_checker, typed_decoder

T = TypeVar("T")
ONE = uuid.UUID(int=1)


class Colour(enum.Enum):
    RED = "red"


class Cat(pydantic.BaseModel):
    lives: int


class Dog(pydantic.BaseModel):
    """Strict, with other names for reading than for writing, and a computed field that it does not read."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")
    id: uuid.UUID = pydantic.Field(validation_alias="idIn", serialization_alias="idOut")
    colour: Colour = Colour.RED

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def legs(self) -> int:
        return 4


DOG = Dog(idIn=ONE)  # type: ignore[call-arg]
WRITTEN = {"idOut": str(ONE), "colour": "red", "legs": 4}


class Puppy(Dog):
    weeks: int = pydantic.Field(default=3, alias="ageInWeeks")


class Generic1(pydantic.BaseModel, Generic[T]):
    x: T


class Node(pydantic.BaseModel):
    pets: list[Dog | Cat] = []
    nodes: list[Node] = []


class Pack(pydantic.RootModel[list[Dog]]):
    pass


class Mark(pydantic.RootModel[uuid.UUID]):
    model_config = pydantic.ConfigDict(strict=True)


class Arrays(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True, extra="forbid")
    array: np.ndarray
    number: np.float32
    raw: bytes
    dog: Dog


@pydantic.dataclasses.dataclass(config=pydantic.ConfigDict(strict=True))
class Checked:
    size: int = pydantic.Field(gt=3, alias="SIZE")
    ids: tuple[uuid.UUID, ...] = ()


@dataclasses.dataclass
class Zoo:
    pet: Cat | Dog
    more: dict[str, list[Cat | Dog]] = dataclasses.field(default_factory=dict)
    array: np.ndarray | None = None


@dataclasses.dataclass
class Account:
    site: pydantic.HttpUrl
    password: pydantic.SecretStr
    size: pydantic.PositiveInt


@dataclasses.dataclass
class Seeded:
    n: int
    seed: dataclasses.InitVar[int] = 0


@dataclasses.dataclass(slots=True, kw_only=True, frozen=True)
class Slots:
    a: int
    b: int = dataclasses.field(init=False, default=7)


@dataclasses.dataclass
class A:
    a: int


@dataclasses.dataclass
class B:
    b: int
    a: int = 0


@dataclasses.dataclass
class Linked:
    left: list[Linked]


@dataclasses.dataclass
class Of(Generic[T]):
    x: T


class Box(msgspec.Struct):
    pet: Dog
    n: int = 0


@attrs.define
class Crate:
    pet: Dog


class Pair(NamedTuple):
    pet: Dog
    n: int


class Options(TypedDict):
    pet: Dog


class Either(typing_extensions.TypedDict):
    pet: Cat | Dog


Named = NewType("Named", Dog)
Alias = typing_extensions.TypeAliasType("Alias", list[Cat | Dog])


def request(hint: Any, value: Any) -> Any:
    return typed_decoder(hint)(*received(encode(value)))


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (Dog, DOG),
        (Dog | None, DOG),
        (Annotated[Dog, "a note"], DOG),
        (Named, DOG),
        (list[Dog], [DOG, DOG]),
        (list[Cat | Dog], [DOG, Cat(lives=1)]),
        (dict[str, Cat | Dog], {"a": DOG, "b": Cat(lives=1)}),
        (dict[tuple[int, int], Dog], {(1, 2): DOG}),
        (tuple[Cat | None, ...], (Cat(lives=1), None)),
        (Alias, [DOG, Cat(lives=1)]),
        (Dog | str, DOG),
        (Dog | str, "text"),
        (Cat | Dog | int, 3),
        (Generic1[Dog], Generic1[Dog](x=DOG)),
        (Generic1[Generic1[Colour | str]], Generic1[Generic1[Colour | str]](x={"x": Colour.RED})),  # type: ignore[arg-type]
        (Of[Dog], Of(DOG)),
        (Node, Node(nodes=[Node(pets=[DOG, Cat(lives=1)])])),
        (Linked, Linked([Linked([])])),
        (Pack, Pack([DOG])),
        (Mark, Mark(ONE)),
        (list[Mark], [Mark(ONE)]),
        (Zoo, Zoo(DOG, {"k": [Cat(lives=2), DOG]})),
        (Box, Box(DOG)),
        (Crate, Crate(DOG)),
        (Pair, Pair(DOG, 1)),
        (Options, {"pet": DOG}),
        (Either, {"pet": DOG}),
        (Checked, Checked(SIZE=5, ids=(ONE,))),
        (list[Checked], [Checked(SIZE=5)]),
        (Account, Account(pydantic.HttpUrl("http://a"), pydantic.SecretStr("x"), 1)),
        (Seeded, Seeded(4)),
        (Slots, Slots(a=1)),
        (A | B, A(1)),
        (A | B, B(1, 2)),
        (list[A | B | None], [A(1), None, B(2)]),
        (collections.deque[int], collections.deque([1])),
        (pydantic.IPvAnyAddress, ipaddress.ip_address("::1")),
        (pydantic.SecretStr, pydantic.SecretStr("x")),
        (TypeVar("Bound", bound=Dog), DOG),
    ],
    ids=str,
)
def test_values_arrive_equal_at_any_depth(hint: Any, value: Any) -> None:
    got = request(hint, value)
    assert type(got) is type(value)
    assert got == value
    check = typed_checker(hint)
    assert check is not None
    assert check(value) is value


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the syntax is of Python 3.12")
def test_aliases_of_python_3_12() -> None:
    names: dict[str, Any] = {"Cat": Cat, "Dog": Dog}
    exec("type Pets = list[Cat | Dog]\ntype Tree = dict[str, Tree | Dog]\nclass Of[T]:\n    x: T", names)
    assert request(names["Pets"], [DOG, Cat(lives=1)]) == [DOG, Cat(lives=1)]
    assert request(names["Tree"], {"a": {"b": DOG}}) == {"a": {"b": DOG}}
    of = dataclasses.dataclass(names["Of"])
    assert request(of[Dog], of(DOG)) == of(DOG)


def test_typed_places_without_the_class_get_what_the_class_writes() -> None:
    assert request(dict[str, Any], {"a": DOG}) == {"a": WRITTEN}
    assert request(list[Dog | dict[str, int]], [DOG, {"n": 1}]) == [DOG, {"n": 1}]

    @dataclasses.dataclass
    class Mixed:
        pet: Dog
        any: Any
        same: dict[str, Any]

    Mixed.__annotations__ = {"pet": Dog, "any": Any, "same": dict[str, Any]}
    assert request(Mixed, Mixed(DOG, [DOG], {"d": DOG})) == Mixed(DOG, [WRITTEN], {"d": WRITTEN})


@pytest.mark.parametrize("wrap", [lambda each: each, lambda each: [each], lambda each: {"k": (each,)}])
def test_whoever_has_no_class_gets_what_it_writes(wrap: Any) -> None:
    got = travel(wrap(DOG))
    assert got == travel(wrap(WRITTEN))
    assert travel(Mark(ONE)) == str(ONE)


@pytest.mark.parametrize("count", [3, BIG])
def test_memory_in_a_model_travels_once_and_arrives_in_place(count: int) -> None:
    model = Arrays(array=np.arange(count), number=np.float32(1.5), raw=b"r" * count, dog=DOG)
    message = encode({"model": model})
    assert isinstance(message, Message) == (count == BIG)
    body, buffers = received(message)
    assert sum(map(len, buffers)) == (BIG * 9 if count == BIG else 0)
    got = typed_decoder(dict[str, Arrays])(body, buffers)["model"]
    assert np.array_equal(got.array, model.array)
    assert (got.number, type(got.number), got.raw, got.dog) == (model.number, np.float32, model.raw, DOG)
    if buffers:
        assert any(np.shares_memory(got.array, np.frombuffer(each, "u1")) for each in buffers)
    plain = travel(model)
    assert (plain["number"], type(plain["number"]), plain["dog"]) == (1.5, float, WRITTEN)


class Named2(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(validate_by_name=True)
    size: int = pydantic.Field(alias="SIZE")


class Aliased(pydantic.BaseModel):
    size: int = pydantic.Field(default=0, alias="SIZE")
    id: uuid.UUID | None = None


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    id: uuid.UUID
    size: tuple[int, int] = (0, 0)


@pytest.mark.parametrize(
    ("hint", "plain", "arrives"),
    [
        (Aliased, {"SIZE": 3}, Aliased(SIZE=3)),
        (Aliased, {"size": 3}, Aliased()),  # as `Aliased(size=3)`: the class does not read it
        (Aliased, {"id": str(ONE)}, Aliased(id=ONE)),
        (Aliased, {"SIZE": "3"}, Aliased(SIZE=3)),
        (Named2, {"size": 3}, Named2(size=3)),  # type: ignore[call-arg]
        (Named2, {"SIZE": 3}, Named2(size=3)),  # type: ignore[call-arg]
        (Strict, {"id": ONE, "size": (1, 2)}, Strict(id=ONE, size=(1, 2))),
        (Strict, {"id": str(ONE), "size": [1, 2]}, Strict(id=ONE, size=(1, 2))),
        (Dog, {"idIn": str(ONE), "colour": "red"}, DOG),
        (Checked, {"SIZE": 5, "ids": [str(ONE)]}, Checked(SIZE=5, ids=(ONE,))),
        (list[Cat | Dog], [{"lives": 1}, {"idIn": str(ONE)}], [Cat(lives=1), DOG]),
        (Pack, [{"idIn": str(ONE)}], Pack([DOG])),
        (Node, {"pets": [DOG, {"lives": 1}]}, Node(pets=[DOG, Cat(lives=1)])),
        (A | B, {"b": 1}, B(1)),
        (Seeded, {"n": 1, "seed": 3}, Seeded(1)),
    ],
    ids=str,
)
def test_plain_dicts_are_taken_as_the_class_declares(hint: Any, plain: Any, arrives: Any) -> None:
    assert request(hint, plain) == arrives


@pytest.mark.parametrize(
    ("hint", "plain", "text"),
    [
        (Strict, {"id": str(ONE), "size": ["1", 2]}, "request: size.0: Input should be a valid integer"),
        (Strict, {"id": 5}, "request: id: Input should be"),
        (Dog, {"id": str(ONE)}, "request: idIn: Field required"),
        (Dog, {"idIn": str(ONE), "legs": 4}, "request: legs: Extra inputs are not permitted"),
        (Generic1[dict[str, int]], {"x": {1: 1}}, "request: x.1.\\[key\\]: Input should be a valid string"),
        (Annotated[int, pydantic.Field(gt=3)], 3, "request: Input should be greater than 3"),
        (Account, {"site": "http://a", "password": "x", "size": 0}, "request: size: Input should be greater than 0"),
        (Zoo, {"pet": {"x": 1}}, r"request: pet\.Cat\.lives: Field required; pet\.Dog\.idIn: Field required"),
        (A | B, {"a": "x"}, r"request: A\.a: Input should be a valid integer"),
        (Checked, {"SIZE": 3}, "request: SIZE: Input should be greater than 3"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(hint: Any, plain: Any, text: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^Invalid request: {text}"):
        request(hint, plain)


def test_a_subclass_arrives_as_the_class_of_the_handler() -> None:
    puppy = Puppy(idIn=ONE)  # type: ignore[call-arg]
    assert request(Puppy, puppy) == puppy

    class Open(Dog):
        model_config = pydantic.ConfigDict(extra="ignore")

    assert request(Open, puppy) == Open(idIn=ONE)  # type: ignore[call-arg]


def test_another_version_of_the_class_is_read_by_its_names() -> None:
    class Older(pydantic.BaseModel):
        size: int = pydantic.Field(validation_alias="in", serialization_alias="out")

    class Newer(pydantic.BaseModel):
        size: int = pydantic.Field(default=0, validation_alias="in", serialization_alias="out")
        more: int = 0

    assert request(Newer, Older(**{"in": 3})) == Newer(**{"in": 3})
    assert request(Older, Newer(**{"in": 3})) == Older(**{"in": 3})


def test_a_model_of_another_class_counts_as_the_dict_that_it_writes() -> None:
    class Theirs(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(strict=True)
        id: str = pydantic.Field(alias="idIn")
        site: pydantic.HttpUrl = pydantic.HttpUrl("http://a")

    class Ours(pydantic.BaseModel):
        id: uuid.UUID = pydantic.Field(alias="idIn")
        site: str

    assert request(Ours, Theirs(idIn=str(ONE))) == Ours(idIn=ONE, site="http://a/")
    with pytest.raises(InvalidRequest, match="request: lives: Field required"):
        request(Cat, DOG)

    class OtherNames(pydantic.BaseModel):
        number: int = pydantic.Field(default=0, alias="size")

    class TheirNames(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="allow")
        count: int = pydantic.Field(alias="size")

    for hint in (OtherNames, list[OtherNames], OtherNames | str):
        value: Any = TheirNames(size=3)
        got = request(hint, [value] if hint == list[OtherNames] else value)
        assert got == ([OtherNames(size=3)] if hint == list[OtherNames] else OtherNames(size=3))

    @dataclasses.dataclass
    class Plain:
        idOut: str  # noqa: N815

    Plain.__annotations__ = {"idOut": str}
    assert request(Plain, DOG) == Plain(str(ONE))


def test_names_of_fields_that_pydantic_uses_itself() -> None:
    fields = dict.fromkeys(["type", "schema_", "metadata", "default", "config", "cls", "fields", "choices"], Dog)
    definitions: dict[str, Any] = {name: (hint, ...) for name, hint in fields.items()}
    kind: Any = pydantic.create_model("Odd", **definitions)
    model = kind.model_validate(dict.fromkeys(fields, DOG))
    assert request(kind, model) == model


class Simple(pydantic.BaseModel):
    text: str = pydantic.Field(alias="theText")
    cats: dict[str, list[Cat]] = {}
    at: uuid.UUID | None = None


@pytest.mark.parametrize("model", [Simple(theText="x", cats={"a": [Cat(lives=1)]}, at=ONE), Cat(lives=3)])
def test_a_model_of_one_form_costs_no_more_than_what_it_writes(model: Any) -> None:
    assert encode(model) == encode(model.model_dump(by_alias=True))


def test_a_secret_arrives_and_is_in_no_text() -> None:
    class Login(pydantic.BaseModel):
        user: str
        password: pydantic.SecretStr = pydantic.Field(min_length=3)

    secret = "hunter2"
    login = Login(user="u", password=pydantic.SecretStr(secret))
    assert request(Login, login) == login
    for hint in (Login, list[Login], Login | str):
        for value in ({"password": secret}, {"user": 5, "password": secret}):
            with pytest.raises(InvalidRequest) as raised:
                request(hint, [value] if hint == list[Login] else value)
            assert secret not in "".join(traceback.format_exception(raised.value))
            check = typed_checker(hint)
            assert check is not None
            with pytest.raises(TypeError) as refused:
                check(value)
            assert secret not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize(
    "answer",
    [
        DOG,
        {"idIn": ONE},
        {"idIn": str(ONE), "colour": "red"},
        DOG.model_dump(),
        DOG.model_dump(by_alias=True),
        DOG.model_dump(mode="json"),
        DOG.model_dump(round_trip=True),
    ],
    ids=str,
)
def test_an_answer_fits_in_any_form_that_its_class_reads_or_writes(answer: Any) -> None:
    check = typed_checker(Dog)
    assert check is not None
    assert check(answer) is answer
    with pytest.raises(TypeError, match="response: "):
        check({**answer, "more": 1} if isinstance(answer, dict) else {"more": 1})


@pytest.mark.parametrize("header", [None, "x", [], [0], [99, 1], [1, 2, 3], [1, [1], [], []], [1, [[]], None, [1]]])
@pytest.mark.parametrize("more", [[], [1], [None, None], [["a"], None, []]])
def test_malformed_models(header: Any, more: list[Any]) -> None:
    body = msgspec.msgpack.encode(msgspec.msgpack.Ext(MODEL, encode_header([*(header or []), *more])))
    for hint in (Cat, list[Cat], None):
        with pytest.raises((DecodeError, InvalidRequest)):
            typed_decoder(hint)(body)
            raise DecodeError("it may be read as something else")


@pytest.mark.parametrize("operation", range(20))
@pytest.mark.parametrize("operands", [[], [None], [[]], ["x"], ["os", "system", "x"], [1, 2], [[1], [2], [3]]], ids=str)
def test_any_operation_on_anything_is_a_value_or_a_decode_error(operation: int, operands: list[Any]) -> None:
    body = msgspec.msgpack.encode([msgspec.msgpack.Ext(MODEL, encode_header([operation, *operands]))])
    try:
        _, models = decode_models(body)
        for _, read in models.values():
            read()
    except DecodeError:
        pass


def test_nothing_is_made_of_a_class_that_only_the_message_names() -> None:
    for module, name in (("pathlib", "os"), ("subprocess", "Popen"), ("pydantic", "create_model"), ("re", "compile")):
        for operation in (3, 15):
            body = msgspec.msgpack.encode(msgspec.msgpack.Ext(MODEL, encode_header([operation, module, name, ["x"]])))
            value, models = decode_models(body)
            assert value == ["x"]
            assert [read() for _, read in models.values()] == [["x"]]


def test_deep_nesting_is_a_decode_error() -> None:
    body = b"\xc0"
    for _ in range(5_000):
        body = msgspec.msgpack.encode(msgspec.msgpack.Ext(MODEL, b"\x92\x00" + body))
    for hint in (None, Cat):
        with pytest.raises(DecodeError):
            typed_decoder(hint)(body)


def test_paths_of_the_file_system_stay_what_they_are() -> None:
    class Files(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(strict=True)
        one: pathlib.Path | str
        two: str | pathlib.Path

    for files in (Files(one=pathlib.Path("a"), two="b"), Files(one="a", two=pathlib.Path("b"))):
        got = request(Files, files)
        assert (type(got.one), type(got.two)) == (type(files.one), type(files.two))

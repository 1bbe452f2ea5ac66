"""A hint that cannot be checked is refused where the decoder is made, with the reason; none is dropped."""

from __future__ import annotations

import collections
import dataclasses
import enum
import subprocess
import sys
import types
import typing
from collections.abc import AsyncIterator, Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, TypeVar

import msgspec
import numpy as np
import pydantic
import pytest

from tests.payload.test_codec import received
from triton_distributed.payload.codec import encode
from triton_distributed.payload.typed import typed_checker, typed_decoder

if TYPE_CHECKING:
    from nowhere import Unknown  # type: ignore[import-not-found]


class Opaque:
    pass


class Cat(pydantic.BaseModel):
    lives: int


class Dog(pydantic.BaseModel):
    name: str


class Box(msgspec.Struct):
    pet: Cat | Dog


class Seed(msgspec.Struct):
    n: int


@dataclasses.dataclass
class Holder:
    items: dict[str, list[Opaque]]


@dataclasses.dataclass
class Postponed:
    it: Unknown


class Unready(pydantic.BaseModel):
    it: Unknown


class Partial(TypedDict):
    it: list[Unknown]


@dataclasses.dataclass
class Start:
    id: int


@dataclasses.dataclass
class Stop:
    id: int


class StartModel(pydantic.BaseModel):
    id: int = pydantic.Field(gt=0)


class StopModel(pydantic.BaseModel):
    id: int = pydantic.Field(gt=0)


Bound = TypeVar("Bound", bound=Opaque)

UNRESOLVED = types.GenericAlias(list, ("Unresolved",))

UNUSABLE: list[tuple[Any, str]] = [
    (Opaque, r"a message cannot hold a tests\.payload\.test_typed_refusals\.Opaque"),
    (list[Opaque], r"a message cannot hold a .*Opaque"),
    (Opaque | int, r"a message cannot hold a .*Opaque"),
    (Dog | Opaque, r"a message cannot hold a .*Opaque"),
    (Holder, r"a message cannot hold a .*Opaque"),
    (Bound, r"a message cannot hold a .*Opaque"),
    (Annotated[Opaque, "a note"], r"a message cannot hold a .*Opaque"),
    (np.float32 | Dog, r"a message cannot hold a numpy\.float32"),
    (Hashable, r"a message cannot hold a .*Hashable"),
    (AsyncIterator[str], r"a message cannot hold a .*AsyncIterator"),
    (Iterable[int] | None, "a generator is not a value that can be checked"),
    (Callable[[int], int], "a function is not a value that can be checked"),
    (typing.Callable, "a function is not a value that can be checked"),
    (type[int], "a class is not a value that can be checked"),
    ("Unresolved", "name 'Unresolved' is not defined"),
    (UNRESOLVED, "name 'Unresolved' is not defined"),
    (3, "it is not a type"),
    (Box, r"only msgspec can check the Struct Box"),
    (list[Seed | Dog], r"only msgspec can check the Struct Seed"),
    (Annotated[int, msgspec.Meta(gt=3)] | Dog, r"only msgspec can check msgspec\.Meta"),
    (Annotated[Seed, pydantic.Field(frozen=True)], r"only pydantic can check .*, and only msgspec can check"),
    (Postponed, r"class Postponed cannot be resolved \(name 'Unknown' is not defined\); define or import"),
    (list[Postponed], r"class Postponed cannot be resolved"),
    (Partial, r"class Partial cannot be resolved"),
    (Unready, r"the model Unready is not complete"),
    (dict[str, Unready], r"the model Unready is not complete"),
    (Start | Stop, r"Stop can never arrive, because every value that fits it also fits Start; give each a field"),
    (list[Start | Stop | None], r"Stop can never arrive"),
    (StartModel | Dog | StopModel, r"StopModel can never arrive"),
]


@pytest.mark.parametrize(("hint", "text"), UNUSABLE, ids=str)
def test_a_hint_that_cannot_be_checked_is_refused(hint: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        typed_decoder(hint)


@pytest.mark.parametrize("hint", ["Unresolved", 3, Postponed, Unready, Box, typing.Callable | int, UNRESOLVED])
def test_so_is_what_an_answer_should_fit(hint: Any) -> None:
    with pytest.raises(TypeError):
        typed_checker(hint)


@pytest.mark.parametrize("hint", [Opaque, list[Opaque], Start | Stop])
def test_an_answer_can_be_checked_against_what_cannot_arrive(hint: Any) -> None:
    check = typed_checker(hint)
    assert check is not None
    value = [Opaque()] if hint == list[Opaque] else Opaque() if hint is Opaque else Stop(1)
    assert check(value) is value
    with pytest.raises(TypeError, match="response"):
        check({"x": 1})


def test_members_of_a_union_that_differ_are_no_twins() -> None:
    @dataclasses.dataclass
    class Checked:
        id: int

        def __post_init__(self) -> None:
            if self.id < 5:
                raise ValueError("at least 5")

    Checked.__annotations__ = {"id": int}
    decoder = typed_decoder(Checked | Stop)
    assert decoder(encode({"id": 5})) == Checked(5)
    assert decoder(encode({"id": 1})) == Stop(1)

    class Kinds(enum.Enum):
        ONE = "one"

    @dataclasses.dataclass
    class One:
        id: int
        kind: Literal["one"] = "one"

    @dataclasses.dataclass
    class Two:
        id: int
        kind: Literal["two"] = "two"

    One.__annotations__ = {"id": int, "kind": Literal["one"]}
    Two.__annotations__ = {"id": int, "kind": Literal["two"]}
    decoder = typed_decoder(One | Two)
    assert decoder(encode(Two(3))) == Two(3)
    assert decoder(encode(One(3))) == One(3)


def test_a_union_goes_to_the_member_of_which_most_is_there_then_to_the_first() -> None:
    @dataclasses.dataclass
    class Few:
        a: int = 0

    @dataclasses.dataclass
    class More:
        a: int = 0
        b: int = 0

    Few.__annotations__, More.__annotations__ = {"a": int}, {"a": int, "b": int}
    for hint in (Few | More, More | Few):
        assert isinstance(hint, types.UnionType)
        decoder = typed_decoder(hint)
        assert decoder(encode(More(1, 2))) == More(1, 2)
        assert type(decoder(encode({"a": 1}))) is hint.__args__[0]


@pytest.mark.parametrize("version", ["2.9.2", "2.10.6"])
def test_an_older_pydantic_is_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydantic, "VERSION", version)
    for hint in (Dog, list[Dog | None], Cat | Dog):
        with pytest.raises(TypeError, match=rf"pydantic 2\.11 or newer is needed, but {version} is installed"):
            typed_decoder(hint)


PLAIN = """
import sys
sys.modules["pydantic"] = None
import dataclasses, enum
from triton_distributed.payload.typed import typed_decoder

@dataclasses.dataclass
class A:
    a: int

@dataclasses.dataclass
class B:
    b: int

@dataclasses.dataclass
class Seeded:
    n: int
    seed: dataclasses.InitVar[int] = 0

class Odd(enum.Enum):
    HALF = 0.5

for hint in (A | B, list[A | B], dict[str, Seeded], Odd):
    try:
        typed_decoder(hint)
    except TypeError as error:
        print(error)
    else:
        raise AssertionError(hint)
"""


def test_without_pydantic_what_only_it_can_check_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", PLAIN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all("pip install pydantic" in line for line in done.stdout.splitlines())


def test_what_msgspec_can_check_does_not_import_pydantic() -> None:
    program = """
import dataclasses, sys
from triton_distributed.payload.typed import typed_decoder

@dataclasses.dataclass
class A:
    a: int

for hint in (A, list[A], dict[str, A | None], int | str):
    typed_decoder(hint)
assert "pydantic" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_constraints_on_a_bare_type_are_checked() -> None:
    for hint in (Annotated[int, pydantic.Field(gt=3)], Annotated[int, msgspec.Meta(gt=3)]):
        decoder = typed_decoder(hint)
        assert decoder(*received(encode(4))) == 4
        with pytest.raises(ValueError, match="request"):
            decoder(*received(encode(3)))
    counter = typed_decoder(collections.Counter[str])(encode({"a": 1}))
    assert counter == collections.Counter("a")

"""What makes two contracts fit: a table of pairs, and properties over generated types."""

from __future__ import annotations

import collections
import dataclasses
import decimal
import enum
import ipaddress
import itertools
import json
import pathlib
import time
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_distributed.api.schema import described, differences, ignored, schema_of


@dataclasses.dataclass
class Old:
    text: str
    size: int = 0


@dataclasses.dataclass
class New:
    text: str
    size: int = 0
    temperature: float = 1.0


@dataclasses.dataclass
class Needs:
    text: str
    language: str


@dataclasses.dataclass
class Misspelt:
    text: str
    sizes: int = 0


@dataclasses.dataclass
class Retyped:
    text: int


class AsModel(pydantic.BaseModel):
    text: str
    size: int = 0


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    text: str


@dataclasses.dataclass
class Longer:
    text: str
    size: int


class AsDict(TypedDict):
    text: str
    size: int


class Colour(enum.Enum):
    RED = "red"


class Node(msgspec.Struct):
    children: list[Node] = []


def compared(ours: Any, theirs: Any, answer: bool = False) -> list[str]:
    """The differences between two types of a request, or of an answer."""
    other = "request" if answer else "answer"
    sides = []
    for each in (ours, theirs):
        found = described(Any, each) if answer else described(each, Any)
        sides.append(json.loads(json.dumps({"kind": "unary", **found, other: {}})))  # As discovery brings it.
    return differences(*sides)


class ByAlias(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(populate_by_name=True)
    text: str = pydantic.Field(alias="theText")


class Choices(pydantic.BaseModel):
    text: str = pydantic.Field(validation_alias=pydantic.AliasChoices("words", "theText"), serialization_alias="out")


class Inside(pydantic.BaseModel):
    text: str = pydantic.Field(validation_alias=pydantic.AliasPath("texts", 0))


class Computed(pydantic.BaseModel):
    text: str

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def language(self) -> str:
        return "en"

    @pydantic.field_serializer("text")
    def _written(self, text: str) -> int:
        return len(text)


class HasArray(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    array: np.ndarray[Any, Any]
    size: int


class Tree(pydantic.BaseModel):
    children: list[Tree] = []


class SendsSome(TypedDict):
    text: str
    size: NotRequired[int]


class OmitsDefaults(msgspec.Struct, omit_defaults=True):
    text: str
    size: int = 0


class Tagged(msgspec.Struct, tag=True):
    text: str


class Pair(enum.Enum):
    ONE = (1, 2)


class OutText(TypedDict):
    out: str


class TheText(TypedDict):
    theText: str


class Texts(TypedDict):
    texts: list[str]


class TopK(TypedDict):
    top_k: NotRequired[int]


class TopP(TypedDict):
    top_p: NotRequired[int]


class Image(TypedDict):
    image: NotRequired[str]


class Images(TypedDict):
    images: NotRequired[list[str]]


class NeedsLanguage(TypedDict):
    text: int
    language: str


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ByAlias, ByAlias),
        (Strict, ByAlias),
        (TheText, ByAlias),
        (TheText, Choices),
        (Choices, OutText),
        (Choices, Strict),
        (Texts, Inside),
        (Inside, Inside),
        (Computed, NeedsLanguage),
        (Computed, Computed),
        (HasArray, HasArray),
        (Tree, Tree),
        (Tree, Node),
        (SendsSome, Strict),
        (OmitsDefaults, Strict),
        (Strict, Tagged),
        (Pair, Pair),
        (TopK, TopP),
        (Images, Image),
        (int, decimal.Decimal),
        (float, decimal.Decimal),
        (np.float32, float),
        (np.int64, int),
        (float, np.float32),
        (pathlib.Path, str),
        (str, ipaddress.IPv4Address),
        (collections.OrderedDict, dict),
        (collections.deque[int], list[int]),
        (Annotated[int, msgspec.Meta(gt=0)], int),
    ],
)
def test_what_can_be_read_fits(ours: Any, theirs: Any) -> None:
    assert compared(ours, theirs) == []


class TaggedSize(msgspec.Struct, tag=True):
    size: int


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        (New, Old, ["request.temperature: this process sends it, and the worker ignores it"]),
        (Tagged | TaggedSize, TaggedSize | Tagged, []),
        (New, Old | None, ["request.temperature: this process sends it, and the worker ignores it"]),
        (New, dict[str, Any], []),
        (New, Old | dict[str, Any], []),
        (New, Any, []),
        (ByAlias, ByAlias, []),
    ],
)
def test_fields_that_are_ignored(ours: Any, theirs: Any, says: list[str]) -> None:
    sides: list[dict[str, Any]] = [{"kind": "unary", **described(each, Any)} for each in (ours, theirs)]
    assert ignored(*sides) == says


def test_a_field_that_cannot_be_described_hides_no_other() -> None:
    class Retyped(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
        array: np.ndarray[Any, Any]
        size: str

    assert compared(HasArray, Retyped) == ["request.size: this process sends integer, and the worker takes string"]


def test_a_class_whose_own_description_fails_is_not_compared() -> None:
    class Broken(pydantic.BaseModel):
        @classmethod
        def __get_pydantic_json_schema__(cls, *_: Any) -> Any:
            raise ValueError("no description")

    assert schema_of(Broken) == {}


def test_classes_that_refer_to_each_other_are_described_once() -> None:
    names = [f"Kind{number}" for number in range(24)]
    kinds = {}
    for name in names:
        kinds[name] = msgspec.defstruct(name, [("inner", "|".join(names))], tag=True, module=__name__)
    globals().update(kinds)
    try:
        begin = time.process_time()
        assert compared(kinds["Kind0"], kinds["Kind0"]) == []
        assert len(json.dumps(schema_of(kinds["Kind0"]))) < 40_000
        assert time.process_time() - begin < 10  # Each path through these classes would take years.
    finally:
        for name in names:
            del globals()[name]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Old, Old),
        (Old, New),
        (New, Old),
        (Old, AsModel),
        (AsModel, Old),
        (AsDict, Old),
        (int, float),
        (int, int | None),
        (str | None, str),
        (Any, Old),
        (Old, Any),
        (list[Old], list[AsModel]),
        (dict[str, int], dict[str, float]),
        (Literal["a", "b"], Literal["b"]),
        (Node, Node),
        (np.ndarray, np.ndarray),
        (tuple[int, str], tuple[int, str]),
        (bytes, bytes),
    ],
)
def test_these_fit(ours: Any, theirs: Any) -> None:
    assert compared(ours, theirs) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        (Old, Needs, "request.language: the worker requires this field, and this process does not send it"),
        (Misspelt, Old, "request: this process calls a field 'sizes', and the worker calls it 'size'"),
        (Old, Retyped, "request.text: this process sends string, and the worker takes integer"),
        (float, int, "request: this process sends number, and the worker takes integer"),
        (list[str], list[int], "request[…]: this process sends string, and the worker takes integer"),
        (list[Old], list[Retyped], "request[…].text: this process sends string, and the worker takes integer"),
        (str, Old, "request: this process sends string, and the worker takes object"),
        (Longer, Strict, "request.size: this process sends this field, and the worker forbids fields that it does not"),
        (Literal["a"], Colour, "request: this process sends one of ['a'], and the worker takes one of ['red']"),
        (np.ndarray, bytes, "request: this process sends numpy.ndarray, and the worker takes string"),
        (int | str, list[int], "request: this process sends integer or string, and the worker takes array of integer"),
    ],
)
def test_these_do_not_fit(ours: Any, theirs: Any, says: str) -> None:
    found = compared(ours, theirs)
    assert len(found) == 1
    assert found[0].startswith(says)


def test_an_answer_goes_the_other_way() -> None:
    found = compared(Needs, Old, answer=True)
    assert found == ["answer.language: this process requires this field, and the worker does not send it"]
    assert compared(Old, Needs, answer=True) == []


def test_kinds_are_compared() -> None:
    empty: dict[str, Any] = {"request": {}, "answer": {}}
    assert differences({"kind": "unary", **empty}, {"kind": "stream", **empty}) == [
        "this process calls it as unary, and the worker serves it as stream"
    ]


_numbers = itertools.count()  # The oldest msgspec cannot describe two classes of one name.

TYPES = st.recursive(
    st.sampled_from([int, float, str, bool, bytes, type(None), Old, AsModel, Node]),
    lambda inner: (
        st.builds(list.__class_getitem__, inner)
        | st.builds(lambda a: dict.__class_getitem__((str, a)), inner)
        | st.builds(lambda fields: msgspec.defstruct(f"Made{next(_numbers)}", [(f"f{n}", each) for n, each in enumerate(fields)]),
                    st.lists(inner, max_size=3))
    ),
    max_leaves=6,
)  # fmt: skip


@given(TYPES)
def test_every_type_fits_itself_and_is_plain_json(kind: Any) -> None:
    schema = schema_of(kind)
    assert msgspec.json.decode(msgspec.json.encode(schema)) == schema
    assert compared(kind, kind) == []
    assert compared(kind, kind, answer=True) == []


@given(TYPES, TYPES)
def test_a_required_field_more_is_a_difference_for_its_receiver_only(first: Any, second: Any) -> None:
    less = msgspec.defstruct("Less", [("one", first)])
    more = msgspec.defstruct("More", [("one", first), ("another_name", second)])
    assert len(compared(less, more)) == 1
    assert compared(more, less) == []

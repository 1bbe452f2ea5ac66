"""What makes two contracts fit: a table of pairs, and properties over generated types."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Literal, TypedDict

import msgspec
import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_distributed.api.schema import differences, schema_of


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


class AsDict(TypedDict):
    text: str
    size: int


class Colour(enum.Enum):
    RED = "red"


class Node(msgspec.Struct):
    children: list[Node] = []


def compared(ours: Any, theirs: Any, answer: bool = False) -> list[str]:
    """The differences between two types of a request, or of an answer."""
    place, other = ("answer", "request") if answer else ("request", "answer")
    sides = [{"kind": "unary", place: schema_of(each), other: {}} for each in (ours, theirs)]
    return differences(*sides)


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
        (Old, Strict, "request.size: this process sends this field, and the worker forbids fields that it does not"),
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


TYPES = st.recursive(
    st.sampled_from([int, float, str, bool, bytes, type(None), Old, AsModel, Node]),
    lambda inner: (
        st.builds(list.__class_getitem__, inner)
        | st.builds(lambda a: dict.__class_getitem__((str, a)), inner)
        | st.builds(lambda fields: msgspec.defstruct("Made", [(f"f{n}", each) for n, each in enumerate(fields)]),
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

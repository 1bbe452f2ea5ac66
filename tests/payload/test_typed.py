"""Requests and responses against annotations."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import inspect
import uuid
from array import array
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import pydantic
import pytest

from tests.payload.test_codec import BIG, received
from triton_distributed.errors import DecodeError, InvalidRequest
from triton_distributed.payload.codec import decode, encode
from triton_distributed.payload.typed import typed_checker, typed_decoder


@dataclasses.dataclass
class Prompt:
    text: str
    limit: int = 16
    image: np.ndarray | None = None
    raw: bytes = b""


class Answer(msgspec.Struct):
    tokens: list[int]
    done: bool = False


class Options(TypedDict, total=False):
    top: int


class Pair(NamedTuple):
    left: int
    right: str


class Colour(enum.Enum):
    RED = "red"


class Chat(pydantic.BaseModel):
    name: str
    turns: list[int] = pydantic.Field(default_factory=list)
    stream: bool = pydantic.Field(default=False, alias="isStream")


class Done(pydantic.BaseModel):
    reason: str


class Opaque:
    pass


def request(hint: Any, value: Any) -> Any:
    return typed_decoder(hint)(*received(encode(value)))


@pytest.mark.parametrize("hint", [None, Any, object, inspect.Parameter.empty, TypeVar("T"), TypeVar("A", bound=Any)])
def test_no_annotation_checks_nothing(hint: Any) -> None:
    assert typed_decoder(hint) is decode
    assert typed_checker(hint) is None


@pytest.mark.parametrize(
    ("hint", "value", "arrives"),
    [
        (str, "x", "x"),
        (int, 5, 5),
        (float, 5, 5.0),
        (float, 0.5, 0.5),
        (bool, True, True),
        (bytes, b"x", b"x"),
        (bytes, bytes(BIG), bytes(BIG)),
        (bytes, bytearray(b"x"), b"x"),
        (bytearray, bytearray(b"x"), bytearray(b"x")),
        (bytearray, bytearray(BIG), bytearray(BIG)),
        (bytearray, b"x", bytearray(b"x")),
        (list, [1, "a"], [1, "a"]),
        (list[int], (1, 2), [1, 2]),
        (tuple[int, str], [1, "a"], (1, "a")),
        (set[int], {1}, {1}),
        (dict, {1: 2}, {1: 2}),
        (dict[str, int], {"a": 1}, {"a": 1}),
        (dict[int, str], {1: "a"}, {1: "a"}),
        (Mapping[str, int], {"a": 1}, {"a": 1}),
        (Sequence[int], [1], [1]),
        (int | None, None, None),
        (int | str, "a", "a"),
        (list[int] | dict[str, int], {"a": 1}, {"a": 1}),
        (Literal["a", "b"], "b", "b"),
        (Annotated[int, msgspec.Meta(gt=3)], 5, 5),
        (datetime.datetime, datetime.datetime(2025, 1, 1), datetime.datetime(2025, 1, 1)),
        (uuid.UUID, uuid.UUID(int=7), uuid.UUID(int=7)),
        (Colour, Colour.RED, Colour.RED),
        (Pair, Pair(1, "a"), Pair(1, "a")),
        (Options, {"top": 3}, {"top": 3}),
        (Prompt, Prompt("x"), Prompt("x")),
        (Prompt, {"text": "x", "limit": 3, "raw": bytes(BIG)}, Prompt("x", 3, raw=bytes(BIG))),
        (Answer, Answer([1], True), Answer([1], True)),
        (list[Answer] | None, [{"tokens": [1]}], [Answer([1])]),
        (Chat, Chat(name="n", isStream=True), Chat(name="n", isStream=True)),
        (Chat, {"name": "n", "turns": [1]}, Chat(name="n", turns=[1])),
        (Chat | None, None, None),
        (list[Chat], [{"name": "n"}], [Chat(name="n")]),
        (dict[str, Chat], {"k": {"name": "n"}}, {"k": Chat(name="n")}),
        (Chat | Done, {"reason": "r"}, Done(reason="r")),
        (Chat | list[int], [1], [1]),
        (array, array("d", [1]), array("d", [1])),
        (np.float32, np.float32(1.5), np.float32(1.5)),
        (complex, np.complex128(1j), np.complex128(1j)),
    ],
    ids=str,
)
def test_values_that_fit(hint: Any, value: Any, arrives: Any) -> None:
    got = request(hint, value)
    assert type(got) is type(arrives)
    assert got == arrives
    check = typed_checker(hint)
    assert check is not None
    assert check(value) is value
    assert check(arrives) is arrives


@pytest.mark.parametrize("hint", [np.ndarray, npt.NDArray[np.float32], np.ndarray | None])
@pytest.mark.parametrize("count", [3, BIG])
def test_arrays_that_fit(hint: Any, count: int) -> None:
    value = np.ones(count, "f4")
    assert np.array_equal(request(hint, value), value)
    check = typed_checker(hint)
    assert check is not None
    assert check(value) is value


@pytest.mark.parametrize("count", [3, BIG])
def test_arrays_in_fields(count: int) -> None:
    got = request(Prompt, Prompt("x", image=np.ones(count)))
    assert got.text == "x"
    assert np.array_equal(got.image, np.ones(count))
    got = request(list[np.ndarray], [np.ones(count)])
    assert np.array_equal(got[0], np.ones(count))


@pytest.mark.parametrize(
    ("hint", "value", "text"),
    [
        (str, 5, "request: Expected `str`, got `int`"),
        (int, "5", "request: Expected `int`, got `str`"),
        (int, 1.5, "request: Expected `int`, got `float`"),
        (bytes, "x", "request: Expected `bytes`, got `str`"),
        (bytes, "abcd", "request: Expected `bytes`, got `str`"),
        (bytearray, [1], "request: Expected `bytes`, got `array`"),
        (list[int], [1, "a"], "request[1]: Expected `int`, got `str`"),
        (dict[str, int], {"a": "b"}, "request[...]: Expected `int`, got `str`"),
        (dict[str, int], {1: 1}, "request key: Expected `str`, got `int`"),
        (Prompt, {"text": 1}, "request.text: Expected `str`, got `int`"),
        (Prompt, {"limit": 1}, "request: Object missing required field `text`"),
        (Prompt, {"text": "", "image": [1]}, "request.image: Expected `numpy.ndarray`, got `list`"),
        (Prompt, {"text": 1, "raw": bytes(BIG)}, "request.text: Expected `str`, got `int`"),
        (list[Answer], [{"tokens": []}, {"tokens": [None]}], "request[1].tokens[0]: Expected `int`, got `null`"),
        (Options, {"top": "x"}, "request.top: Expected `int`, got `str`"),
        (Literal["a"], "b", "request: Invalid enum value 'b'"),
        (Annotated[int, msgspec.Meta(gt=3)], 1, "request: Expected `int` >= 4"),
        (np.ndarray, [1.0], "request: Expected `numpy.ndarray`, got `list`"),
        (array, np.ones(3), "request: Expected `array.array`, got `numpy.ndarray`"),
        (Chat, {"turns": [1, "x"]}, "request: name: Field required; turns.1: Input should be a valid integer"),
        (Chat, [1], "request: Input should be a valid dictionary"),
        (list[Chat], [{"name": "n"}, {"name": 5}], "request[1]: name: Input should be a valid string"),
        (Chat | Done, {"x": 1}, "request: Chat.name: Field required; Done.reason: Field required"),
        (None | int, "x", "request: Expected `int | null`, got `str`"),
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_named(hint: Any, value: Any, text: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        request(hint, value)
    assert raised.value.reason.startswith(text)
    assert str(raised.value).startswith(f"Invalid request: {text}")
    check = typed_checker(hint, "item")
    assert check is not None
    with pytest.raises(TypeError, match=r"^item"):
        check(value)


def test_validator_of_a_user_that_raises() -> None:
    class Strict(pydantic.BaseModel):
        x: int

        @pydantic.field_validator("x")
        @classmethod
        def small(cls, x: int) -> int:
            if x > 3:
                raise ValueError("at most 3")
            return x

    @dataclasses.dataclass
    class Even:
        x: int

        def __post_init__(self) -> None:
            if self.x % 2:
                raise ValueError("odd")

    with pytest.raises(InvalidRequest, match="request: x: .*at most 3"):
        request(Strict, {"x": 4})
    with pytest.raises(InvalidRequest, match="request: odd"):
        request(Even, {"x": 3})
    assert request(Even, {"x": 2}) == Even(2)


@pytest.mark.parametrize("hint", [int, list[int], Prompt, Chat, np.ndarray, None])
@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x81", b"\xa1\xff", b"\x91" * 100_000, b"\xd4\x10\xc0"])
def test_malformed_bodies_are_no_invalid_requests(hint: Any, body: bytes) -> None:
    with pytest.raises((DecodeError, InvalidRequest)) as raised:
        typed_decoder(hint)(body)
    if hint is None or body in (b"", b"\xc1"):
        assert raised.type is DecodeError


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (list[int], [np.int64(1)]),
        (int, np.int64(1)),
        (float, 1),
        (float, np.float32(1)),
        (dict[str, Any], {"a": {1, 2}}),
        (list[dict[str, Any]], [Prompt("x")]),
        (list[float], collections.UserList([1.0]).data),
        (Prompt, {"text": "x"}),
        (str, Colour.RED),
        pytest.param(bytes, memoryview(bytes(BIG)), id="bytes-a large memoryview"),
    ],
    ids=str,
)
def test_response_fits_if_what_arrives_fits(hint: Any, value: Any) -> None:
    check = typed_checker(hint)
    assert check is not None
    assert check(value) is value


def test_raw_is_handed_over_undecoded() -> None:
    assert request(msgspec.Raw, [5]) == msgspec.Raw(b"\x91\x05")


def test_response_that_cannot_travel_is_named_too() -> None:
    check = typed_checker(list[int])
    assert check is not None
    with pytest.raises(TypeError, match=r"response\[0\]: <class .*Opaque'> cannot travel"):
        check([Opaque()])


def test_return_annotation_of_none_wants_none() -> None:
    check = typed_checker(type(None))
    assert check is not None
    assert check(None) is None
    with pytest.raises(TypeError):
        check(5)

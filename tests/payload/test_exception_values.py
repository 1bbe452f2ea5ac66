"""What an error holds arrives as it would in an answer; what cannot be in an answer arrives as text."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import http
import pathlib
import pickle
import socket
import threading
import types
import uuid
from array import array
from typing import Any

import attrs
import msgspec
import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.payload import test_fields
from tests.payload.test_codec import received
from triton_distributed.payload.codec import decode, encode
from triton_distributed.payload.exception_values import MAX_ARGS, MAX_STATE, MAX_TEXT
from triton_distributed.payload.exceptions import MAX_ERROR, decode_error, encode_error

UTC = datetime.UTC


class Failed(Exception):
    pass


class Slotted(Exception):
    __slots__ = ("value",)
    value: Any


class Deeper(Slotted):
    __slots__ = ("__hidden", "other", "unset")
    other: Any

    def hide(self, value: Any) -> None:
        self.__hidden = value

    def hidden(self) -> Any:
        return self.__hidden


class Careful(Exception):
    """Runs code of its own whenever an attribute is set."""

    __slots__ = ("value",)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AssertionError("a peer made this run")


def answer(value: Any) -> Any:
    return decode(*received(encode(value)))


def travel(error: BaseException) -> Any:
    return decode_error(encode_error(error), instance_id=1, request_id="r")


def alike(one: Any, other: Any) -> bool:
    """Equality that arrays, NaN and nested containers have too."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    return bool(one == other) or one != one


class Colour(enum.Enum):
    RED = "red"
    PAIR = (1, 2)


class Flags(enum.IntFlag):
    A = 1
    B = 2


class Word(enum.StrEnum):
    FULL = "full"


@dataclasses.dataclass
class Point:
    x: Any
    y: Any = dataclasses.field(init=False, default=3)


@dataclasses.dataclass(slots=True, kw_only=True)
class Slots:
    x: Any
    y: Any = dataclasses.field(init=False, default=3)


@dataclasses.dataclass
class Seeded:
    x: Any
    seed: dataclasses.InitVar[int] = 3


class Record(msgspec.Struct, rename="camel", tag=True):
    my_data: Any


class Model(pydantic.BaseModel):
    field: Any
    other: int = pydantic.Field(default=3, alias="theOther")


@attrs.define
class Attrs:
    x: Any
    _y: int = 2


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | texts
    | st.binary(max_size=8)
    | st.binary(max_size=8).map(bytearray)
    | st.binary(max_size=8).map(memoryview)  # type: ignore[arg-type]
    | st.sampled_from([*Colour, *Flags, Flags.A | Flags.B, *Word, http.HTTPStatus.NOT_FOUND, Colour.RED])
    | st.uuids()
    | st.dates()
    | st.times()
    | st.datetimes()
    | st.datetimes(timezones=st.just(UTC))
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.lists(st.floats(allow_nan=False), max_size=4).map(np.array)
    | st.sampled_from([np.float32(1.5), np.int64(3), np.complex64(1j), np.datetime64("2025-01-01"), array("d", [1.5])])
)
keys = texts | st.integers(-(2**63), 2**63) | st.binary(max_size=4) | st.sampled_from([*Word, *Flags, None])


def around(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Each kind of container."""
    return (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | inner.map(Point)
        | inner.map(lambda value: Slots(x=value))
        | inner.map(Seeded)
        | inner.map(Record)
        | inner.map(lambda value: Model(field=value, theOther=4))
        | inner.map(Attrs)
    )


odd = st.sampled_from([
    object(),
    2**64,
    "\ud800",
    1j,
    len,
    Failed,
    KeyError("k"),
    range(3),
    threading.Lock(),
    iter([1]),
    types.SimpleNamespace(held=1),
    np.array([object()]),
])  # fmt: skip
values = st.recursive(leaves, around, max_leaves=8) | st.frozensets(texts | st.integers(0, 9), max_size=4)
huge = st.builds(lambda: 10**5000)
any_values = st.recursive(leaves | odd | huge, around, max_leaves=8)


def errors_with(value: Any) -> list[tuple[BaseException, Any]]:
    """Errors that hold a value in each way, and how to find it where it arrives."""
    attribute, slot = Failed("x"), Slotted("x")
    attribute.value = slot.value = value  # type: ignore[attr-defined]
    return [
        (Failed("before", value, 3), lambda got: got.args[1]),
        (KeyError(value), lambda got: got.args[0]),
        (attribute, lambda got: got.value),
        (slot, lambda got: got.value),
    ]


@given(value=values)
def test_what_an_answer_may_hold_an_error_may_hold(value: Any) -> None:
    expected = answer(value)
    for error, find in errors_with(value):
        got = travel(error)
        assert isinstance(got, type(error))
        assert alike(find(got), expected)
        assert alike(find(travel(got)), expected), "passed on"


@given(value=any_values)
def test_what_cannot_be_in_an_answer_arrives_as_text_and_takes_nothing_with_it(value: Any) -> None:
    try:
        expected = [answer(value)]
    except (TypeError, ValueError):
        expected = []
    for error, find in errors_with(value):
        error.before, error.after = 1, {"k": [2]}  # type: ignore[attr-defined]
        got = travel(error)
        assert isinstance(got, type(error))
        assert (got.before, got.after) == (1, {"k": [2]})  # type: ignore[attr-defined]
        assert len(got.args) == len(error.args)
        if len(error.args) == 3:
            assert (got.args[0], got.args[2]) == ("before", 3)
        found = find(got)
        if expected:
            assert alike(found, expected[0])
        elif isinstance(found, str):
            assert len(found) <= MAX_TEXT
        else:
            assert isinstance(found, (list, dict)), "a container is kept, with the text of what cannot travel"
        if "<memory at" not in repr(found):  # as a local error that holds one cannot be pickled
            pickle.loads(pickle.dumps(got))


@pytest.mark.parametrize(("value", "arrives"), test_fields.CASES, ids=lambda each: type(each).__name__)
def test_every_field_of_an_object_arrives(value: Any, arrives: Any) -> None:
    for error, find in errors_with(value):
        assert find(travel(error)) == arrives


class TextFails:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


class AttributeFails:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


cyclic: list[Any] = [1]
cyclic.append({"again": cyclic})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2**80, str(2**80)),
        (10**5000, "an int of 16,610 bits"),
        ("a\ud800", "a\\ud800"),
        (1j, "1j"),
        (KeyError("k"), "KeyError('k')"),
        (pathlib.PurePosixPath("/a/b"), "/a/b"),
        (TextFails(), "<TextFails instance at"),
        (AttributeFails(), "AttributeFails"),
        (cyclic, "[1, {'again': [1, {'again': "),
        ("x" * MAX_STATE, "characters left out"),
        (bytes(MAX_STATE), "16,384 bytes: b'\\x00"),
        (bytearray(10**5), "100,000 bytes: b'\\x00"),
        (list(range(10**5)), "[0, 1, 2, 3, 4, 5, ...]"),
        (dict.fromkeys(range(10**5)), "{0: None, 1: None"),
        (np.zeros(10**6), "array([0., 0., 0."),
        (Point(list(range(10**5))), "Point(x=[0, 1, 2, 3, 4, 5, ...], y=3)"),
        (Model(field="x" * MAX_STATE), "Model(field='xxx"),
        ([object()] * 5000, "[<object object at"),
    ],
    ids=lambda each: str(type(each).__name__),
)
def test_the_text_of_a_value(value: Any, text: str) -> None:
    for error, find in errors_with(value):
        assert text in find(travel(error))
        assert len(find(travel(error))) <= MAX_TEXT


def test_a_container_keeps_the_parts_that_can_travel() -> None:
    lock, path = threading.Lock(), pathlib.PurePosixPath("/a")
    error = travel(
        Failed({"a": 1, 3: [lock, 2], lock: 4}, Point([1j, 5]), Record({lock}), Model(field=lock), {path: 1})
    )
    assert error.args[:2] == ({"a": 1, 3: [repr(lock), 2], repr(lock): 4}, {"x": ["1j", 5], "y": 3})
    assert error.args[2:] == ({"myData": [repr(lock)]}, {"field": repr(lock), "theOther": 3}, {"/a": 1})


def test_what_is_too_much_is_named() -> None:
    raised = Failed("x")
    for number in range(100):
        setattr(raised, f"a{number}", "y" * 1000)
    raised.small = 1  # type: ignore[attr-defined]
    error = travel(raised)
    assert error.a0 == "y" * 1000
    assert not hasattr(error, "a99")
    assert "attribute(s) were too large to travel: a" in error.__notes__[0]
    error = travel(Failed(*range(1000)))
    assert error.args == tuple(range(MAX_ARGS))
    assert "the error has 1,000 args" in error.__notes__[0]
    error = travel(Failed(*["y" * 1000] * 40))
    assert len(error.args) == 40, "an arg that has no room leaves its place"


def test_slots_of_several_classes() -> None:
    raised = Deeper("x")
    raised.value, raised.other = 1, uuid.UUID(int=2)
    raised.hide(3)
    raised.free = 4  # type: ignore[attr-defined]
    error = travel(raised)
    assert isinstance(error, Deeper)
    assert (error.value, error.other, error.hidden(), error.free) == (1, str(uuid.UUID(int=2)), 3, 4)  # type: ignore[attr-defined]
    assert not hasattr(error, "unset")
    again: Any = pickle.loads(pickle.dumps(error))
    assert (again.value, again.other, again.hidden(), again.free) == (1, str(uuid.UUID(int=2)), 3, 4)
    assert travel(error).hidden() == 3


def test_slots_are_filled_without_the_classes_own_code() -> None:
    raised = Careful("x")
    Careful.value.__set__(raised, 5)  # type: ignore[attr-defined]
    assert travel(raised).value == 5


def test_slots_of_a_class_that_is_not_here_are_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    raised = Slotted("x")
    raised.value = 5
    data = encode_error(raised)
    monkeypatch.delitem(globals(), "Slotted")
    error: Any = decode_error(data, instance_id=1, request_id="")
    assert error.value == 5


def test_errors_with_odd_parts_of_their_own() -> None:
    class OwnArgs(Exception):
        args = "the class's own"  # type: ignore[assignment]

    class OwnReduce(Exception):
        def __reduce__(self) -> Any:
            raise AssertionError("nobody pickles it")

        def __getstate__(self) -> Any:
            raise AssertionError("nobody pickles it")

    class OwnDict(Exception):
        @property
        def __dict__(self) -> Any:  # type: ignore[override]
            raise RuntimeError("hidden")

    for kind in (OwnArgs, OwnReduce, OwnDict):
        assert travel(kind("a", Colour.RED)).args == ("a", "red")
    error = Failed("a")
    error.__dict__[3] = "no name"  # type: ignore[index]
    error.__dict__["\ud800"] = "no text"
    error.cause = error  # type: ignore[attr-defined]
    got = travel(error)
    assert got.cause == "Failed('a')"
    assert 3 not in got.__dict__
    assert got.__dict__["\\ud800"] == "no text"


def test_errors_of_the_standard_library() -> None:
    error = travel(OSError(http.HTTPStatus.NOT_FOUND, "gone", pathlib.PurePosixPath("/a")))
    assert (error.errno, error.strerror, error.filename) == (404, "gone", "/a")
    error = travel(socket.gaierror(socket.EAI_NONAME, "unknown"))
    assert isinstance(error, socket.gaierror)
    assert error.errno == socket.EAI_NONAME
    error = travel(StopIteration(Colour.RED))
    assert error.args == ("red",)
    error = travel(SystemExit(Word.FULL))
    assert error.args == ("full",)
    group = travel(ExceptionGroup("several", [KeyError(Colour.RED), Failed(decimal.Decimal("1.5"))]))
    assert [each.args for each in group.exceptions] == [("red",), ("1.5",)]


def test_a_value_that_cannot_be_read_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_error(Failed("a", np.arange(3), 5))
    monkeypatch.setitem(__import__("sys").modules, "numpy", None)
    error = decode_error(data, instance_id=1, request_id="")
    assert (error.args[0], error.args[2]) == ("a", 5)
    assert "NumPy is not installed here" in error.args[1]


@given(value=any_values, count=st.sampled_from([1, 12]))
def test_an_error_is_never_too_large(value: Any, count: int) -> None:
    error = Failed(*[value] * count)
    for number in range(count):
        setattr(error, f"a{number}", [value, "x" * 15_000])
    data = encode_error(ExceptionGroup("g", [error] * count))
    assert len(data) <= MAX_ERROR
    assert isinstance(decode_error(data, instance_id=1, request_id=""), ExceptionGroup)

"""Whatever keeps a value from travelling, the text names the type of the value and its path."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import re
import threading
import types
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_distributed.errors import InvalidRequest
from triton_distributed.payload.codec import encode
from triton_distributed.payload.typed import typed_decoder
from triton_distributed.payload.unsendable import explain


class Whole(int):
    pass


class Large(enum.IntEnum):
    VALUE = 2**70


class Flags(enum.IntFlag):
    VALUE = 2**70


class Holds(enum.Enum):
    LARGE = 2**70


class Nowhere(datetime.tzinfo):
    """A time zone that does not say what its offset is."""


class Wrong(datetime.tzinfo):
    def utcoffset(self, when: Any) -> Any:
        return 5


class Overflows(datetime.tzinfo):
    def utcoffset(self, when: Any) -> Any:
        raise OverflowError("beyond its table")


class Released:
    """Raises what has no text."""

    def __dlpack__(self) -> None:
        raise AssertionError

    def __dlpack_device__(self) -> Any:
        raise NotImplementedError


@dataclasses.dataclass
class Point:
    x: Any
    y: Any = 0


class Record(msgspec.Struct):
    held: Any


EAST = datetime.timezone(datetime.timedelta(hours=5))
WEST = datetime.timezone(-datetime.timedelta(hours=5))
INT, DATE = "an int beyond 64 bits cannot travel", "a datetime that has no date in UTC cannot travel"

CASES: list[tuple[Any, str]] = [
    (2**64, INT),
    (-(2**63) - 1, INT),
    (Whole(2**70), "a Whole (an int beyond 64 bits) cannot travel"),
    (Large.VALUE, "a Large (an int beyond 64 bits) cannot travel"),
    (Flags.VALUE, "a Flags (an int beyond 64 bits) cannot travel"),
    (Holds.LARGE, "a Holds (an int beyond 64 bits) cannot travel"),
    (datetime.datetime.min.replace(tzinfo=EAST), f"{DATE} (date value out of range): send its .isoformat()"),
    (datetime.datetime.max.replace(tzinfo=WEST), f"{DATE} (date value out of range): send its .isoformat()"),
    (datetime.datetime(2025, 1, 1, tzinfo=Overflows()), f"{DATE} (beyond its table)"),  # type: ignore[abstract]
    (datetime.time(1, tzinfo=Overflows()), "a time out of range cannot travel (beyond its table): send it as text"),  # type: ignore[abstract]
    (datetime.datetime(2025, 1, 1, tzinfo=Nowhere()), "a datetime cannot travel: "),  # type: ignore[abstract]
    (datetime.datetime(2025, 1, 1, tzinfo=Wrong()), "a datetime cannot travel: tzinfo.utcoffset() must return"),  # type: ignore[abstract]
    (datetime.time(1, tzinfo=Nowhere()), "a time cannot travel: "),  # type: ignore[abstract]
    ("\udc80", "text with a lone surrogate cannot travel (a str"),
    (types.SimpleNamespace(x=1), "<class 'types.SimpleNamespace'> cannot travel"),
    (threading.Lock(), "<class '_thread.lock'> cannot travel"),
    (types.MappingProxyType({"x": 1}), "<class 'mappingproxy'> cannot travel: send dict(…) of it"),
    (Released(), "a Released cannot travel: NotImplementedError"),
    (np.array([2**70], dtype=object), "an array of dtype object holds Python objects and cannot travel"),
]
PLACES: list[tuple[Any, str]] = [
    (lambda value: value, ""),
    (lambda value: [1, value], "[1]"),
    (lambda value: {"a": (1, {"b": value})}, '["a"][1]["b"]'),
    (lambda value: Point(1, [value]), ".y[0]"),
    (lambda value: Record(Point(value)), ".held.x"),
    (lambda value: {"bytes": bytes(20_000), "a": value}, '["a"]'),
]


@pytest.mark.parametrize(("value", "text"), CASES, ids=lambda each: type(each).__name__)
def test_the_type_and_the_path_are_named(value: Any, text: str) -> None:
    for wrap, path in PLACES:
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(f'request{path}: {text}')}"):
            encode(wrap(value), "request")


def can_be_a_key(value: Any) -> bool:
    try:
        hash(value)
    except Exception:
        return False
    return True


KEYS = [each for each in CASES if can_be_a_key(each[0])]


@pytest.mark.parametrize(("value", "text"), KEYS, ids=lambda each: type(each).__name__)
def test_so_they_are_for_keys(value: Any, text: str) -> None:
    for key, path in ((value, r"request\[0\] key .*: "), ((1, value), r"request\[0\] key .*\[1\]: ")):
        with pytest.raises((TypeError, ValueError), match=f"^{path}{re.escape(text)}"):
            encode([{key: 1}], "request")


OUT_OF_RANGE = (
    st.integers(min_value=2**64)
    | st.integers(max_value=-(2**63) - 1)
    | st.integers(2**64, 2**80).map(Whole)
    | st.datetimes(max_value=datetime.datetime(1, 1, 1, 4), timezones=st.just(EAST))
    | st.datetimes(min_value=datetime.datetime(9999, 12, 31, 20), timezones=st.just(WEST))
)


@given(value=OUT_OF_RANGE)
def test_what_is_out_of_range_is_named_by_its_type(value: Any) -> None:
    name = type(value).__name__
    with pytest.raises(ValueError, match=rf"^value\[0\]: an? {name}\b.* cannot travel"):
        encode([value])


@pytest.mark.parametrize(
    "value",
    [
        datetime.timedelta.max,
        datetime.timedelta.min,
        datetime.datetime.max.replace(tzinfo=datetime.UTC),
        datetime.datetime.min.replace(tzinfo=datetime.UTC),
        datetime.date.min,
        decimal.Decimal("1e999999"),
        float("inf"),
        np.longdouble("1e300") ** 10,
        2**64 - 1,
        -(2**63),
    ],
    ids=repr,
)
def test_what_is_large_and_within_its_range_travels(value: Any) -> None:
    encode([value])


def test_what_the_encoder_says_of_sizes_is_told_with_type_and_path() -> None:
    def too_long(value: object) -> None:
        if value == "long":
            raise ValueError("Can't encode strings longer than 2**32 - 1")

    error = explain({"a": ["long"]}, ValueError("of the whole"), "item", too_long)
    assert str(error) == 'item["a"][0]: a str cannot travel: Can\'t encode strings longer than 2**32 - 1'


def test_the_type_is_named_where_a_value_nests_too_deeply() -> None:
    deep: Any = ()
    for _ in range(10_000):
        deep = (deep,)
    with pytest.raises(ValueError, match=r"^value(\[0\])+: it nests too deeply .* \(a tuple\)"):
        encode(deep)
    again: dict[str, Any] = {}
    again["a"] = [again]
    with pytest.raises(ValueError, match=r'^value\["a"\]\[0\]: it contains itself.* \(a dict\)'):
        encode(again)


@pytest.mark.parametrize(("hint", "value"), [(np.uint8, 300), (list[np.int8], [1, -129])])
def test_a_number_beyond_the_annotated_type_is_an_invalid_request(hint: Any, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"request.*: Python integer -?\d+ out of bounds"):
        typed_decoder(hint)(encode(value))

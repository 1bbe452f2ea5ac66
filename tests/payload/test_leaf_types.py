"""Leaf values of libraries travel as text, and come back as what they were where a handler's types say so."""

from __future__ import annotations

import collections
import datetime
import fractions
import ipaddress
import pathlib
import re
import subprocess
import sys
import zoneinfo
from typing import Any

import pydantic
import pytest

from tests.payload.test_codec import BIG, containers, travel
from triton_distributed.payload.codec import encode

LEAVES: list[tuple[Any, Any]] = [
    (pathlib.Path("/a/b"), "/a/b"),
    (pathlib.PureWindowsPath("c:/a"), "c:\\a"),
    (ipaddress.ip_address("1.2.3.4"), "1.2.3.4"),
    (ipaddress.ip_network("2001:db8::/32"), "2001:db8::/32"),
    (ipaddress.ip_interface("1.2.3.4/24"), "1.2.3.4/24"),
    (fractions.Fraction(1, 3), "1/3"),
    (zoneinfo.ZoneInfo("UTC"), "UTC"),
    (re.compile("a+"), "a+"),
    (re.compile(b"a+"), b"a+"),
    (re.compile("(?i)a"), "(?i)a"),
    (pydantic.HttpUrl("http://a.example"), "http://a.example/"),
    (pydantic.PostgresDsn("postgres://u:p@a,b/db"), "postgres://u:p@a,b/db"),
    (pydantic.SecretStr("hidden"), "hidden"),
    (pydantic.SecretBytes(b"hidden"), b"hidden"),
    (pydantic.Secret[int](5), 5),
]


@pytest.mark.parametrize(("value", "arrives"), LEAVES, ids=str)
def test_leaves_arrive_as_text(value: Any, arrives: Any) -> None:
    for wrapped, find in containers(value):
        got = find(travel(wrapped))
        assert type(got) is type(arrives)
        assert got == arrives
    assert travel({value: 1}) == {arrives: 1}


def test_a_deque_arrives_as_a_list() -> None:
    value = collections.deque([1, bytearray(b"x"), bytes(BIG)], maxlen=3)
    assert travel(value) == [1, bytearray(b"x"), bytes(BIG)]
    assert type(travel([collections.deque([bytearray(b"x")])])[0][0]) is bytearray


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (re.compile("a", re.IGNORECASE), r"value\[0\]: a pattern with flags cannot travel"),
        (datetime.UTC, r"value\[0\]: <class 'datetime.timezone'> cannot travel"),
        (collections.deque([object()]), r"value\[0\]\[0\]: <class 'object'> cannot travel"),
    ],
)
def test_what_text_does_not_say_is_refused(value: Any, text: str) -> None:
    with pytest.raises(TypeError, match=f"^{text}"):
        encode([value])


def test_classes_that_only_look_like_leaves_are_refused() -> None:
    class Lazy:
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda: "text"

    with pytest.raises(TypeError, match="cannot travel"):
        encode(Lazy())


WITHOUT_PYDANTIC = """
import sys
sys.modules["pydantic"] = None
import dataclasses, ipaddress, pathlib
from triton_distributed.payload.codec import encode
from triton_distributed.payload.typed import typed_decoder

@dataclasses.dataclass
class Job:
    path: pathlib.Path
    host: ipaddress.IPv4Address

job = Job(pathlib.Path("/a"), ipaddress.IPv4Address("1.2.3.4"))
assert typed_decoder(Job)(encode(job)) == job
assert typed_decoder(list[pathlib.PurePath])(encode(["/a"])) == [pathlib.PurePath("/a")]

@dataclasses.dataclass
class Other:
    n: int

for hint in (Job | Other, list[Job | Other], pathlib.Path | int):
    try:
        typed_decoder(hint)
    except TypeError as error:
        assert "pip install pydantic" in str(error), error
    else:
        raise AssertionError(hint)
"""


def test_typed_leaves_need_no_pydantic() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_PYDANTIC], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

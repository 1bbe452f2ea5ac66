"""Items as server-sent events and as lines."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import pydantic
import pytest

from triton_distributed.integrations.http.text import Event, to_event, to_line


@dataclass
class Point:
    x: int


class Record(msgspec.Struct):
    name: str


class Model(pydantic.BaseModel):
    word: str = pydantic.Field(alias="Word")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("hello", "data: hello\n\n"),
        ("", "data: \n\n"),
        (" leading", "data:  leading\n\n"),
        ("a\nb\r\nc\rd", "data: a\ndata: b\ndata: c\ndata: d\n\n"),
        ("ends\n", "data: ends\ndata: \n\n"),
        ("ü→", "data: ü→\n\n"),
        ("\u2028\x85\x0c", "data: \u2028\x85\x0c\n\n"),  # Line ends for Python, but not for this format.
        (None, "data: null\n\n"),
        ({"text": "a\nb"}, 'data: {"text":"a\\nb"}\n\n'),
        (Point(1), 'data: {"x":1}\n\n'),
        (Record("r"), 'data: {"name":"r"}\n\n'),
        (Model(Word="w"), 'data: {"Word":"w"}\n\n'),
        ([Point(1), Model(Word="w")], 'data: [{"x":1},{"Word":"w"}]\n\n'),
        ({"v": np.arange(2.0), "n": np.float32(1.5)}, 'data: {"v":[0.0,1.0],"n":1.5}\n\n'),
        (float("nan"), "data: null\n\n"),
        (Event("[DONE]"), "data: [DONE]\n\n"),
        (Event({"a": 1}, "token", "7"), 'id: 7\nevent: token\ndata: {"a":1}\n\n'),
    ],
)
def test_an_item_becomes_an_event(value, expected):
    assert to_event(value).decode() == expected


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\0b"])
def test_a_field_cannot_forge_another(text):
    with pytest.raises(ValueError, match="event="):
        Event("x", event=text)
    with pytest.raises(ValueError, match="id="):
        Event("x", id=text)


@pytest.mark.parametrize("encode", [to_event, to_line])
def test_what_json_cannot_hold_is_named(encode):
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        encode({"a": object()})


def test_a_line_is_json_also_for_text():
    assert to_line("a\nb") == b'"a\\nb"\n'
    assert to_line(Point(1)) == b'{"x":1}\n'

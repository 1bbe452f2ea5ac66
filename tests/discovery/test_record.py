"""Records: what is written can be read, what is read is looked at twice."""

from __future__ import annotations

import datetime
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_distributed.discovery.base import same
from triton_distributed.discovery.record import MAX_RECORD_BYTES, BadRecord, decode, encode, key, prefix, prefix_of
from triton_distributed.names import MAX_INSTANCE_ID, MAX_NAME_LENGTH, EndpointName, Instance

NAME = EndpointName("ns", "comp", "generate")
GOOD = {
    "version": 1,
    "namespace": "ns",
    "component": "comp",
    "endpoint": "generate",
    "id": 7,
    "addresses": ["tcp://127.0.0.1:1"],
    "host": "h",
    "metadata": {"a": [1, None]},
    "pid": 12,
}

text = st.text(st.characters(exclude_categories=["Cs"]))
parts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=MAX_NAME_LENGTH) | st.sampled_from(
    [".", "..", "/", "a.b", "a/b", "_", "-", " ", "é" * MAX_NAME_LENGTH]
)
names = st.builds(EndpointName, parts, parts, parts)
numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
ids = st.integers(1, MAX_INSTANCE_ID)


def test_it_is_a_small_json_object_that_a_person_can_read():
    instance = Instance(NAME, 7, ("tcp://127.0.0.1:1",), "h", {"a": [1, None]})
    assert json.loads(encode(instance, pid=12)) == GOOD


@given(names, ids, st.lists(text), values)
def test_what_is_written_can_be_read(name: EndpointName, id: int, addresses: list[str], value: object):
    instance = Instance(name, id, tuple(addresses), "host", {"value": value})
    assert same(decode(encode(instance)), instance)


def test_the_status_port_is_named_only_if_there_is_one():
    url = "http://10.0.0.7:9090"
    written = encode(Instance(NAME, 7, (), status_url=url))
    assert json.loads(written)["status_url"] == url
    assert decode(written).status_url == url
    assert decode(json.dumps(GOOD).encode()).status_url == ""
    assert not same(decode(written), Instance(NAME, 7, ()))


@given(names, ids)
def test_a_key_is_a_file_name_and_says_whose_it_is(name: EndpointName, id: int):
    made = key(name, id)
    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", made)
    assert len(made) <= 135
    assert prefix_of(made) == prefix(name)


@given(names, names, ids, ids)
def test_two_keys_are_the_same_only_for_the_same(one: EndpointName, other: EndpointName, id: int, other_id: int):
    assert (key(one, id) == key(other, other_id)) == ((one, id) == (other, other_id))
    assert (prefix(one) == prefix(other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "b", "generate"), ("a", "b", "generate2")),
        (("a.b", "c", "d"), ("a", "b.c", "d")),
        (("a/b", "c", "d"), ("a_b", "c", "d")),
        (("a", "b", "é"), ("a", "b", "è")),
        (("x" * 255, "y", "z"), ("x" * 254 + "y", "y", "z")),
    ],
)
def test_names_that_look_alike_stay_apart(one, other):
    assert prefix(EndpointName(*one)) != prefix(EndpointName(*other))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x",
        ".json",
        "README.json",
        "a.b.c.0123456789abcdef.json",
        key(NAME, 7)[:-1],
        key(NAME, 7) + "~",
        key(NAME, 7) + "\n",
        "." + ".." * 3,
        "../" + key(NAME, 7),
        key(NAME, 7).upper(),
    ],
)
def test_what_is_no_key_has_no_prefix(name: str):
    assert prefix_of(name) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version 2"),
        ({"version": None}, "version"),
        ({"id": 0}, "id"),
        ({"id": 2**63}, "id"),
        ({"id": -1}, "id"),
        ({"id": "7"}, "id"),
        ({"namespace": ""}, "namespace"),
        ({"component": "a\0b"}, "component"),
        ({"endpoint": "x" * 256}, "endpoint"),
        ({"addresses": "tcp://x:1"}, "addresses"),
        ({"addresses": [1]}, "addresses"),
        ({"metadata": []}, "metadata"),
        ({"host": 3}, "host"),
        ({"since": "now"}, "since"),
    ],
)
def test_a_wrong_field_is_named(change, says):
    with pytest.raises(BadRecord) as caught:
        decode(json.dumps({**GOOD, **change}).encode())
    assert says in str(caught.value)


@pytest.mark.parametrize("field", ["version", "namespace", "component", "endpoint", "id", "addresses"])
def test_a_missing_field_is_named(field):
    with pytest.raises(BadRecord) as caught:
        decode(json.dumps({name: value for name, value in GOOD.items() if name != field}).encode())
    assert field in str(caught.value)


def test_a_later_versions_fields_are_passed_over():
    assert decode(json.dumps({**GOOD, "colour": {"a": 1}}).encode()).id == 7


@pytest.mark.parametrize(
    "data", [b"", b"{", b"null", b"[]", b"\xff\xfe", b"\0" * 100, b'{"id": 1}', b"[" * 60_000, b'{"a":' * 10_000]
)
def test_what_is_no_record_is_bad(data: bytes):
    with pytest.raises(BadRecord):
        decode(data)


def test_it_says_whose_it_is_and_since_when():
    read = decode(encode(Instance(NAME, 7, ("tcp://h:1",), since=1.5), pid=12))
    assert (read.pid, read.since) == (12, 1.5)
    assert decode(encode(read)).pid == 12
    earlier = decode(json.dumps({**GOOD, "pid": 0}).encode())  # written by a version without `since`
    assert (earlier.pid, earlier.since) == (0, 0.0)


def test_every_beginning_of_a_record_is_bad():
    data = json.dumps(GOOD).encode()
    for length in range(len(data)):
        with pytest.raises(BadRecord):
            decode(data[:length])


@given(st.binary(max_size=300))
def test_no_bytes_do_anything_else(data: bytes):
    try:
        decode(data)
    except BadRecord:
        pass


def test_the_limit_holds_both_ways():
    with pytest.raises(BadRecord, match="65,536: less metadata"):
        encode(Instance(NAME, 7, (), "", {"a": "x" * MAX_RECORD_BYTES}))
    with pytest.raises(BadRecord, match="65,536"):
        decode(json.dumps(GOOD).encode().ljust(MAX_RECORD_BYTES + 1))
    assert decode(json.dumps(GOOD).encode().ljust(MAX_RECORD_BYTES)).id == 7


def nested(depth: int) -> list[object]:
    made: list[object] = []
    for _ in range(depth):
        made = [made]
    return made


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (object(), "metadata.value is of type object"),
        (1j, "complex"),
        (b"x", "bytes"),
        ({1, 2}, "set"),
        (datetime.date(2026, 1, 2), "date"),
        (math.nan, "metadata.value is nan"),
        (math.inf, "inf"),
        ({"a": [0, {"b": math.nan}]}, r"metadata.value.a\[1\].b is nan"),
        ({1: 2}, "metadata.value has the key 1"),
        ("\ud800", ""),
        (nested(100_000), ""),
    ],
    ids=lambda each: each if isinstance(each, str) and each.isascii() else "",
)
def test_metadata_that_has_no_json_form_is_refused(value, says):
    with pytest.raises(BadRecord, match=f"metadata must be plain JSON values: .*{says}"):
        encode(Instance(NAME, 7, (), "", {"value": value}))


def test_a_tuple_becomes_a_list():
    assert decode(encode(Instance(NAME, 7, (), "", {"value": (1, (2,))}))).metadata == {"value": [1, [2]]}

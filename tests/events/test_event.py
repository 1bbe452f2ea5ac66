"""An event's bytes, and the names of subjects and streams."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_distributed.errors import DecodeError, InvalidName
from triton_distributed.events.event import pack, unpack
from triton_distributed.names import MAX_INSTANCE_ID, service_name, stream_name, subject_token
from triton_distributed.runtime.events import component_subject, namespace_subject

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=255)


@pytest.mark.parametrize("payload", [None, 1, "é", [1, {"a": b"x"}], b"x" * 100_000, {"a": bytearray(50_000), "b": []}])
def test_a_payload_arrives_with_its_publisher(payload):
    assert unpack(pack(payload, MAX_INSTANCE_ID)) == (payload, MAX_INSTANCE_ID)


def test_arrays_arrive_writable_and_apart():
    sent: dict[str, Any] = {
        "small": np.arange(3),
        "large": np.arange(50_000.0),
        "list": [np.ones((200, 200)), b"y" * 20_000],
    }
    data = pack(sent, 7)
    one: Any = unpack(data)[0]
    other: Any = unpack(data)[0]
    one["large"][:] = 0
    one["list"][0][:] = 0
    assert np.array_equal(other["large"], sent["large"])
    assert np.array_equal(other["small"], sent["small"])
    assert np.array_equal(other["list"][0], sent["list"][0])
    assert other["list"][1] == sent["list"][1]


@given(st.binary(max_size=200))
def test_whatever_arrives_is_read_or_refused(data):
    for each in (data, pack({"a": b"x" * 20_000}, 1)[:13] + data):
        try:
            unpack(each)
        except DecodeError:
            pass


@pytest.mark.parametrize("cut", [0, 5, 12, 20, 100, -1])
def test_a_part_is_refused(cut):
    with pytest.raises(DecodeError):
        unpack(pack({"a": b"x" * 20_000}, 1)[:cut])


@pytest.mark.parametrize(
    ("namespace", "component", "name", "subject"),
    [
        ("triton-init", "backend", "kv_events", "triton_init_backend_720278f8.events.kv_events"),
        ("examples/pipeline", "frontend", "kv-hit-rate", "examples_pipeline_frontend_d5248d53.events.kv-hit-rate"),
        ("test-nixl", "prefill", "a/b", "test_nixl_prefill_9b22676e.events.a/b"),
        ("Ns-A", "Comp.B", "a.b", "ns_a_comp_b_6188540c.events.a%2Eb"),
    ],
)
def test_subjects_of_components(namespace, component, name, subject):
    assert component_subject(namespace, component, name) == subject


@pytest.mark.parametrize(
    ("namespace", "name", "subject"),
    [
        ("dynamo", "kv_events", "namespace.dynamo.kv_events"),
        ("examples/pipeline", "Hit-Rate", "namespace.examples/pipeline.Hit-Rate"),
        ("a.b", "c d", "namespace.a%2Eb.c%20d"),
        ("*", ">", "namespace.%2A.%3E"),
        ("é", "%2A", "namespace.%C3%A9.%252A"),
        ("$SYS", "\N{NO-BREAK SPACE}", "namespace.$SYS.%C2%A0"),
    ],
)
def test_subjects_of_namespaces(namespace, name, subject):
    assert namespace_subject(namespace, name) == subject


@given(NAMES, NAMES)
def test_any_name_is_one_token_of_its_own(one, other):
    for name in (one, other):
        assert re.fullmatch(r"[!-~]{1,255}", subject_token(name))
        assert not set(subject_token(name)) & set(".*>")
        assert re.fullmatch(r"queue_[a-z0-9_]{1,150}_[0-9a-f]{16}", stream_name(name, other, one))
    assert (subject_token(one) == subject_token(other)) == (one == other)


def test_long_names_differ_in_their_hash():
    one, other = "é" * 254 + "a", "é" * 254 + "b"
    assert len(subject_token(one)) <= 255
    assert subject_token(one) != subject_token(other)
    assert stream_name("n", "c", one) != stream_name("n", "c", other)
    assert len(service_name(one, one)) + len(subject_token(one)) < 4096 - 1024  # what NATS takes, with a reply subject


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 256, None, "\x7f"])
def test_what_cannot_name_an_event(name):
    with pytest.raises(InvalidName, match="event"):
        component_subject("n", "c", name)
    with pytest.raises(InvalidName, match="event"):
        namespace_subject("n", name)

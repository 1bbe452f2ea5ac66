"""The first frame of each side."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.joined import frames_of
from triton_distributed.errors import RemoteProtocolError
from triton_distributed.wire import frames as f
from triton_distributed.wire.hello import MAGIC, Hello, agree, hello_frame, read_hello


def said(**fields) -> bytes:
    return MAGIC + msgspec.msgpack.encode(fields)


@pytest.mark.parametrize(
    "hello",
    [
        Hello(),
        Hello(
            version=3,
            lowest=2,
            agent="x",
            max_message=1 << 40,
            max_streams=0,
            window=1,
            nonce=2**63,
            features=["a"],
            challenge=bytes(32),
        ),
    ],
    ids=["defaults", "all fields"],
)
def test_a_hello_is_read_as_it_was_written(hello):
    (frame,) = frames_of(hello_frame(hello))
    assert frame[:3] == (f.HELLO, 0, 0)
    assert len(frame[3]) <= f.MAX_HELLO
    assert read_hello(frame[3]) == hello


def test_what_a_later_version_adds_is_ignored():
    assert read_hello(said(version=9, colour="blue", deep={"a": [1, {"b": None}]})) == Hello(version=9)


def test_the_form_that_all_versions_share():
    assert hello_frame(Hello(nonce=5)) == bytes.fromhex("0c000000 01 00 0000000000000000") + b"TRD\0\x81\xa5nonce\x05"


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        pytest.param(b"", "does not speak this protocol", id="empty"),
        pytest.param(b"TRD", "does not speak this protocol", id="half the magic"),
        pytest.param(b"\x16\x03\x01\x02\x00", "does not speak this protocol", id="TLS"),
        pytest.param(MAGIC, "cannot be read", id="magic alone"),
        pytest.param(MAGIC + b"\xc1", "cannot be read", id="no msgpack"),
        pytest.param(MAGIC + b"\x93\x01\x02\x03", "cannot be read", id="a list"),
        pytest.param(MAGIC + b"\x81\xa1z" + b"\x91" * 4000, "cannot be read", id="nested"),
        pytest.param(MAGIC + b"\x81\xa5agent\xa2\xff\xff", "cannot be read", id="text that is none"),
        pytest.param(MAGIC + b"\x81\xa8features\xdd\xff\xff\xff\xff", "cannot be read", id="endless list"),
        pytest.param(said(version="one"), "cannot be read", id="version in words"),
        pytest.param(said(window=0), "limits", id="no window"),
        pytest.param(said(window=-1), "limits", id="negative window"),
        pytest.param(said(window=2**32), "limits", id="a window above what CREDIT can say"),
        pytest.param(said(max_message=-1), "limits", id="negative message"),
        pytest.param(said(max_message=f.SMALL - 1), "limits", id="messages below what is sent whole"),
        pytest.param(said(max_streams=-1), "limits", id="negative streams"),
    ],
)
def test_what_is_no_hello(payload, says):
    with pytest.raises(RemoteProtocolError, match=says):
        read_hello(payload)


@given(st.binary(max_size=100))
def test_any_bytes_are_a_hello_or_a_protocol_error(data):
    for payload in (data, MAGIC + data, MAGIC + b"\x81" + data):
        try:
            hello = read_hello(payload)
        except RemoteProtocolError:
            continue
        assert hello.window > 0


@pytest.mark.parametrize(
    ("ours", "theirs", "version"),
    [
        ((1, 1), (1, 1), 1),
        ((1, 1), (5, 1), 1),
        ((3, 1), (5, 2), 3),
        ((3, 2), (2, 1), 2),
        ((1, 1), (2, 2), 0),
        ((5, 4), (3, 1), 0),
        ((1, 1), (0, 0), 0),
        ((1, 1), (1, 2), 0),
    ],
)
def test_the_version_that_both_speak(ours, theirs, version):
    one, other = (Hello(version=high, lowest=low) for high, low in (ours, theirs))
    assert agree(one, other) == agree(other, one) == version

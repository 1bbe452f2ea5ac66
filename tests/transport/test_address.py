"""Addresses as text."""

from __future__ import annotations

import pytest

from triton_distributed.errors import ConfigError
from triton_distributed.transport.address import Address, parse_list


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:///tmp/a b/w.sock", Address("unix", "/tmp/a b/w.sock")),
        ("tcp://localhost:7000", Address("tcp", "localhost", 7000)),
        ("tcp://127.0.0.1:0", Address("tcp", "127.0.0.1", 0)),
        ("tcp://[::1]:65535", Address("tcp", "::1", 65535)),
        ("memory://w", Address("memory", "w")),
        ("nats://a_b_1234abcd.generate-1f", Address("nats", "a_b_1234abcd.generate-1f")),
    ],
)
def test_read_and_written(text, address):
    assert Address.parse(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp",
        "tcp://",
        "tcp://host",
        "tcp://:80",
        "tcp://host:",
        "tcp://host:x",
        "tcp://host:-1",
        "tcp://host:65536",
        "unix://",
        "unix://relative",
        "nats://",
        "nats://a b",
        "nats://a.*",
        "nats://a.>",
        "nats://a..b",
        "nats://.a",
        "nats://a.",
        "nats://" + "a" * 1001,
        "http://host:80",
        "memory://",
    ],
)
def test_what_is_no_address(text):
    with pytest.raises(ConfigError, match="address|path") as caught:
        Address.parse(text, "TRD_LISTEN")
    assert str(caught.value).startswith("TRD_LISTEN=")


def test_a_list():
    assert parse_list(" unix:///w.sock, tcp://[::]:0 ,", "TRD_LISTEN") == (
        Address("unix", "/w.sock"),
        Address("tcp", "::", 0),
    )


@pytest.mark.parametrize(
    ("text", "names"), [("tcp://a:1,nonsense", "'nonsense'"), (",", "','"), ("tcp://a:1 tcp://b:2", "'tcp://a:1 tcp")]
)
def test_what_is_no_list(text, names):
    with pytest.raises(ConfigError, match=f"TRD_LISTEN={names}"):
        parse_list(text, "TRD_LISTEN")

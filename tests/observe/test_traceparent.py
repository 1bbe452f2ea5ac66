"""W3C Trace Context: which `traceparent` is valid, and what becomes of an invalid one."""

from __future__ import annotations

from typing import Any

import pytest

from triton_distributed.observe.traceparent import drop_invalid, parse

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    "text", [f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00", f"01-{TRACE}-{SPAN}-01-later.field"]
)
def test_valid(text: str) -> None:
    assert parse(text) == (TRACE, SPAN)
    travelling = {"traceparent": text, "tracestate": "a=1", "user": "u1"}
    drop_invalid(travelling)
    assert travelling == {"traceparent": text, "tracestate": "a=1", "user": "u1"}


@pytest.mark.parametrize(
    "text",
    [
        None,
        7,
        b"00",
        "",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",  # Only later versions have more.
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[:10]}g{TRACE[11:]}-{SPAN}-01",
        f"01-{TRACE}-{SPAN}-01-a\nb",
        f"00-{TRACE}-{SPAN}-01\n",
        f"00-{TRACE}-{SPAN}-1",
        f"01-{TRACE}-{SPAN}-01-" + "x" * 1000,
    ],
)
def test_invalid(text: Any) -> None:
    assert parse(text) is None
    travelling = {"traceparent": text, "tracestate": "a=1", "user": "u1"}
    drop_invalid(travelling)
    assert travelling == {"user": "u1"}


def test_a_tracestate_alone_is_dropped() -> None:
    travelling = {"tracestate": "a=1"}
    drop_invalid(travelling)
    assert travelling == {}

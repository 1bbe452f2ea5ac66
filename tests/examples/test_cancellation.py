"""Cancellation: leaving, a deadline and a graceful stop all reach the innermost of three processes."""

from __future__ import annotations

import re

from tests.examples.programs import run, serving

SERVER = "cancellation/server.py"


def test_cancellation():
    with (
        serving(SERVER, "outer") as outer,
        serving(SERVER, "middle") as middle,
        serving(SERVER, "inner") as inner,
    ):
        lines = run("cancellation/client.py")
        for name, hop in {"outer": outer, "middle": middle, "inner": inner}.items():
            for request in ("leaving", "timeout", "stopping"):
                hop.until(f"^{name}: cleaned up after {request}$")

    assert lines[0] == "leaving: had enough after 3"
    assert re.match(r"timeout: \d+ numbers, then .* 0.25 s", lines[1])
    assert re.fullmatch(r"stopping: the last word was 'stopped after \d+'", lines[2])
    assert len(lines) == 3

    assert outer.output.count("cleaned up") == middle.output.count("cleaned up") == 3
    said = inner.output.splitlines()
    assert said[0] == "inner: leaving, no deadline"
    deadline = next(line for line in said if line.startswith("inner: timeout, "))
    assert 0 <= float(re.findall(r"[\d.]+", deadline)[0]) <= 0.25  # what was left of it two hops further
    assert inner.output.count("inner: cancelled at") == 2, "a graceful stop cancels nothing"
    assert said[-2:] == ["inner: stopping, no deadline", "inner: cleaned up after stopping"]


def test_which_hop():
    (line,) = run(SERVER, status=1)
    assert "server.py outer|middle|inner" in line

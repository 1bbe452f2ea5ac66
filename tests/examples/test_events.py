"""Events: whoever listens gets every one, without a server between."""

from __future__ import annotations

import re

from tests.examples.programs import Program, run

PUBLISHER, SUBSCRIBER = (f"events/{name}.py" for name in ("publisher", "subscriber"))


def test_two_subscribers_get_every_event():
    one, other = Program(SUBSCRIBER, "20"), Program(SUBSCRIBER, "20")
    try:
        for each in (one, other):
            each.until("^Listening$")
        (line,) = run(PUBLISHER, "20", "0")
        assert re.fullmatch(r"Published 20 events as examples_cache_[0-9a-f]{8}\.events\.stored", line)
        for each in (one, other):
            expected = [f"stored: block {block}, 16 hashes" for block in range(20)]
            assert each.end().splitlines() == ["Listening", *expected]
    finally:
        one.kill()
        other.kill()


def test_nobody_has_to_listen():
    (line,) = run(PUBLISHER, "3", "0")
    assert line.startswith("Published 3 events")

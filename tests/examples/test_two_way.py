"""Two ways: each guess depends on the answer to the one before it, within one call."""

from __future__ import annotations

import re

from tests.examples.programs import run, serving


def test_two_way():
    with serving("two_way/server.py"):
        games = [run("two_way/client.py") for _ in range(2)]

    for *guesses, summary in games:
        assert summary == f"{len(guesses)} guesses"
        assert 1 <= len(guesses) <= 7
        assert guesses[0].startswith("50? ")
        assert all(re.fullmatch(r"\d+\? (higher|lower)", line) for line in guesses[:-1])
        assert guesses[-1].endswith("? yes!")

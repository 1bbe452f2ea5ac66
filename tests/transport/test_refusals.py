"""Peers that were turned away: one line, however many they are."""

from __future__ import annotations

import logging

from triton_distributed.transport.refusals import EVERY_S, Refusals


def test_one_line_for_many(caplog):
    now = 0.0
    refusals = Refusals(lambda: now)
    with caplog.at_level(logging.WARNING, "triton_distributed.transport"):
        for number in range(5000):
            refusals.note(f"peer {number}", "no")
        now = EVERY_S - 0.001
        refusals.note("early", "no")
        now = EVERY_S
        refusals.note("late", "no")
        refusals.note("again", "no")
        now = 3 * EVERY_S
        refusals.note("last", "why")
    assert [each.getMessage() for each in caplog.records] == [
        "turned peer 0 away: no",
        "turned late away: no (and 5,000 more since the last such line)",
        "turned last away: why (and 1 more since the last such line)",
    ]

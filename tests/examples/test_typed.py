"""Typed: what fits arrives as what the handler asks for, and what does not is told with the field's name."""

from __future__ import annotations

from tests.examples.programs import run, serving


def test_typed():
    with serving("typed/server.py"):
        lines = run("typed/client.py")

    assert lines[:3] == [
        "Text(text='the quick brown fox jumps', max_words=4): 1 the, 2 quick, 3 brown, 4 fox",
        "{'text': 'the lazy dog sleeps'}: 1 the, 2 lazy, 3 dog",
        '\'{"text": "as JSON", "max_words": 1}\': 1 as',
    ]
    too_few, missing, summary, misfit = lines[3:]
    assert "Invalid request: " in too_few
    assert "max_words" in too_few.rpartition("Invalid request: ")[2]
    assert "Invalid request: " in missing
    assert "text: " in missing.rpartition("Invalid request: ")[2]
    assert summary == "3 numbers, mean 2.5"
    assert misfit.startswith("Invalid request: ")
    assert "values[1]" in misfit

"""Pipeline: the request goes down through three processes, the words come back up through all of them."""

from __future__ import annotations

from tests.examples.programs import run, serving


def test_pipeline():
    with (
        serving("pipeline/frontend.py") as frontend,  # in the wrong order: each stage waits for the next one
        serving("pipeline/middle.py") as middle,
        serving("pipeline/backend.py") as backend,
    ):
        lines = run("pipeline/client.py", "warm", "greetings")

    assert frontend.output == "Frontend received: warm greetings\n"
    assert middle.output == "Middle received: warm greetings from the front\n"
    assert backend.output == "Backend received: warm greetings from the front from the middle\n"
    words = ["WARM", "GREETINGS", "FROM", "THE", "FRONT", "FROM", "THE", "MIDDLE"]
    assert lines == [f"{number} {word}" for number, word in enumerate(words, 1)]

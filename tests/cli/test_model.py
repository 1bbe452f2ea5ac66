"""`trd model serve` and `trd model ls`: what they serve and say, and how they end."""

from __future__ import annotations

import json
import re
import signal

import pytest


def test_serves_lists_and_drains(trd):
    options = ("--engine", "mock", "--option", "slots=3", "--alias", "other", "--generation", "2", "--queue", "1")
    worker = trd.start("model", "serve", "small", *options)
    found = re.fullmatch(r"ready: serving the model small as instance (\d+) at \S+\n", worker.line())
    assert found
    said = trd.run("model", "ls", "--json")
    (line,) = map(json.loads, said.lines)
    assert (line["model"], line["generation"], line["aliases"]) == ("small", 2, ["other"])
    assert line["instances"] == [found[1]]
    assert trd.run("model", "ls").lines[1].split()[:4] == ["small", "2", "1", "mock"]
    (limits,) = {each["max_inflight"] for each in map(json.loads, trd.run("ls", "models.*.generate", "--json").lines)}
    assert limits == 3
    worker.signal(signal.SIGTERM)
    ended = worker.end()
    assert (ended.status, ended.err) == (0, "")
    assert "no model is served in the namespace 'models'" in trd.run("model", "ls").err


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--engine", "nothing"), 2, "--engine 'nothing': give module:Class, or one of: mock, "),
        (("--engine", "nowhere:Engine"), 1, "the engine nowhere:Engine cannot be imported: No module named 'nowhere'"),
        (("--engine", "worker:Engine"), 2, "worker has no subclass Engine of triton_distributed.llm.Engine"),
        (("--engine", "mock", "--option", "slot=3"), 2, "the engine mock has no such option; its options: speed, "),
        (("--engine", "mock", "--option", "slots=x"), 2, "--option slots: "),
        (("--engine", "mock", "--option", "name=x"), 2, "the model 'm' is already given"),
        (("--engine", "openai"), 2, "the engine openai needs --option url=…"),
    ],
)
def test_what_cannot_be_served_is_one_line(trd, arguments, status, says):
    said = trd.run("model", "serve", "m", *arguments)
    assert said.status == status
    assert says in said.err
    assert said.err.startswith("trd model serve: error: ")
    assert said.err.count("\n") == 1

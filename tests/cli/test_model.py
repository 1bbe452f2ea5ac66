"""`trd model serve` and `trd model ls`: what they serve and say, and how they end."""

from __future__ import annotations

import json
import re
import signal

import pytest

from triton_distributed.cli.failure import Failure
from triton_distributed.cli.main import main
from triton_distributed.cli.model import ls
from triton_distributed.cli.model.engines import make_engine
from triton_distributed.discovery.base import Added, Removed
from triton_distributed.llm import Engine, ModelCard, PrefillOnly
from triton_distributed.llm.contract.records import metadata_of
from triton_distributed.llm.models.table import Entry, ModelTable
from triton_distributed.names import EndpointName, Instance


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


def test_workers_that_only_compute_prompts_are_counted_apart():
    card = ModelCard(name="m")
    entry = Entry(card)
    assert ls._cells(entry, (), "models")[2] == "0"
    assert ls._cells(entry, [7, 8], "models")[2] == "0+2"
    assert ls._as_json(entry, [7, 8], "models")["prefill_instances"] == ["7", "8"]


def test_a_model_with_prefill_workers_only_is_named(monkeypatch, capsys):
    models, card = ModelTable("models"), ModelCard(name="m", role="prefill")
    endpoint = EndpointName("models", card.component, "prefill")
    models.apply(Added(Instance(endpoint, 7, ("tcp://127.0.0.1:1",), metadata=metadata_of(card))))

    async def look(*_):
        return models, "here"

    monkeypatch.setattr(ls, "_look", look)
    assert main(["model", "ls"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"{PrefillOnly('m')}\n")
    models.apply(Removed(endpoint, 7))
    assert main(["model", "ls"]) == 0
    assert capsys.readouterr().err == "no model is served in the namespace 'models'; here was asked\n"


def test_options_that_contradict_each_other_are_refused(capsys):
    assert main(["model", "serve", "m", "--engine", "mock", "--option", "role=prefill", "--role", "decode"]) == 2
    assert capsys.readouterr().err == "trd model serve: error: --role decode contradicts --option role=prefill\n"


def test_the_workers_of_a_machine_share_its_cores(monkeypatch):
    class Threads(Engine):
        def __init__(self, model, threads="0"):
            self.threads = threads

    monkeypatch.setattr("triton_distributed.cli.model.engines._class", lambda _: Threads)
    monkeypatch.setattr("triton_distributed.cli.model.engines._cores", lambda: 8)
    made = [
        vars(make_engine(engine, "m", options, processes)[0])["threads"]
        for engine, options, processes in [
            ("llamacpp", {}, 1),
            ("llamacpp", {}, 3),
            ("llamacpp", {}, 99),
            ("llamacpp", {"threads": "5"}, 3),
            ("mine:Threads", {}, 3),
        ]
    ]
    assert made == ["0", 2, 1, "5", "0"]


def test_a_wrong_option_of_ones_own_engine_is_named(monkeypatch):
    class Strict(Engine):
        def __init__(self, delay_ms="1"):
            self.delay_ms = float(delay_ms)

    monkeypatch.setattr("triton_distributed.cli.model.engines._class", lambda _: Strict)
    with pytest.raises(Failure, match="with --option delay_ms=abc: could not convert") as failed:
        make_engine("mine:Strict", "m", {"delay_ms": "abc"})
    assert failed.value.status == 2


def test_a_conflict_is_shown_as_a_list(trd):
    first_one = trd.start("model", "serve", "m", "--engine", "mock")
    first_one.line()
    said = trd.run("model", "serve", "m", "--engine", "mock", "--option", "context_tokens=99")
    assert said.status == 1
    first, *differences, last = said.err.splitlines()
    assert first.startswith("trd model serve: error: the model 'm', generation 0, is already served by instance ")
    assert any(each.startswith("  - context_tokens: ") for each in differences)
    assert last == "Serve this one under another name, or as generation 1"
    first_one.signal(signal.SIGTERM)
    first_one.end()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--engine", "nothing"), 2, "--engine 'nothing': give module:Class, or one of: mock, "),
        (("--engine", "nowhere:Engine"), 1, "the engine nowhere:Engine cannot be imported: No module named 'nowhere'"),
        (("--engine", "worker:Engine"), 2, "worker has no subclass Engine of triton_distributed.llm.Engine"),
        (("--engine", "mock", "--option", "slot=3"), 2, "the engine mock has no such option; its options: speed, "),
        (("--engine", "mock", "--option", "slots=x"), 2, "--option slots: "),
        (("--engine", "mock", "--role", "prefill"), 2, "role: the speed instant has no KV cache"),
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

"""`--json` of every command, with the fields that docs/cli-json.md names; and the same on each discovery."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Trd
from tests.guards.tree import ROOT
from tests.servers import lasting_etcd  # noqa: F401
from triton_distributed.cli.main import COMMANDS
from triton_distributed.testing import EtcdServer

QUIET_COMMANDS = {"serve", "http", "model", "route", "completion"}  # Their output is no data, or that of their verbs.


def documented() -> dict[str, set[str]]:
    """The fields of each command's lines, as the page names them."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", (ROOT / "docs/cli-json.md").read_text(), re.MULTILINE)
    found: dict[str, set[str]] = {}
    for name, text in rows:
        other = re.match("the fields of `([a-z]+)`", text)
        fields = set(re.findall("`([a-z_]+)`", text[other.end() :] if other else text))
        found[name] = fields | (found[other[1]] if other else set())
    return found


FIELDS = documented()


@pytest.mark.parametrize("name", [each for each in COMMANDS if each not in QUIET_COMMANDS])
def test_every_command_has_the_option_and_its_fields_are_documented(name: str) -> None:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"triton_distributed.cli.{name}").configure(parser)
    assert "--json" in parser.format_help()
    assert FIELDS[name]


def lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def check(command: str, found: Iterable[dict[str, Any]]) -> None:
    keys = [each.keys() for each in found]
    assert keys
    assert all(each == FIELDS[command] for each in keys), (command, keys, FIELDS[command])


def test_lines_have_the_documented_fields(trd: Trd) -> None:
    worker = trd.serve("worker:zoo", "demo.b.g")
    trd.serve("worker:one_then_wait", "demo.b.w")
    waiting = trd.start("call", "demo.b.w", "1")
    assert waiting.line() == '"one"\n'
    items = lines(trd.run("call", "--json", "demo.b.g", "1").out)
    assert {key for each in items for key in each} == FIELDS["call"]
    assert items[1:3] == [{"data": None}, {"data": "x", "event": "step", "comments": ["a", "b"], "id": "7"}]
    check("ls", lines(trd.run("ls", "--json").out))
    (described,) = lines(trd.run("describe", "--json", str(worker.id)).out)
    check("describe", [described])
    assert described["runtime_statistics"]["instance_id"] == str(worker.id)
    assert described["endpoint_statistics"]["outcomes"]["ok"] == 1
    requests = lines(trd.run("requests", "--json").out)
    check("requests", requests)
    assert FIELDS["why"] == FIELDS["requests"]
    check("why", lines(trd.run("why", "--json", requests[0]["id"]).out))
    check("bench", lines(trd.run("bench", "--json", "demo.b.g", "1", "--duration", "0.05", "--warmup", "0.01").out))
    check("top", lines(trd.run("top", "--json", "--once", "--interval", "0.1").out))
    check("doctor", lines(trd.run("doctor", "--json").out))
    watching = trd.start("watch", "--json")
    check("watch", lines(watching.line()))
    watching.kill()
    waiting.kill()


def test_a_recording_and_its_replay(trd: Trd, tmp_path: Path) -> None:
    trd.serve("worker:count", "demo.b.g", env={"TRD_LOG": "error"})  # A recording is a warning.
    recording = trd.start("record", "demo.b.g", "--to", str(tmp_path / "f"), "--requests", "1", "--json")
    while not (recording.process.poll() is not None or trd.run("call", "demo.b.g", '{"n": 1}').err):
        pass
    check("record", lines(recording.end().out))
    replayed = lines(trd.run("replay", "--json", str(tmp_path / "f"), "worker:zoo").out)
    assert {key for each in replayed for key in each} == FIELDS["replay"]


def test_an_error_is_an_object(trd: Trd) -> None:
    said = trd.run("call", "--json", "demo.b.g", "1")
    assert (said.status, said.out) == (1, "")
    found = json.loads(said.err)
    assert found.keys() == {"error", "type", "status"}
    assert (found["type"], found["status"]) == ("NoInstances", 1)


def test_etcd(trd: Trd, lasting_etcd: EtcdServer) -> None:  # noqa: F811
    own = f"cli-{os.getpid()}"
    settings = {"TRD_DISCOVERY": "etcd", "ETCD_ENDPOINTS": lasting_etcd.url, "TRD_ETCD_PREFIX": own}
    shown(trd, {**settings, "TRD_LISTEN": "tcp://127.0.0.1:0", "TRD_EVENTS": "local"})


def test_static(trd: Trd, trd_dir: Path) -> None:
    address = f"unix://{trd_dir}/s.sock"
    shown(
        trd, {"TRD_DISCOVERY": "static", "TRD_STATIC": f"demo.b.g={address};demo.b.x={address}", "TRD_LISTEN": address}
    )


def shown(trd: Trd, settings: dict[str, str]) -> None:
    """All commands show a worker in the discovery that these settings name."""
    trd.serve("worker:one_then_wait", "demo.b.g", "--max-inflight", "1", env=settings)
    (listed,) = lines(trd.run("ls", "--json", "demo.b.g", env=settings).out)
    assert (listed["endpoint"], listed["state"], listed["running"]) == ("demo.b.g", "serving", 0)
    assert listed["age_s"] >= 0
    calling = trd.start("call", "demo.b.g", "1", env=settings)
    assert calling.line() == '"one"\n'
    watching = trd.start("watch", "--json", "demo.b.g", env=settings)
    assert [json.loads(watching.line())["event"] for _ in range(2)] == ["present", "full"]
    watching.kill()
    described = trd.run("describe", listed["instance"], env=settings)
    assert described.lines[0] == f"demo.b.g, instance {listed['instance']}: full"
    assert "  load          1 running of 1" in described.lines
    (request,) = lines(trd.run("requests", "--json", env=settings).out)
    shown = request["endpoint"], request["instance_id"], request["state"]
    assert shown == ("demo.b.g", listed["instance"], "running")
    said = trd.run("describe", "demo.b.gg", env=settings)
    assert (said.status, said.err.endswith("; did you mean demo.b.g?\n")) == (1, True)
    calling.kill()

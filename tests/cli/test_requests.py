"""`trd requests` and `trd why`: which requests are served, and where each one waits."""

from __future__ import annotations

import json
import signal
import time
from typing import Any

from tests.cli.command import Trd
from tests.timing import PATIENCE_S
from triton_distributed.cli.requests import reason
from triton_distributed.cli.why import way
from triton_distributed.runtime.requests import AwaitedCall, RequestReport


def report(endpoint: str, instance: int, *calls: tuple[str, int], state: str = "running") -> RequestReport:
    awaited = tuple(AwaitedCall(name, id, True) for name, id in calls)
    return RequestReport(
        "r", endpoint, instance, state, 0.5, 0, None, 0, "a client", False, awaited, f"{endpoint}.py:1 in f"
    )


def seen(trd: Trd, count: int) -> list[dict[str, Any]]:
    """The requests, when there are so many."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        said = trd.run("requests", "--json")
        if len(said.lines) == count:
            return [json.loads(line) for line in said.lines]
    raise AssertionError(f"not {count} requests: {said}")


def test_nothing_is_served(trd):
    said = trd.run("requests")
    assert (said.status, said.out, said.err) == (0, "", "no request is served\n")


def test_where_requests_wait(trd):
    worker = trd.serve("worker:one_then_wait", "demo.b.g", "--max-inflight", "1", "--max-queue", "1")
    callers = [trd.start("call", "demo.b.g", "1"), trd.start("call", "demo.b.g", "2")]
    running, waiting = sorted(seen(trd, 2), key=lambda each: each["state"])
    assert [each["state"] for each in (running, waiting)] == ["running", "waiting"]
    assert waiting["ahead"] == 1
    assert running["instance_id"] == str(worker.id)
    said = trd.run("requests", "demo.b")
    assert (said.status, said.err) == (0, "")
    assert said.lines[0].split() == ["REQUEST", "ENDPOINT", "INSTANCE", "STATE", "WAITS", "FOR"]
    assert any("its handler: " in line and line.endswith(" in one_then_wait") for line in said.lines[1:])
    assert any(line.endswith("a place: 1 before it") for line in said.lines[1:])
    assert trd.run("requests", "other").err == "no request is served\n"

    said = trd.run("why", str(running["id"]))
    assert (said.status, said.err) == (0, "")
    assert said.lines[0].startswith(f"demo.b.g on instance {worker.id}: running, waits for its handler: ")
    assert said.lines[1].endswith(" in one_then_wait")
    (found,) = map(json.loads, trd.run("why", str(running["id"]), "--json", "--stack").lines)
    assert [line.rpartition(" in ")[2] for line in found["stack"]] == ["one_then_wait"]
    for each in callers:
        each.signal(signal.SIGINT)
        each.end()


def test_what_holds_up_a_drain(trd):
    worker = trd.serve("worker:one_then_wait", "demo.b.g", env={"TRD_DRAIN_TIMEOUT_S": "3600"})
    calling = trd.start("call", "demo.b.g", "1")
    assert calling.line() == '"one"\n'
    worker.signal(signal.SIGTERM)
    assert worker.err is not None
    assert worker.err.readline().startswith("draining: 1 request(s) may run")
    (found,) = seen(trd, 1)
    assert (found["endpoint"], found["state"]) == ("demo.b.g", "running")
    assert trd.run("why", str(found["id"])).status == 0
    said = trd.run("ls")
    assert [line.split()[:3] for line in said.lines[1:]] == [["demo.b.g", str(worker.id), "draining"]]
    calling.signal(signal.SIGINT)
    calling.end()
    assert worker.end().status == 0
    assert trd.run("ls").out == ""


def test_an_id_that_no_worker_has(trd):
    trd.serve("worker:echo", "demo.b.g")
    said = trd.run("why", "nope")
    assert (said.status, said.out) == (1, "")
    assert said.err.startswith("trd why: error: no worker that answered serves request nope: it has ended, or ")


def test_a_worker_that_cannot_answer_is_named(trd):
    worker = trd.serve("worker:echo", "demo.b.g")
    worker.signal(signal.SIGSTOP)
    said = trd.run("requests", "--timeout", "0.2")
    worker.signal(signal.SIGCONT)
    assert said.status == 0
    assert f"instance {worker.id}: " in said.err
    assert "no worker that answered serves a request\n" in said.err  # A silent worker may serve some.
    assert "TRD_CONNECT_TIMEOUT_S" not in said.err


def test_the_way_of_a_request():
    outer = report("a", 1, ("b", 2), ("c", 3))
    lines = list(way([report("b", 2), outer]))
    assert lines == [
        "a on instance 1: running, waits for b, c",
        "    at a.py:1 in f",
        "  b on instance 2: running, waits for its handler: b.py:1 in f",
        "      at b.py:1 in f",
        "  c on instance 3: no report; has not answered",
    ]


def test_requests_that_call_each_other_are_all_shown():
    lines = list(way([report("a", 1, ("b", 2)), report("b", 2, ("a", 1))]))
    assert [line.strip().partition(" on ")[0] for line in lines if " on instance" in line] == ["a", "b", "a"]
    assert lines[-1].endswith("no report; has not answered")


def test_reasons():
    assert reason(report("a", 1, ("b", 2), state="cleaning")) == "its handler: a.py:1 in f"
    assert reason(report("a", 1, state="announced")) == "the event loop, to begin"

"""`trd ls`: the table, its JSON, and instances that do not answer."""

from __future__ import annotations

import json
import os
import signal
import time
from unittest.mock import ANY

import pytest

from tests.cli.command import OTHER_FOLDERS
from tests.timing import PATIENCE_S
from triton_distributed import __version__
from triton_distributed.cli.health import STUCK


def test_nothing_runs(trd, trd_dir):
    for options in ([], ["--json"]):
        said = trd.run("ls", *options)
        assert (said.status, said.out) == (0, "")
        assert said.complaint == (
            f"no endpoint is served (file://{trd_dir} was asked); "
            "`trd serve MODULE:OBJECT --endpoint NS.COMP.EP` serves one\n"
        )


def test_what_another_folder_holds_is_named(trd, trd_dir):
    other = trd_dir / "other"
    trd.serve("worker:echo", "demo.b.g", env={"TRD_DIR": str(other)})
    said = trd.run("ls")
    assert (said.status, said.out) == (0, "")
    (folders,) = OTHER_FOLDERS.findall(said.err)
    if "," not in folders and str(trd_dir) in folders:  # no other program on this machine serves something now
        assert folders == f"; live instances are registered in {other}: TRD_DIR={other} looks there"
    assert trd.run("ls", env={"TRD_DIR": str(other)}).lines[1].startswith("demo.b.g ")


def test_the_table(trd):
    one = trd.serve("worker:echo", "demo.frontend.chat")
    limits = "--max-inflight", "8", "--max-queue", "2"
    two = trd.serve("worker:count", "demo.b.g", "--metadata", "model=tiny", "--listen", "tcp://127.0.0.1:0", *limits)
    said = trd.run("ls")
    assert (said.status, said.err) == (0, "")
    assert [line.split() for line in said.lines] == [
        ["ENDPOINT", "INSTANCE", "STATE", "RUNNING", "WAITING", "AGE", "VERSION", "ADDRESS", "METADATA"],
        ["demo.b.g", str(two.id), "serving", "0/8", "0/2", ANY, "s", __version__, two.address, '{"model":"tiny"}'],
        ["demo.frontend.chat", str(one.id), "serving", "0", "0", ANY, "s", __version__, one.address, "-"],
    ]
    for name in ("INSTANCE", "STATE", "ADDRESS", "METADATA"):
        column = said.lines[0].index(name)
        assert all(line[column - 1] == " " != line[column] for line in said.lines)


def test_json(trd):
    worker = trd.serve("worker:echo", "demo.backend.generate", "--metadata", "model=tiny")
    said = trd.run("ls", "--json")
    assert (said.status, said.err) == (0, "")
    (line,) = map(json.loads, said.lines)
    assert line.pop("host")
    assert 0 <= line.pop("age_s") < PATIENCE_S
    assert line == {
        "endpoint": "demo.backend.generate",
        "instance": str(worker.id),
        "state": "serving",
        "reason": "",
        "addresses": [worker.address],
        "metadata": {"model": "tiny"},
        "version": __version__,
        "replica": None,
        "running": 0,
        "waiting": 0,
        "max_inflight": None,
        "max_queue": 0,
    }


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("demo", ["demo.a.x", "demo.b.y"]),
        ("demo.b", ["demo.b.y"]),
        ("*.x", ["demo.a.x"]),
        ("demo.?.[xz]", ["demo.a.x"]),
        ("dem", []),
        ("b", []),
    ],
)
def test_a_pattern(trd, pattern, found):
    static = {"TRD_DISCOVERY": "static", "TRD_STATIC": "demo.a.x=tcp://127.0.0.1:1;demo.b.y=tcp://127.0.0.1:1"}
    said = trd.run("ls", "--json", pattern, env=static)
    assert [json.loads(line)["endpoint"] for line in said.lines] == found
    nothing = f"no endpoint matches {pattern!r}; 2 other endpoint(s) are served"
    hint = "; did you mean demo?\n" if pattern == "dem" else "; see `trd ls`\n"
    assert said.err == ("" if found else nothing + hint)


def test_a_dead_address(trd):
    static = {"TRD_DISCOVERY": "static", "TRD_STATIC": "a.b.c=tcp://127.0.0.1:1"}
    said = trd.run("ls", env=static)
    assert said.status == 0
    assert said.lines[1].split()[2] == "unreachable"
    assert said.err.startswith("a.b.c, instance ")
    assert "tcp://127.0.0.1:1: " in said.err
    (line,) = map(json.loads, trd.run("ls", "--json", env=static).lines)
    assert (line["state"], line["age_s"], line["running"]) == ("unreachable", None, None)
    assert line["reason"].startswith("tcp://127.0.0.1:1: ")


def test_a_paused_worker_is_listed_as_unreachable_and_comes_back(trd):
    trd.forked = False  # the pause of a child alone can be waited for
    worker = trd.serve("worker:echo", "a.b.c")
    worker.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, worker.process.pid, os.WSTOPPED)
    try:
        said = trd.run("ls", "--timeout", "0.1")
    finally:
        worker.signal(signal.SIGCONT)
    assert said.lines[1].split()[:3] == ["a.b.c", str(worker.id), "unreachable"]
    assert "answer within 0.1 s" in said.err
    assert trd.run("ls", "--timeout", "20").lines[1].split()[2] == "serving"


def test_a_reader_that_leaves_is_no_error(trd):
    listing = trd.start("ls")
    listing.out.close()
    assert listing.process.wait() == 0


def test_a_worker_whose_loop_is_stuck(trd, tmp_path):
    worker = trd.serve("worker:blocked", "a.b.c", env={"TRD_WATCHDOG_S": "0.2", "TRD_STATUS_PORT": "0"})
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    calling = trd.start("call", "a.b.c", json.dumps(str(fifo)))
    with fifo.open("w"):  # the handler has it open
        until = time.monotonic() + PATIENCE_S
        while json.loads(trd.run("ls", "--json", "--timeout", "0.1").out)["state"] != "stuck":
            assert time.monotonic() < until
        said = trd.run("ls", "--timeout", "0.1")
        assert said.lines[1].split()[2] == "stuck"
        assert said.err == f"a.b.c, instance {worker.id}: {STUCK}\n"
        said = trd.run("requests", "--timeout", "0.1")
        url = json.loads(trd.run("describe", str(worker.id), "--json", "--timeout", "0.1").out)["status_url"]
        words = f"its event loop is stuck; its log has the stack, as has {url}/stacks"
        assert said.err == f"no worker that answered serves a request\ninstance {worker.id}: {words}\n"
    assert calling.end().out == '"done"\n'
    until = time.monotonic() + PATIENCE_S
    while trd.run("ls", "--timeout", "20").lines[1].split()[2] != "serving":
        assert time.monotonic() < until
    said = worker.stop()
    assert said.status == 0
    assert "read_text() or" in said.err  # the watchdog's report

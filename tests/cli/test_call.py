"""`trd call`: requests in, items out as they come, errors, and how it is ended."""

from __future__ import annotations

import json
import os
import signal

import pytest


def test_items_are_lines_of_json(trd):
    trd.serve("worker:count", "demo.backend.generate")
    said = trd.run("call", "demo.backend.generate", '{"n": 3}')
    assert (said.status, said.err) == (0, "")
    assert said.lines == ['{"number":0}', '{"number":1}', '{"number":2}']


def test_an_item_is_shown_when_it_comes(trd):
    worker = trd.serve("worker:one_then_wait", "a.b.c")
    call = trd.start("call", "a.b.c", "null")
    assert call.line() == '"one"\n'  # and the handler waits for ever
    call.signal(signal.SIGINT)
    said = call.end()
    assert (said.status, said.out, said.err) == (130, "", "")
    assert worker.line() == "cancelled\n"


def test_a_reader_that_leaves_cancels_the_handler(trd):
    worker = trd.serve("worker:one_then_wait", "a.b.c")
    call = trd.start("call", "a.b.c", "null")
    assert call.line() == '"one"\n'
    call.out.close()  # no further item comes: the closed pipe itself must be noticed
    assert worker.line() == "cancelled\n"
    assert call.process.wait() == 0
    assert call.err.read() == ""


def test_a_reader_that_leaves_a_busy_stream_ends_it(trd):
    trd.serve("worker:count", "a.b.c")
    call = trd.start("call", "a.b.c", '{"n": 1000000000}')
    assert call.line() == '{"number":0}\n'
    call.out.close()
    assert call.process.wait() == 0
    assert call.err.read() == ""


def test_every_kind_of_value(trd):
    trd.serve("worker:zoo", "a.b.c")
    said = trd.run("call", "a.b.c", "null")
    assert (said.status, said.err) == (0, "")
    assert [json.loads(line) for line in said.lines] == [
        {"text": "é\n", "list": [1, 2.5, None, True]},
        None,
        {"data": "x", "event": "step", "comments": ["a", "b"], "id": "7"},
        {"event": "done"},
        {"bytes": {"size": 3, "base64": "AQID"}},
        {"bytes": {"size": 5000}},
        {"ndarray": {"dtype": "float32", "shape": [2, 3], "values": [[0, 1, 2], [3, 4, 5]]}},
        {"ndarray": {"dtype": "float64", "shape": [100, 100]}},
        {"5": None, "when": "2026-01-02T00:00:00Z"},
    ]


@pytest.mark.parametrize(
    ("arguments", "stdin", "request_"),
    [
        (['{"a": [1, "é"]}'], None, {"a": [1, "é"]}),
        (["-5"], None, -5),
        (["-"], '{"a": 1}\n', {"a": 1}),
        (["--text", '{"a"'], None, '{"a"'),
        (["--text", "-"], "two\nlines", "two\nlines"),
        (["null"], None, None),
    ],
)
def test_the_request(trd, arguments, stdin, request_):
    trd.serve("worker:echo", "a.b.c")
    said = trd.run("call", "a.b.c", *arguments, stdin=stdin)
    assert (said.status, said.err) == (0, "")
    assert json.loads(said.out)["request"] == request_


def test_metadata_travels(trd):
    trd.serve("worker:echo", "a.b.c")
    said = trd.run("call", "a.b.c", "1", "--metadata", "user=me", "--metadata", "key=a=b", "--metadata", "user=you")
    assert json.loads(said.out)["metadata"] == {"user": "you", "key": "a=b"}


def test_a_handlers_error_is_one_line(trd):
    trd.handlers_raise = True
    worker = trd.serve("worker:fail", "a.b.c")
    said = trd.run("call", "a.b.c", "1")
    assert (said.status, said.out) == (1, "1\n")
    assert said.err == f"trd call: error: instance {worker.id} raised KeyError: 'no such\\nmodel'\n"


def test_a_handlers_traceback_is_shown_on_request(trd):
    trd.handlers_raise = True
    trd.serve("worker:fail", "a.b.c")
    told = trd.run("call", "a.b.c", "1", "--traceback").err.splitlines()
    assert told[0] == "Traceback (most recent call last):"
    assert any("worker.py" in line for line in told)
    assert told[-1].startswith("trd call: error: instance ")


def test_nobody_serves_it(trd, trd_dir):
    said = trd.run("call", "a.b.c", "1")
    assert (said.status, said.out) == (1, "")
    assert said.complaint == (
        f"trd call: error: no instance serves a.b.c (file://{trd_dir} was asked): "
        "`trd ls` shows what is served, --wait S waits for it\n"
    )


@pytest.mark.parametrize("options", [[], ["--wait", "0.01"]])
def test_a_folder_in_which_it_is_served_is_named(trd, trd_dir, options):
    other = trd_dir / "other"
    trd.serve("worker:echo", f"demo.other{os.getpid()}.folder", env={"TRD_DIR": str(other)})
    said = trd.run("call", f"demo.other{os.getpid()}.folder", "1", *options)
    assert said.status == 1
    assert (
        f"(file://{trd_dir} was asked; live instances are registered in {other}: TRD_DIR={other} looks there)"
        in said.err
    )
    assert trd.run("call", f"demo.other{os.getpid()}.folder", "1", env={"TRD_DIR": str(other)}).status == 0


def test_waits_for_an_instance(trd):
    call = trd.start("call", "a.b.c", "1", "--wait", "30")
    trd.serve("worker:echo", "a.b.c")
    said = call.end()
    assert (said.status, said.err) == (0, "")


@pytest.mark.parametrize(("options", "who"), [([], "no instance"), (["--instance", "5"], "no instance 5")])
def test_does_not_wait_for_ever(trd, trd_dir, options, who):
    said = trd.run("call", "a.b.c", "1", "--wait", "0.01", *options)
    assert (said.status, said.out) == (1, "")
    assert said.complaint == f"trd call: error: {who} served a.b.c within 0.01 s (file://{trd_dir} was asked)\n"


def test_an_instance_that_is_not_there(trd):
    worker = trd.serve("worker:echo", "a.b.c")
    said = trd.run("call", "a.b.c", "1", "--instance", "5")
    assert said.status == 1
    assert said.err == f"trd call: error: no instance 5 serves a.b.c; its instances: {worker.id}\n"


def test_the_time_is_over(trd):
    worker = trd.serve("worker:one_then_wait", "a.b.c")
    said = trd.run("call", "a.b.c", "1", "--timeout", "0.5")
    assert said.status == 1
    assert said.err == "trd call: error: a.b.c did not finish within 0.5 s: give it more with --timeout\n"
    assert said.out in ("", '"one"\n')
    if said.out:
        assert worker.line() == "cancelled\n"


@pytest.mark.parametrize(("request_", "says"), [("18446744073709551616", "64 bits"), ('"\\ud800"', "JSON")])
def test_a_request_that_cannot_travel_is_one_line(trd, request_, says):
    trd.serve("worker:echo", "a.b.c")
    said = trd.run("call", "a.b.c", request_)
    assert (said.status, said.out, said.err.count("\n")) == (2, "", 1)
    assert says in said.err


def test_a_name_with_a_dot_is_called_by_its_path(trd):
    trd.serve("worker:echo", "models/components/llama-3.1/chat/completions")
    assert trd.run("call", "models/components/llama-3.1/chat/completions", "1").status == 0
    assert trd.run("ls").lines[1].startswith("models/components/llama-3.1/chat/completions  ")


def test_a_full_disk_is_one_line(trd):
    trd.serve("worker:count", "a.b.c")
    try:
        full = open("/dev/full", "w")  # noqa: SIM115
    except OSError:
        pytest.skip("this system has no /dev/full")
    with full:
        said = trd.run("call", "a.b.c", '{"n": 3}', out=full)
    assert (said.status, said.err) == (1, "trd call: error: [Errno 28] No space left on device\n")

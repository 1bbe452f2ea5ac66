"""`trd serve`: what it serves, what it says, how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys

import pytest

from tests.cli.command import PROGRAMS, READY


@pytest.mark.parametrize(
    ("target", "answer"),
    [
        ("worker:echo", '{"request":"x","metadata":{}}'),
        ("worker:Engine", '"generate of engine"'),
        ("worker:Engine.generate", '"generate of engine"'),
        ("worker:Engine.other", '"other of engine"'),
        ("worker:Engine.static", '"static"'),
        ("worker:Engine.of_class", '"Engine"'),
        ("worker:engine", '"generate of instance"'),
        ("worker:engine.other", '"other of instance"'),
        ("worker:Callable", '"call of a class"'),
    ],
)
def test_serves(trd, target, answer):
    trd.serve(target, "demo.backend.generate")
    assert trd.run("call", "demo.backend.generate", '"x"').lines == [answer]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nowhere:run", "there is no module 'nowhere' in "),
        ("worker.part:run", "there is no module 'worker.part': 'worker' is not a package"),
        ("worker:ecko", "worker has no 'ecko'; did you mean 'echo'?"),
        ("worker:Engine.run", "worker:Engine has no 'run'"),
        ("worker:data", "worker:data cannot be called: it is a list"),
        ("worker:np", "worker:np cannot be called: it is a module"),
        ("worker:Nothing", "worker:Nothing has neither generate nor __call__"),
        ("worker:NeedsArguments", "worker:NeedsArguments cannot be made without arguments: "),
        ("worker:three", "worker:three cannot serve: handler three takes 3 arguments"),
    ],
)
def test_what_cannot_be_served_is_one_line(trd, target, says):
    said = trd.run("serve", target, "--endpoint", "a.b.c")
    assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)
    assert said.err.startswith(f"trd serve: error: {says}")


def test_an_invalid_option_of_a_declaration_is_one_line(trd):
    said = trd.run("serve", "declared:Labelled")
    assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)
    assert said.err.startswith("trd serve: error: declared:Labelled cannot serve: metrics_labels: 'le': ")


@pytest.mark.parametrize(
    ("target", "file", "says"),
    [
        ("breaks:run", "breaks.py", "importing 'breaks' failed: RuntimeError: while it is imported"),
        ("imports_nothing:run", "imports_nothing.py", "importing 'imports_nothing' failed: ModuleNotFoundError: "),
        ("worker:Breaks", "worker.py", "worker:Breaks() failed: RuntimeError: no such device"),
    ],
)
def test_an_error_in_the_users_own_code_is_shown_with_its_place(trd, target, file, says):
    said = trd.run("serve", target, "--endpoint", "a.b.c")
    assert said.status == 1
    told = said.err.splitlines()
    assert told[-1].startswith(f"trd serve: error: {says}")
    assert told[0] == "Traceback (most recent call last):"
    assert file in told[1]


def test_the_ready_line_says_who_and_where(trd, trd_dir):
    worker = trd.serve("worker:echo", "demo.backend.generate")
    assert worker.endpoint == "demo.backend.generate"
    path = worker.address.removeprefix("unix://")
    assert path.startswith(str(trd_dir))
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    said = trd.run("call", "demo.backend.generate", "1", "--instance", str(worker.id))
    assert said.lines == ['{"request":1,"metadata":{}}']


def test_listens_where_it_is_told(trd):
    worker = trd.serve("worker:echo", "a.b.c", "--listen", "tcp://127.0.0.1:0")
    assert worker.address.startswith("tcp://127.0.0.1:")
    assert not worker.address.endswith(":0")
    assert trd.run("call", "a.b.c", "1").status == 0


def test_the_option_is_stronger_than_the_environment(trd):
    worker = trd.serve("worker:echo", "a.b.c", "--listen", "tcp://127.0.0.1:0", env={"TRD_LISTEN": "tcp://0.0.0.0:1"})
    assert worker.address.startswith("tcp://127.0.0.1:")


def test_an_address_in_use_is_one_line(trd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        said = trd.run("serve", "worker:echo", "--endpoint", "a.b.c", "--listen", address)
    assert said.status == 1
    assert said.err == (
        f"trd serve: error: cannot listen on {address}: the address is in use; give another with --listen\n"
    )


def test_a_unix_socket_in_use_is_one_line_and_stays_its_owners(trd, trd_dir):
    address = f"unix://{trd_dir}/mine.sock"
    trd.serve("worker:echo", "a.b.c", "--listen", address)
    said = trd.run("serve", "worker:echo", "--endpoint", "a.b.d", "--listen", address)
    assert said.status == 1
    assert said.err == (
        f"trd serve: error: cannot listen on {address}: the address is in use; give another with --listen\n"
    )
    assert trd.run("call", "a.b.c", "1").status == 0


def test_a_file_where_the_socket_should_be_is_left_alone(trd, trd_dir):
    path = trd_dir / "notes.txt"
    path.write_text("precious")
    refused = trd.start("serve", "worker:echo", "--endpoint", "a.b.c", "--listen", f"unix://{path}")
    assert refused.line() == ""
    said = refused.end()
    assert (said.status, said.err.count("\n")) == (1, 1)
    assert path.read_text() == "precious"


@pytest.mark.leaves("socket files", reason="the one of another program, which is what this is about")
def test_other_programs_sockets_beside_ours_are_left_alone(trd, trd_dir):
    others = trd_dir / "other-program.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(others))
    trd.serve("worker:echo", "a.b.c", "--listen", f"unix://{trd_dir}/ours.sock")
    assert others.exists()


def test_a_folder_that_is_open_to_others_is_one_line(trd, trd_dir):
    trd_dir.chmod(0o755)
    for line in (["serve", "worker:echo", "--endpoint", "a.b.c"], ["ls"], ["call", "a.b.c", "1"]):
        said = trd.run(*line)
        assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)
        assert f"`chmod 700 {trd_dir}`" in said.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(trd, trd_dir, number):
    fifo = trd_dir / "gate"
    os.mkfifo(fifo)
    worker = trd.serve("worker:gated", "a.b.c")
    call = trd.start("call", "a.b.c", f'"{fifo}"')
    assert call.line() == '"begun"\n'
    worker.signal(number)
    assert worker.err.readline() == "draining: 1 request(s) may run for at most 30 s; a second signal ends them now\n"
    fifo.write_text("")  # waits until the handler has come to it
    said = call.end()
    assert (said.status, said.out, said.err) == (0, '"done"\n', "")
    said = worker.end()
    assert (said.status, said.out, said.err) == (0, "", "")


def test_with_a_log_of_json_each_line_of_standard_error_is_an_object(trd, trd_dir):
    fifo = trd_dir / "gate"
    os.mkfifo(fifo)
    worker = trd.start("serve", "worker:gated", "--endpoint", "a.b.c", env={"TRD_LOG_FORMAT": "json"})
    assert worker.line().startswith("ready: ")
    call = trd.start("call", "a.b.c", f'"{fifo}"')
    assert call.line() == '"begun"\n'
    worker.signal(signal.SIGTERM)
    said = json.loads(worker.err.readline())
    assert (said["level"], said["message"][:30]) == ("warning", "draining: 1 request(s) may run")
    fifo.write_text("")
    call.end()
    assert worker.end().err == ""
    refused = trd.run("serve", "breaks", env={"TRD_LOG_FORMAT": "json"})
    said = [json.loads(line) for line in refused.err.splitlines()]
    assert [each["level"] for each in said] == ["error", "error"]
    assert said[0]["message"].endswith("\nRuntimeError: while it is imported")
    assert said[1]["message"].startswith("trd serve: error: importing 'breaks' failed: RuntimeError")


def test_a_class_that_takes_long_to_be_made_can_be_interrupted(trd):
    loading = trd.start("serve", "worker:Loads", "--endpoint", "a.b.c")
    assert loading.line() == "loading\n"
    loading.signal(signal.SIGINT)
    said = loading.end()
    assert (said.status, said.out, said.err) == (130, "", "")


def test_takes_no_more_than_it_is_told_to(trd):
    worker = trd.serve("worker:one_then_wait", "a.b.c", "--max-inflight", "1")
    first = trd.start("call", "a.b.c", "1")
    assert first.line() == '"one"\n'
    said = trd.run("call", "a.b.c", "1")
    assert said.status == 1
    assert "max_inflight=1, max_queue=0" in said.err
    first.signal(signal.SIGINT)
    assert first.end().status == 130
    worker.signal(signal.SIGTERM)
    logged = worker.end().err
    assert logged.count("\n") == 1
    assert "refused, at capacity: 1 requests run" in logged


def test_with_static_discovery_the_id_is_the_lists(trd, trd_dir):
    address = f"unix://{trd_dir}/static.sock"
    static = {"TRD_DISCOVERY": "static", "TRD_STATIC": f"a.b.c={address}"}
    worker = trd.serve("worker:echo", "a.b.c", "--listen", address, env=static)
    said = trd.run("call", "a.b.c", "1", "--instance", str(worker.id), env=static)
    assert (said.status, said.err) == (0, "")


def test_goes_on_where_nobody_reads_the_ready_line(trd):
    worker = trd.start("serve", "worker:echo", "--endpoint", "a.b.c")
    worker.out.close()
    assert trd.run("call", "a.b.c", "1", "--wait", "20").status == 0
    worker.signal(signal.SIGTERM)
    assert worker.process.wait() == 0


def test_the_ready_line_has_the_documented_form():
    assert READY.fullmatch("ready: serving a.b.c as instance 5 at tcp://[::1]:7000\n")


@pytest.mark.parametrize(
    ("target", "endpoints"),
    [
        (["declared"], ["demo.declared.double", "demo.declared.count"]),
        (["declared:count"], ["demo.declared.count"]),
        (["declared:Adder"], ["demo.declared.add"]),
    ],
)
def test_serves_what_is_declared(trd, target, endpoints):
    worker = trd.start("serve", *target)
    ready = [READY.fullmatch(worker.line()) for _ in endpoints]
    assert [each and each[1] for each in ready] == endpoints
    if "demo.declared.double" in endpoints:
        assert trd.run("call", "demo.declared.count", "3").lines == ["0", "2", "4"]
    if "demo.declared.add" in endpoints:
        assert [trd.run("call", "demo.declared.add", "3").lines for _ in range(2)] == [["3"], ["6"]]
    worker.signal(signal.SIGTERM)
    assert worker.end().status == 0


def test_a_program_serves_what_it_declares(trd):
    program = subprocess.Popen(
        [sys.executable, "declared.py"],
        cwd=PROGRAMS,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None
        assert [(READY.fullmatch(program.stdout.readline()) or ["", ""])[1] for _ in range(2)] == [
            "demo.declared.double",
            "demo.declared.count",
        ]
        assert trd.run("call", "demo.declared.double", "4").lines == ["8"]
        program.send_signal(signal.SIGTERM)
        assert program.wait(60) == 0
    finally:
        program.kill()
        program.communicate()


def test_the_status_port_is_published_and_other_commands_leave_it_alone(trd):
    trd.serve("worker:echo", "demo.b.g", env={"TRD_STATUS_PORT": "0"})
    with socket.create_server(("127.0.0.1", 0)) as taken:  # As a worker's fixed port is taken for commands beside it.
        port = str(taken.getsockname()[1])
        said = trd.run("describe", "demo.b.g", "--json", env={"TRD_STATUS_PORT": port})
    assert (said.status, said.err) == (0, "")
    assert '"status_url":"http://127.0.0.1:' in said.out

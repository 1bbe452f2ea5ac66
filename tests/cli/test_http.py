"""`trd http`: it answers, drains, and says what is wrong with its options."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from tests.cli.command import Running, Trd
from tests.timing import PATIENCE_S
from triton_distributed.cli.model.together import LONGEST_READ, _Workers


def url_of(running: Running) -> str:
    word, url = running.line().split()
    assert word == "ready:"
    assert url.endswith("/v1")
    return url.removesuffix("/v1")


def test_a_request_that_runs_at_sigterm_is_answered_whole(trd: Trd, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    trd.serve("worker:gated", "demo.b.gated")
    front = trd.start("http", "--port", "0", "--route", "POST", "/gated=demo.b.gated", "--api-key", "k")
    url = url_of(front)
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as http:
        assert http.post("/gated", json=str(gate)).status_code == 401
        accept = {"authorization": "Bearer k", "accept": "text/event-stream", "x-request-id": "mine"}
        with http.stream("POST", "/gated", json=str(gate), headers=accept) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "data: begun"
            front.signal(signal.SIGTERM)
            assert front.err is not None
            said = front.err.readline()
            while "draining" not in said:
                said = front.err.readline()
            assert said.startswith("draining: 1 request(s) may run for at most ")
            gate.write_text("")
            assert [each for each in lines if each] == ["data: done"]
    ended = front.end()
    assert (ended.status, ended.out) == (0, "")
    assert "mine POST '/gated' 200 " in ended.err


def test_a_second_signal_ends_it_at_once(trd: Trd) -> None:
    trd.serve("worker:one_then_wait", "demo.b.w")
    front = trd.start("http", "--port", "0", "--route", "/w=demo.b.w", "--no-access-log")
    url, head = url_of(front), {"accept": "text/event-stream"}
    with httpx.stream("POST", f"{url}/w", json=1, headers=head, timeout=PATIENCE_S) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "data: one"
        front.signal(signal.SIGTERM)
        assert front.err is not None
        assert front.err.readline().startswith("draining: 1 request(s)")
        while front.process.poll() is None:  # An echo of the first signal would not count.
            front.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                front.process.wait(0.1)
    assert front.process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--route", "/a"], "'/a' is not a route: write POST /path=namespace.component.endpoint"),
        (["--route", "/health=a.b.c"], "the path /health is taken"),
        (["--port", "x"], "'x' is not a port"),
        (["--routing", "best"], "--routing 'best': give one of kv, kv_linear, prefix_hash, session, "),
        (["--cors", "chat.example.com"], "--cors 'chat.example.com' is not an origin: write https://"),
        (["--cors", "https://chat.example.com/"], "is not an origin"),
        (["--api-key", "a b"], "an API key is a text without white space"),
        (["--api-key-file", "absent"], "cannot read absent: No such file or directory"),
    ],
)
def test_a_wrong_option_is_one_line(trd: Trd, options: list[str], says: str) -> None:
    port = [] if "--port" in options else ["--port", "0"]
    said = trd.run("http", *port, *options)
    assert (said.status, said.out) == (2, "")
    assert says in said.err
    assert said.err.count("\n") == 1


def test_a_port_in_use_is_one_line(trd: Trd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for command in (["http"], ["model", "run", "m", "--engine", "mock"]):
            said = trd.run(*command, "--port", str(port))
            assert (said.status, said.out) == (1, "")
            assert f"cannot listen on 127.0.0.1:{port}: Address already in use; another program listens" in said.err
            assert said.err.count("\n") == 1


def test_model_run_ends_with_the_status_and_the_words_of_its_workers(trd: Trd) -> None:
    said = trd.run("model", "run", "m", "--engine", "mock", "--option", "slot=1", "--port", "0")
    assert (said.status, said.out) == (2, "")
    assert "the engine mock has no such option; its options: " in said.err
    assert said.err.endswith("trd model run: error: the workers have ended with status 2\n")


async def test_workers_of_model_run_may_print_lines_of_any_length(capsys: pytest.CaptureFixture[str]) -> None:
    async def ended() -> int:
        return 3

    ready = "ready: serving the model é as instance 1 at x\n"
    text = ("é" * LONGEST_READ * 3 + "\n" + ready + "é" * LONGEST_READ).encode()
    link, theirs = socket.socketpair()
    with theirs:
        process = SimpleNamespace(stdout=asyncio.StreamReader(), wait=ended)
        process.stdout.feed_data(text)
        process.stdout.feed_eof()
        workers = _Workers(process, link)  # type: ignore[arg-type]
        assert await workers.ready() == "é"
        assert await workers.ended == 3
    assert capsys.readouterr().err == text.decode().replace("ready: ", "workers: ")


def test_model_run_serves_a_model_replaces_a_killed_worker_and_leaves_nothing(trd: Trd) -> None:
    options = ["--engine", "mock", "--name", "a model", "--alias", "a", "--option", "slots=2", "--queue", "1"]
    front = [
        "--api-key",
        "k",
        "--cors",
        "https://chat",
        "--route",
        "/own=models.x.y",
        "--namespace",
        "n",
        "--port",
        "0",
    ]
    running = trd.start("model", "run", "other", *options, *front)
    url = url_of(running)
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as http:
        assert http.get("/v1/models").status_code == 401
        http.headers["authorization"] = "Bearer k"
        listed = http.get("/v1/models", headers={"origin": "https://chat"})
        assert [each["id"] for each in listed.json()["data"]] == ["a model", "a"]
        assert listed.headers["access-control-allow-origin"] == "https://chat"
        assert http.get("/health").json()["routes"] == {"/own": 0}
        (first,) = instances(trd)
        os.kill(pid_of(trd, first), signal.SIGKILL)
        assert running.err is not None
        for words in ("starting again", "workers: serving the model a model"):
            while words not in running.err.readline():
                pass
            answer = http.post("/v1/completions", json={"model": "a", "prompt": "hi", "max_tokens": 3})
            assert answer.status_code in (200, 503), "clients try again, as they do not after a 404"
        while http.get("/health").json()["models"] != ["a model"]:
            pass
        answer = http.post("/v1/completions", json={"model": "a", "prompt": "hi", "max_tokens": 3})
        assert answer.json()["usage"]["completion_tokens"] == 3
    running.signal(signal.SIGTERM)
    ended = running.end()
    assert ended.status == 0
    assert "POST '/v1/completions' 200 model=a" in ended.err
    assert instances(trd) == []


def instances(trd: Trd) -> list[str]:
    lines = trd.run("model", "ls", "--namespace", "n", "--json").lines
    return [instance for each in lines for instance in json.loads(each)["instances"]]


def pid_of(trd: Trd, instance: str) -> int:
    (pid,) = {json.loads(each)["pid"] for each in trd.run("describe", instance, "--json").lines}
    return int(pid)


def test_the_workers_of_a_killed_model_run_end(trd: Trd) -> None:
    running = trd.start("model", "run", "m", "--engine", "mock", "--workers", "2", "--port", "0")
    url_of(running)
    running.process.kill()
    running.end()  # It reads to the end of the error output, which the workers share.
    assert trd.run("model", "ls", "--json").lines == []

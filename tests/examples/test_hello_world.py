"""Hello world: with two servers, rapid requests show up in both servers' output; with one, in that one."""

from __future__ import annotations

import os
import re

import pytest

from tests.examples.programs import Program, run, serving, wait_for_instances
from tests.servers import missing
from triton_distributed.testing import ServerMissing
from triton_distributed.testing.servers import program

SERVER, CLIENT, DEMO, CLUSTER = (f"hello_world/{name}.py" for name in ("server", "client", "demo", "demo_cluster"))
RECEIVED = "Received request: hello world"

# Both ways to run a program, whichever it has chosen itself. Many install uvloop so, though its newer `run` is preferred.
LOOPS = {
    "asyncio": "import asyncio, uvloop; uvloop.run = asyncio.run",
    "uvloop": "import uvloop, warnings; warnings.simplefilter('ignore', DeprecationWarning); uvloop.install()",
}


def test_one_server():
    with serving(SERVER) as server:
        assert run(CLIENT) == list("hello world")
        assert run(CLIENT, "10") == list("hello world") * 10
    assert re.match(r"Started server instance \d+\n", server.output)
    assert server.output.count(RECEIVED) == 11


def test_two_servers_share_rapid_requests():
    with serving(SERVER) as one, serving(SERVER) as two:
        wait_for_instances("triton-init", "backend", "generate", 2)
        assert run(CLIENT, "10") == list("hello world") * 10
    received = [each.output.count(RECEIVED) for each in (one, two)]
    assert sum(received) == 10
    assert min(received) >= 4, received


def test_the_client_may_come_first():
    client = Program(CLIENT)
    try:
        with serving(SERVER):
            assert client.end().splitlines() == list("hello world")
    finally:
        client.kill()


@pytest.mark.parametrize("loop", LOOPS)
def test_either_loop(loop):
    with serving(SERVER, prelude=LOOPS[loop]) as server:
        assert run(CLIENT, prelude=LOOPS[loop]) == list("hello world")
    assert server.output.count(RECEIVED) == 1


ROW = r"^(\S.*?) {2,}(server [12]) +(\S(?:.*\S)?) +[\d.]+ ms +[\d.]+ ms$"
ASKED = ["hello world", "bonjour", "grüezi", "hej", "ciao", "konnichiwa"]


def test_demo(trd_dir):
    elsewhere = trd_dir / "elsewhere"
    lines = run(DEMO, environment={"TMPDIR": str(trd_dir), "TRD_DIR": str(elsewhere), "TRD_LISTEN": "nonsense"})
    text = "\n".join(lines)

    answered = re.findall(ROW, text, re.MULTILINE)
    assert [request for request, _, _ in answered] == ASKED
    assert all(answer == "·".join(request) for request, _, answer in answered)
    assert {server for _, server, _ in answered} == {"server 1", "server 2"}
    for server in ("server 1", "server 2"):
        assert f"{server}: received 3 requests; SIGTERM, then exit status 0" in lines

    assert not elsewhere.exists(), "the demo used the folder where other programs may run"
    assert list(trd_dir.iterdir()) == [], "the demo left its own folder behind"


def test_demo_cluster(trd_dir):
    try:
        for name in ("etcd", "nats-server"):
            program(name, os.environ)
    except ServerMissing as error:
        missing(error)
    lines = run(CLUSTER, environment={"TMPDIR": str(trd_dir), "ETCD_ENDPOINTS": "nonsense", "TRD_LISTEN": "nonsense"})
    text = "\n".join(lines)

    assert re.match(r"etcd at http://127\.0\.0\.1:\d+, NATS at nats://127\.0\.0\.1:\d+\n", text)
    assert "client.py: 10 calls, 110 characters, exit status 0" in lines
    answered = re.findall(ROW, text, re.MULTILINE)
    assert [request for request, _, _ in answered] == ASKED
    assert {server for _, server, _ in answered} == {"server 1", "server 2"}
    assert re.search(r"^event greetings: \{'hello': 'cluster'\} went from runtime \d+ to \d+$", text, re.MULTILINE)
    for server in ("server 1", "server 2"):
        assert f"{server}: received 8 requests; SIGTERM, then exit status 0" in lines
    assert list(trd_dir.iterdir()) == [], "the demo left its own folders behind"

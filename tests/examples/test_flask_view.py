"""Flask: both processes of the server answer, and a killed worker costs no request."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from socket import AF_UNIX, socket
from time import monotonic
from typing import Any

import pytest

from tests.examples.programs import EXAMPLES, Program, serving, wait_for_instances
from tests.guards.tree import SRC
from tests.timing import PATIENCE_S

pytest.importorskip("flask")
pytest.importorskip("gunicorn")

CALLERS, CALLS = 8, 50


@contextlib.contextmanager
def server(path: Path) -> Iterator[None]:
    """The application under gunicorn, which listens on a Unix socket."""
    gunicorn = [sys.executable, "-m", "gunicorn", "--no-control-socket", "--log-level", "warning"]
    options = ["--chdir", str(EXAMPLES / "flask_view"), "--workers", "2", "--threads", "8", "--bind", f"unix:{path}"]
    process = subprocess.Popen(
        [*gunicorn, *options, "app:app"],
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )
    try:
        yield
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()


def embed(path: Path, body: Any) -> tuple[int, Any]:
    """POST to the application once it listens, and return status and answer."""
    until = monotonic() + PATIENCE_S
    connection = HTTPConnection("server", timeout=PATIENCE_S)
    with contextlib.closing(connection):
        while True:
            connection.sock = socket(AF_UNIX)
            try:
                connection.sock.connect(str(path))
                break
            except OSError:
                connection.sock.close()
                assert monotonic() < until, "the server does not listen"
        connection.request("POST", "/embed", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


@pytest.mark.slow
@pytest.mark.leaves("socket files", reason="a killed worker cannot remove its socket")
def test_flask_view(tmp_path: Path):
    path = tmp_path / "http"
    half = threading.Barrier(CALLERS + 1)

    def calls(caller: int) -> list[tuple[int, Any]]:
        before = [embed(path, {"texts": ["a" * caller]}) for _ in range(CALLS)]
        half.wait(PATIENCE_S)
        return before + [embed(path, {"texts": ["a" * caller]}) for _ in range(CALLS)]

    second = Program("flask_view/worker.py")
    try:
        with serving("flask_view/worker.py"), server(path):
            wait_for_instances("examples", "flask_view", "embed", 2)
            assert embed(path, {"texts": ["some words"]})[1]["vectors"] == [[10, 2]]
            with ThreadPoolExecutor(CALLERS) as threads:
                waiting = [threads.submit(calls, caller) for caller in range(CALLERS)]
                half.wait(PATIENCE_S)
                second.kill()  # All callers are calling.
                answers = [each.result(PATIENCE_S) for each in waiting]
    finally:
        second.kill()
    for caller, found in enumerate(answers):
        vector = [[caller, 1 if caller else 0]]
        assert [(status, answer.get("vectors")) for status, answer in found] == [(200, vector)] * 2 * CALLS
    assert len({answer["worker"] for found in answers for _, answer in found}) == 2

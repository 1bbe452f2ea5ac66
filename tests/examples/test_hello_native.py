"""Hello world with the native API, also under load while a worker is killed."""

from __future__ import annotations

import asyncio

import pytest

from tests.examples.load import AT_ONCE, CALLS, streams_with_a_kill
from tests.examples.programs import Program, run, serving

WORKER, CLIENT = "hello_native/worker.py", "hello_native/client.py"


def test_hello_native():
    with serving(WORKER, served=True) as worker:
        assert run(CLIENT) == ["remote", "feels", "local"]
    assert "ready: serving examples.hello.generate as instance " in worker.output


def test_the_client_may_come_first():
    client = Program(CLIENT)
    try:
        with serving(WORKER, served=True):
            assert client.end().split()[:3] == ["remote", "feels", "local"]
    finally:
        client.kill()


@pytest.mark.leaves("socket files", reason="a killed worker cannot remove its socket")
def test_a_kill_under_load_cuts_at_most_what_the_worker_had():
    victim = Program(WORKER, served=True)
    try:
        with serving(WORKER, served=True):
            name = "examples.hello.generate"
            words = ["remote", "feels", "local"] * 20
            ends = asyncio.run(streams_with_a_kill(name, {name: 2}, " ".join(words), words, victim.kill))
    finally:
        victim.kill()
    assert ends.total() == CALLS
    assert ends["cut"] <= AT_ONCE

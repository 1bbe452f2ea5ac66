"""The benchmarks of a model over HTTP: the client that reads streams, the bare server, and the tables."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager

import pytest

from benchmarks.llm import engines, servers
from benchmarks.llm.processes import Processes
from benchmarks.llm.reader import AnswerFailed, gaps, load
from benchmarks.llm.steps import Gaps, Steps, read_gaps
from benchmarks.llm.work import CHUNKS, WHOLE
from benchmarks.rounds import Rounds
from benchmarks.table import MODELS, render_foreign
from tests.benchmarks.samples import result, rounds_of
from triton_distributed.llm import Request, packed

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b"b\r\ndata: {1}\n\n\r\n"
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


@contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Answer one connection after another in a thread, each request by `answer`."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                while connection.recv(65536):
                    answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_client_counts_the_events_of_answers_that_come_in_pieces():
    answer = HEAD + EVENT * 3 + END

    def one_byte_at_a_time(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(answer)):
            connection.sendall(answer[at : at + 1])

    with serving(one_byte_at_a_time) as port:
        told = load(port, "/x", "{}", 1, 0.02, [os.getpid()])
    assert told["requests"] >= 1
    assert told["events"] == 3 * told["requests"]
    assert told["servers_s"][0] > 0
    assert told["client_s"] > 0


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", "503"),
        (HEAD + EVENT, "ended after 1 events"),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", "no length"),
    ],
)
def test_client_refuses_an_answer_that_is_not_whole(answer, text):
    def send(connection: socket.socket) -> None:
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)

    with serving(send) as port, pytest.raises(AnswerFailed) as found:
        load(port, "/x", "{}", 1, 0.01, [])
    assert text in str(found.value)


def test_events_that_come_together_have_one_gap():
    def events(connection: socket.socket) -> None:
        connection.sendall(HEAD)
        try:
            while True:
                connection.sendall(EVENT * 4)
                pause.wait(0.002)
        except OSError:
            return  # The client has left.

    pause = threading.Event()
    with serving(events) as port:
        told = gaps(port, "/x", "{}", 1, 0.0, 0.05, [])
    assert told["events"] >= 4 * told["reads"] > 0
    assert told["max_ms"] > 1, "the time between two sends is at least 2 ms"
    assert told["ended"] - told["began"] == pytest.approx(0.05)


async def test_step_ends_all_waits_and_is_noted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_LLM_GAPS", str(tmp_path / "gaps"))
    gaps = Gaps()
    steps = Steps(0.001, gaps)
    for _ in range(3):
        await asyncio.gather(*(steps.wait() for _ in range(5)))
    gaps.write()
    found = read_gaps(tmp_path / "gaps", 0, float("inf"))
    assert len(found) == 2
    assert read_gaps(tmp_path / "gaps", 0, 0) == []


async def test_mock_engine_with_a_clock_writes_the_gaps_between_its_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_LLM_GAPS", str(tmp_path / "gaps"))
    monkeypatch.setattr(engines, "gaps", Gaps())
    engine = engines.Timed(itl_ms=1, answer_tokens=0)
    request = Request(prompt=packed([65, 66]), max_tokens=4)
    tokens = [each async for output in engine.generate(request) for each in output.token_ids]
    await engine.close()
    assert len(tokens) == 4
    assert len(read_gaps(tmp_path / "gaps", 0, float("inf"))) == 3


async def test_bare_server_answers_the_bytes_that_it_was_given_and_ends(tmp_path):
    event = b'data: {"choices":[]}\n\n'
    bodies = {"whole": b'{"choices":[]}', "chunks": event * 5 + b"data: [DONE]\n\n"}
    async with AsyncExitStack() as stack:
        server = await servers.bare(Processes(stack, tmp_path), [WHOLE, CHUNKS], bodies)
        for work, events in ((WHOLE, 0), (CHUNKS, 5)):
            told = await asyncio.to_thread(
                load, server.port, server.path(work), server.body(work), 2, 0.02, server.pids
            )
            assert told["events"] == events * told["requests"]
    with pytest.raises(ProcessLookupError):
        os.kill(server.pids[0], 0)


def test_request_of_a_workload_names_its_model():
    body = json.loads(CHUNKS.body())
    assert (body["model"], body["max_tokens"], body["stream"]) == ("chunks", 200, True)
    assert json.loads(CHUNKS.body("echo", "a"))["messages"] == [{"role": "user", "content": "a"}]


def test_tables_have_our_ratio_but_none_of_figures_that_say_how_it_went():
    peers = (("ours", 40.0, 0.5), ("bare", 80.0, 1.0))
    rounds: Rounds = {"whole": {name: rounds_of(per_s=[rate], front_cores=[cores]) for name, rate, cores in peers}}
    lines = render_foreign(result(rounds), MODELS["llm-overhead.json"]).splitlines()
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if "|" in line
    }
    assert cells["whole answers: requests/s"] == ["40.0", "80.0 (0.50 ×)"]
    assert cells["whole answers: cores that the server of HTTP keeps busy"] == ["0.50", "1.00"]

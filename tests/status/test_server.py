"""The status port with clients that are slow, many, malformed or hostile."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.runtime.cluster import patiently
from tests.status.web import connect, fetch, fetch_here, read_answer
from tests.timing import PATIENCE_S
from triton_distributed.status import server as server_module
from triton_distributed.status.http import BODY_BYTES, HEAD_BYTES, Request, Response, json_response
from triton_distributed.status.server import MOST_ANSWERS, MOST_CONNECTIONS, HttpServer

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def answers() -> dict[str, Any]:
    """What the server answers, by path."""
    return {"/": "fine"}


@pytest.fixture
def server(answers: dict[str, Any]) -> Iterator[HttpServer]:
    def answer(request: Request) -> Response:
        found = answers[request.path]
        return json_response(found(request) if callable(found) else found)

    made = HttpServer("127.0.0.1", 0, answer, lambda: True)
    yield made
    ended = threading.Event()
    made.stop(ended.set)
    assert ended.wait(10)
    made.join(1)
    made.stop(lambda: None)  # It may be repeated.


async def test_slow_clients_give_way_to_others(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many connections as there are places, of which each has sent a part of a request."""
    monkeypatch.setattr(server_module, "TRANSFER_S", PATIENCE_S)
    slow = [await connect(server.url) for _ in range(MOST_CONNECTIONS)]
    for _, writer in slow:
        writer.write(b"GET / HT")
    others = [await fetch(server.url) for _ in range(3)]
    assert [each.status for each in others] == [200, 200, 200]
    assert await patiently(slow[0][0].read()) == b""  # The one that had waited longest was cut.
    slow[-1][1].write(b"TP/1.1\r\nHost: localhost\r\n\r\n")
    assert (await read_answer(slow[-1][0])).status == 200
    for _, writer in slow:
        writer.close()


async def test_a_crowd_of_requests_that_take_long_is_told_to_come_later(
    server: HttpServer, answers: dict[str, Any]
) -> None:
    go_on, began = threading.Event(), threading.Semaphore(0)

    def wait(_: Request) -> str:
        began.release()
        go_on.wait(60)
        return "done"

    answers["/wait"] = wait
    answers["/live"] = "alive"
    crowd = [asyncio.ensure_future(fetch(f"{server.url}/wait")) for _ in range(MOST_ANSWERS)]
    while began._value < MOST_ANSWERS:
        await asyncio.sleep(0.001)
    refused = await fetch(server.url)
    assert (refused.status, "are being answered already" in refused.json()["error"]) == (503, True)
    assert (await fetch(f"{server.url}/live")).status == 200
    answers["/live"] = wait
    crowd += [asyncio.ensure_future(fetch(f"{server.url}/live")) for _ in range(MOST_CONNECTIONS - MOST_ANSWERS)]
    while began._value < MOST_CONNECTIONS:
        await asyncio.sleep(0.001)
    refused = await fetch(server.url)
    assert (refused.status, refused.json()["error"]) == (503, "all connections of the status port are in use")
    go_on.set()
    assert {each.status for each in await asyncio.gather(*crowd)} == {200}
    assert (await fetch(server.url)).status == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\n" + b"X: " + b"x" * 2 * HEAD_BYTES, 431),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (GET + b"Content-Length: -1\r\n\r\n", 400),
        (GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (GET + b"Host: other\r\n\r\n", 400),
        (GET + f"Content-Length: {BODY_BYTES + 1}\r\n\r\n".encode(), 413),
        (GET + b"Transfer-Encoding: chunked\r\n\r\n", 501),
    ],
    ids=lambda each: str(each)[:40],
)
async def test_a_malformed_request_is_refused_with_its_reason(server: HttpServer, sent: bytes, status: int) -> None:
    reader, writer = await connect(server.url)
    writer.write(sent)
    answer = await read_answer(reader)
    assert (answer.status, list(answer.json())) == (status, ["error"])
    writer.close()
    assert (await fetch(server.url)).status == 200


async def test_a_client_that_waits_to_send_its_body_is_told_to_go_on(
    server: HttpServer, answers: dict[str, Any]
) -> None:
    answers["/echo"] = lambda request: request.body.decode()
    reader, writer = await connect(server.url)
    writer.write(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
    assert await patiently(reader.readuntil(b"\r\n\r\n")) == b"HTTP/1.1 100 Continue\r\n\r\n"
    for part in (b"a", b"bc"):
        writer.write(part)
        await writer.drain()
    assert (await read_answer(reader)).json() == "abc"
    writer.close()


async def test_a_client_that_sends_too_slowly_is_cut(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "TRANSFER_S", 0.05)
    monkeypatch.setattr(server_module, "IDLE_S", 0.1)
    reader, writer = await connect(server.url)
    writer.write(b"GET / HTTP/1.1\r\n")
    assert await patiently(reader.read()) == b""
    writer.close()
    reader, writer = await connect(server.url)  # This one sends nothing.
    assert await patiently(reader.read()) == b""
    writer.close()


async def test_a_page_in_a_browser_cannot_use_the_port(server: HttpServer) -> None:
    port = server.url.rpartition(":")[2]
    for host in ("attacker.example", f"attacker.example:{port}", "127.0.0.1.attacker.example", "[::1"):
        assert (await fetch(server.url, Host=host)).status == 403
    for host in ("localhost", f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LOCALHOST"):
        assert (await fetch(server.url, Host=host)).status == 200
    for origin in ("http://attacker.example", "null", "http://localhost:1"):
        assert (await fetch(server.url, "POST", Origin=origin)).status == 403
        assert (await fetch(server.url, Origin=origin)).status == 200
    assert (await fetch(server.url, "POST", Origin=server.url)).status == 200


async def test_an_error_of_a_page_is_a_response_and_is_logged_once(
    server: HttpServer, answers: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: Request) -> None:
        raise ZeroDivisionError("a defect")

    answers["/fails"] = fails
    for _ in range(3):
        answer = await fetch(f"{server.url}/fails")
        assert (answer.status, answer.json()) == (500, {"error": "ZeroDivisionError: a defect"})
    assert len([each for each in caplog.records if "failed" in each.getMessage()]) == 1


async def test_a_child_gives_up_the_port(server: HttpServer) -> None:
    """A child that kept the listening socket would take connections, which nothing in it answers."""
    reader, writer = await connect(server.url)
    go_on, held = os.pipe()
    if (child := os.fork()) == 0:
        os.close(held)
        os.read(go_on, 1)
        os._exit(0)
    try:
        writer.write(GET + b"Connection: close\r\n\r\n")
        assert (await read_answer(reader)).status == 200
        assert await patiently(reader.read()) == b""  # The child does not keep the connection open.
    finally:
        writer.close()
        for each in (go_on, held):
            os.close(each)
        os.waitpid(child, 0)


def test_it_answers_on_ipv6_and_without_a_loop() -> None:
    server = HttpServer("::1", 0, lambda _: json_response("six"), lambda: True)
    try:
        assert server.url.startswith("http://[::1]:")
        assert fetch_here(server.url + "/").json() == "six"
    finally:
        server.stop(lambda: None)
        server.join(10)

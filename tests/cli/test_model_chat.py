"""`trd model chat`: it streams, remembers, and says what has failed."""

from __future__ import annotations

import http.server
import io
import json
import signal
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import httpx
import pytest

from tests.cli.terminal import Terminal
from tests.timing import PATIENCE_S
from triton_distributed.cli.failure import Failure
from triton_distributed.cli.main import main
from triton_distributed.cli.model.chat import Chat

URL = "http://front/v1"


def chat_with(answer: Callable[[httpx.Request], httpx.Response]) -> Chat:
    return Chat(httpx.Client(transport=httpx.MockTransport(answer)), URL, {"model": "m"}, "be brief", httpx.HTTPError)


def streamed(*texts: str, end: str = "data: [DONE]\n\n") -> httpx.Response:
    chunks = [
        {"choices": [{"delta": {"role": "assistant"}}]},
        *({"choices": [{"delta": {"content": t}}]} for t in texts),
    ]
    return httpx.Response(200, text=": comment\n\n" + "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + end)


def test_an_answer_is_printed_and_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    bodies: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == f"{URL}/chat/completions"
        bodies.append(json.loads(request.content))
        return streamed("Hel", "lo")

    chat = chat_with(answer)
    assert chat.say("hi")
    assert chat.say("more")
    assert capsys.readouterr().out == "Hello\nHello\n"
    assert [each["role"] for each in bodies[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert bodies[1]["messages"][2]["content"] == "Hello"
    chat.begin()
    chat.say("new")
    assert len(bodies[2]["messages"]) == 2


def test_ctrl_c_stops_the_answer_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return streamed("one", "two")

    chat = chat_with(answer)

    def interrupt(*words: str, **options: Any) -> None:
        if words == ("two",):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("builtins.print", interrupt)
        assert not chat.say("hi")
    assert chat.say("again")
    assert bodies[1]["messages"][2] == {"role": "assistant", "content": "onetwo"}
    assert capsys.readouterr().out == "onetwo\n"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (httpx.Response(404, json={"error": {"message": "no model m."}}), "no model m. Models that are served: a, b$"),
        (httpx.Response(502, text="<html>"), "answered with status 502"),
        (streamed("a", end='data: {"error": {"message": "lost"}}\n\n'), "has ended early: lost"),
        (streamed("a", end=""), "has ended early: the connection was closed"),
        (httpx.Response(200, text="data: [1]\n\n"), "is not that of the OpenAI API"),
    ],
)
def test_a_failure_is_told_and_its_message_forgotten(answer: httpx.Response, says: str) -> None:
    sent: list[Any] = []
    served = httpx.Response(200, json={"data": [{"id": "a"}, {"id": "b"}]})

    def answers(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content)["messages"])
        return answer if len(sent) == 1 else streamed("ok")

    chat = chat_with(lambda request: served if request.method == "GET" else answers(request))
    with pytest.raises(Failure, match=says):
        chat.say("hi")
    chat.say("again")
    assert [each["content"] for each in sent[1]] == ["be brief", "again"]


class Slow(http.server.BaseHTTPRequestHandler):
    """Answers a message with the same text, and never ends the answer to `wait`."""

    said: ClassVar[list[str]] = []
    left: ClassVar[threading.Event]

    def do_POST(self) -> None:
        messages = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"]
        self.said.append(messages[-1]["content"])
        self.send_response(200)
        self.end_headers()
        text = f"got {self.said[-1]!r} after {len(messages) - 1}"
        self.wfile.write(f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n".encode())
        if self.said[-1] == "wait":
            self.connection.recv(1)  # Until the client leaves.
            self.left.set()
        else:
            self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


def test_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slow, "said", [])
    monkeypatch.setattr(Slow, "left", threading.Event(), raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        terminal = Terminal("model", "chat", "m", "--url", f"http://127.0.0.1:{server.server_port}/v1")
        try:
            terminal.shows("> ")
            terminal.press("one\\\n")
            terminal.shows(". ")
            terminal.press("two\n")
            terminal.shows("got 'one\\ntwo' after 0")
            terminal.shows("> ")
            terminal.press("wait\n")
            terminal.shows("got 'wait' after 2")
            terminal.process.send_signal(signal.SIGINT)
            terminal.shows("> ")
            terminal.press("more\n")
            terminal.shows("got 'more' after 4")
            assert Slow.left.wait(PATIENCE_S)
            terminal.shows("> ")
            terminal.press("\x04")
            assert terminal.end()[0] == 0
        finally:
            terminal.close()
            server.shutdown()
            thread.join()
    assert Slow.said == ["one\ntwo", "wait", "more"]


def test_wrong_uses_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["model", "chat", "m", "--url", "front"]) == 2
    assert "does not begin with http://" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["model", "chat", "m"]) == 2
    assert "standard input has no message" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("hi"))
    assert main(["model", "chat", "m", "--url", "http://127.0.0.1:1/v1"]) == 1
    assert capsys.readouterr().err.endswith("; `trd http` and `trd model run` answer there\n")

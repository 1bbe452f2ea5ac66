"""`trd model chat NAME`: talk to a model in the terminal, over the OpenAI API of a front end."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import msgspec

from triton_distributed.cli.failure import INTERRUPTED, USAGE, Failure, one_line

EPILOG = """\
In a terminal, Ctrl-C stops the answer, /new begins another chat, and Ctrl-D ends
the program. A line that ends with \\ goes on in the next one. If standard input is
not a terminal, its text is one message:
    echo "What is 2 + 2?" | trd model chat smollm2
"""

CONNECT_S = 10.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("name", metavar="NAME", help="the model")
    parser.add_argument(
        "--url",
        metavar="URL",
        default="http://127.0.0.1:8000/v1",
        help="the API's base URL (default: http://127.0.0.1:8000/v1)",
    )
    parser.add_argument("--api-key", metavar="KEY", default="", help="the key, if the front end needs one")
    parser.add_argument("--system", metavar="TEXT", default="", help="instructions for the model")
    parser.add_argument(
        "--temperature", metavar="T", type=float, help="0 takes the likeliest token each time (default: the API's, 1)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Chat until the end of the input."""
    if importlib.util.find_spec("httpx") is None:
        raise Failure("httpx is not installed: pip install 'triton-distributed[llm]'")
    httpx = importlib.import_module("httpx")
    if not arguments.url.startswith(("http://", "https://")):
        raise Failure(f"--url {arguments.url!r} does not begin with http:// or https://", USAGE)
    headers = {"authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    with httpx.Client(headers=headers, timeout=httpx.Timeout(None, connect=CONNECT_S)) as http:
        url, fixed = arguments.url.rstrip("/"), {"model": arguments.name}
        if arguments.temperature is not None:
            fixed["temperature"] = arguments.temperature
        chat = Chat(http, url, fixed, arguments.system, httpx.HTTPError)
        if sys.stdin.isatty():
            _talk(chat)
            return 0
        text = sys.stdin.read().strip()
        if not text:
            raise Failure("standard input has no message", USAGE)
        return 0 if chat.say(text) else INTERRUPTED


def _talk(chat: Chat) -> None:
    """Read messages from the terminal, and print the answers."""
    if importlib.util.find_spec("readline") is not None:
        importlib.import_module("readline")  # With it, `input` edits lines and remembers them.
    print("Ctrl-C stops an answer, /new begins another chat, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            text = _message()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if text == "/new":
            chat.begin()
        elif text:
            try:
                chat.say(text)
            except Failure as failure:
                print(f"error: {failure}", file=sys.stderr)


def _message() -> str:
    """Read a message from the terminal; a line that ends with a backslash goes on in the next one."""
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". "))
    return "\n".join(lines).strip()


class Chat:
    """A chat with its messages so far.

    Args:
        http: makes the requests; a `httpx.Client`.
        url: the API's base URL.
        fixed: what all requests have, e.g. the model's name.
        system: instructions for the model; empty for none.
        failures: the exceptions of `http`.
    """

    def __init__(self, http: Any, url: str, fixed: dict[str, Any], system: str, failures: type[Exception]) -> None:
        self._http, self._url, self._fixed, self._system, self._failures = http, url, fixed, system, failures
        self.begin()

    def begin(self) -> None:
        """Forget the messages so far."""
        self._said = [{"role": "system", "content": self._system}] if self._system else []

    def say(self, text: str) -> bool:
        """Send a message, and print its answer while it comes.

        Returns:
            whether the answer is complete; if not, Ctrl-C has ended it.

        Raises:
            Failure: there is no answer, or it has ended early. The message is then not part of the chat.
        """
        said = [*self._said, {"role": "user", "content": text}]
        parts: list[str] = []
        complete = True
        try:
            for part in self._answer(said):
                parts.append(part)
                print(part, end="", flush=True)
        except KeyboardInterrupt:
            complete = False
        except self._failures as error:
            words = one_line(str(error) or type(error).__name__)
            raise Failure(f"{self._url}: {words}; `trd http` and `trd model run` answer there") from error
        finally:
            if parts or not complete:
                print(flush=True)
        if parts or complete:
            self._said = [*said, {"role": "assistant", "content": "".join(parts)}]
        return complete

    def _answer(self, messages: list[dict[str, str]]) -> Iterator[str]:
        body = {**self._fixed, "messages": messages, "stream": True}
        with self._http.stream("POST", f"{self._url}/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                found = _error(answer.read()) or f"{self._url} answered with status {answer.status_code}"
                raise Failure(found + self._remedy(answer.status_code))
            for line in answer.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if found := _error(data.encode()):
                    raise Failure(f"the answer has ended early: {found}")
                yield from _texts(data)
        raise Failure("the answer has ended early: the connection was closed")

    def _remedy(self, status: int) -> str:
        if status == 401:
            return " Here: --api-key KEY"
        if status != 404:
            return ""
        return self._served() if self._url.endswith("/v1") else f"; the URL should perhaps end with /v1: {self._url}/v1"

    def _served(self) -> str:
        """Say which models there are."""
        try:
            names = [each["id"] for each in msgspec.json.decode(self._http.get(f"{self._url}/models").content)["data"]]
        except (self._failures, msgspec.DecodeError, LookupError, TypeError):
            return ""
        return f" Models that are served: {', '.join(map(str, names)) or 'none'}"


def _error(body: bytes) -> str:
    """The message of an error; empty without one."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
    error = found.get("error") if isinstance(found, dict) else None
    return str(error.get("message", "")) if isinstance(error, dict) else ""


def _texts(data: str) -> Iterator[str]:
    try:
        choices = msgspec.json.decode(data)["choices"]
        yield from (text for each in choices if (text := each["delta"].get("content")))
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError) as error:
        raise Failure("the answer is not that of the OpenAI API") from error

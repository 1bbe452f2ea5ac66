"""A small HTTP client for chats: it measures, checks, and leaves at any moment."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field

import httptools

from triton_distributed.llm import Request, Sampling, packed
from triton_distributed.llm.engines.mock.tokens import EOS, answer

ANSWER_TOKENS = 1 << 20
"""Answers of the runs end by `max_tokens`: workers have this as `answer_tokens`."""


class Left(Exception):
    """The server closed the connection before the end of an answer."""


@dataclass
class Chat:
    """A request whose answer is known.

    Attributes:
        number: is in the prompt, so that the engine can tell the request.
        tokens: of the answer.
        stream: whether the answer comes in parts.
        model: the model's name.
    """

    number: int
    tokens: int
    stream: bool
    model: str = "mock"

    @property
    def http(self) -> bytes:
        """The whole request."""
        given = {
            "model": self.model,
            "messages": [{"role": "user", "content": self._content}],
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        if self.stream:
            given |= {"stream": True, "stream_options": {"include_usage": True}}
        body = json.dumps(given).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        return head.encode() + body

    @property
    def _content(self) -> str:
        return f"#{self.number}# tell me more"

    def expected(self) -> tuple[str, tuple[int, int]]:
        """Return the text of the answer, and the tokens of prompt and answer."""
        ids = f"<user>{self._content}\n<assistant>".encode()
        request = Request(prompt=packed(list(ids)), max_tokens=self.tokens, sampling=Sampling(temperature=0))
        tokens = answer(request, seed=0, answer_tokens=ANSWER_TOKENS, max_tokens=self.tokens).tokens
        assert EOS not in tokens
        return tokens.decode(), (len(ids), self.tokens)


@dataclass
class Answer:
    """What came back.

    Attributes:
        status: of HTTP; 0 before the headers.
        body: the body, without the framing of chunks.
        ended: whether it is whole.
        text, usage, error: of the body, when `read` has been called.
    """

    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False
    text: str = ""
    usage: tuple[int, int] = (0, 0)
    error: str = ""

    def read(self, chat: Chat) -> None:
        """Read text, usage and error from the body."""
        if self.status != 200:
            self.error = self.body.decode()
            return
        if not chat.stream:
            found = json.loads(self.body)
            self.text = found["choices"][0]["message"]["content"]
            self._take_usage(found["usage"])
            return
        done = False
        for event in self.body.decode().split("\n\n"):
            if event == "data: [DONE]":
                done = True
            elif event.startswith("data: "):
                found = json.loads(event[6:])
                if "error" in found:
                    self.error = event
                    return
                for choice in found["choices"]:
                    self.text += choice["delta"].get("content") or ""
                if found.get("usage"):
                    self._take_usage(found["usage"])
        if not done:
            self.error = "the stream has no [DONE]"

    def _take_usage(self, usage: dict[str, int]) -> None:
        self.usage = usage["prompt_tokens"], usage["completion_tokens"]

    def wrong(self, chat: Chat) -> str:
        """Return what is wrong with the answer; empty if it is exact."""
        self.read(chat)
        if self.error:
            return f"chat {chat.number}, status {self.status}: {self.error[:300]}"
        text, usage = chat.expected()
        if self.text != text:
            found = f"{len(self.text)} characters {self.text[:60]!r}"
            return f"chat {chat.number}: {found}, expected {len(text)}: {text[:60]!r}"
        if self.usage != usage:
            return f"chat {chat.number}: usage {self.usage}, expected {usage}"
        return ""


class Caller(asyncio.Protocol):
    """One connection. It takes one request at a time.

    Attributes:
        answer: the present answer.
        open: whether the connection can take a request.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._changed: asyncio.Future[None] | None = None
        self.answer = Answer()
        self.open = False

    @classmethod
    async def connect(cls, url: str) -> Caller:
        """Connect to a server, `http://HOST:PORT`."""
        host, port = url.removeprefix("http://").split(":")
        _, caller = await asyncio.get_running_loop().create_connection(cls, host, int(port))
        return caller

    def send(self, chat: Chat) -> None:
        """Send a request."""
        assert self.open
        assert self._transport is not None
        self.answer = Answer()
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(chat.http)

    async def first(self) -> None:
        """Wait until a part of the body has come."""
        while not self.answer.body:
            await self._wait()

    async def whole(self) -> Answer:
        """Wait for the end of the answer.

        Raises:
            Left: the server closed the connection before.
        """
        while not self.answer.ended:
            await self._wait()
        return self.answer

    async def _wait(self) -> None:
        if not self.open:
            raise Left(f"after {len(self.answer.body)} bytes")
        self._changed = self._loop.create_future()
        await self._changed

    def leave(self, reset: bool) -> float:
        """Close the connection now, with a reset or with an end; return the time."""
        assert self._transport is not None
        socket = self._transport.get_extra_info("socket")
        self.open = False
        self._wake()
        at = time.monotonic()
        if reset:
            self._transport.abort()
        else:
            socket.shutdown(2)
            self._transport.abort()
        return at

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    # asyncio.Protocol and the parser's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.open = transport, True

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        self._wake()

    def on_headers_complete(self) -> None:
        self.answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.answer.body += body

    def on_message_complete(self) -> None:
        self.answer.ended = True
        if not self._parser.should_keep_alive():
            self.open = False


async def get(url: str, path: str) -> Answer:
    """Return the answer to a GET request."""
    caller = await Caller.connect(url)
    try:
        caller.answer = Answer()
        caller._parser = httptools.HttpResponseParser(caller)
        assert caller._transport is not None
        caller._transport.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        return await caller.whole()
    finally:
        caller.leave(True)

"""A small HTTP client for tests of the status port: on the test's own loop, or for a loop that is stuck, in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tests.timing import PATIENCE_S


class Answer(NamedTuple):
    """A response: its status, its headers with names in lower case, and its body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    return await asyncio.open_connection(parts.hostname, parts.port)


async def read_answer(reader: asyncio.StreamReader, method: str = "GET") -> Answer:
    async with asyncio.timeout(PATIENCE_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in head[1:] if each)}
        length = 0 if method == "HEAD" else int(headers.get("content-length", "0"))
        return Answer(int(head[0].split()[1]), headers, await reader.readexactly(length))


async def fetch(url: str, method: str = "GET", body: bytes = b"", **headers: str) -> Answer:
    """Send one request and read its response, on a connection of its own."""
    reader, writer = await connect(url)
    parts = urlsplit(url)
    lines = [f"{method} {parts.path or '/'}{parts.query and '?' + parts.query} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in {"Host": parts.netloc, **headers}.items()]
    writer.write("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body)
    try:
        return await read_answer(reader, method)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def fetch_here(url: str) -> Answer:
    """Like `fetch`, in a thread without a loop."""
    parts = urlsplit(url)
    assert parts.hostname
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE_S)
    try:
        connection.request("GET", parts.path)
        response = connection.getresponse()
        return Answer(response.status, {}, response.read())
    finally:
        connection.close()

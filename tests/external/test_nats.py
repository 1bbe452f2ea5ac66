"""Why NATS cannot be reached, where attempts fail in different ways."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from tests.timing import PATIENCE_S
from triton_distributed.cli.checks import services
from triton_distributed.config import Config
from triton_distributed.external import nats
from triton_distributed.external.nats import NatsConnection, NatsOptions

INFO = {"server_id": "x", "version": "2.15.1", "max_payload": 1 << 20, "auth_required": True}
ASKED = "the server asks for authentication, and ended the connection: "

Step = Callable[[asyncio.StreamWriter], None]


def refuse(writer: asyncio.StreamWriter) -> None:
    writer.write(b"-ERR 'Authorization Violation'\r\n")
    writer.close()


def reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def end(writer: asyncio.StreamWriter) -> None:
    writer.close()


def welcome(writer: asyncio.StreamWriter) -> None:
    writer.write(b"PONG\r\n")


@contextlib.asynccontextmanager
async def server(*steps: Step) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A server that ends its connections in these ways, one after the other, and leaves all later ones alone.

    Yields:
        its URL, and an event that is set when each of `steps` was taken and the client has come again.
    """
    left, done, open_ends = list(steps), asyncio.Event(), set[asyncio.StreamWriter]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ends.add(writer)
        writer.write(b"INFO " + json.dumps(INFO).encode() + b"\r\n")
        if not left:
            done.set()
            return
        step = left.pop(0)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # the client has gone
            await reader.readuntil(b"PING\r\n")
            step(writer)
            while step is welcome:
                await reader.readuntil(b"PING\r\n")
                step(writer)

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"nats://127.0.0.1:{listening.sockets[0].getsockname()[1]}", done
    finally:
        listening.close()
        for each in open_ends:
            each.transport.abort()
        await listening.wait_closed()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats, "RECONNECT_WAIT_S", 0.01)


@pytest.mark.parametrize(
    ("steps", "trouble"),
    [
        ([refuse, reset], "nats: 'Authorization Violation'"),
        ([reset, refuse], "nats: 'Authorization Violation'"),
        ([refuse, end], "nats: 'Authorization Violation'"),
        ([reset, refuse, end, reset], "nats: 'Authorization Violation'"),
        ([reset], f"{ASKED}[Errno 104] Connection reset by peer"),
        ([end], f"{ASKED}nats: unexpected EOF"),
    ],
)
async def test_a_refusal_wins_over_what_other_attempts_meet(steps: Sequence[Step], trouble: str) -> None:
    async with server(*steps) as (url, done):
        connection = NatsConnection(NatsOptions(url, timeout_s=PATIENCE_S))
        connecting = asyncio.create_task(connection.client())
        async with asyncio.timeout(PATIENCE_S):
            await done.wait()
        assert connection.trouble == trouble
        await connection.close()
        await asyncio.wait([connecting])
    assert "NATS_AUTH_TOKEN" in services._nats_advice(trouble)


async def test_a_refusal_is_forgotten_once_there_is_a_connection() -> None:
    async with server(refuse, welcome) as (url, _):
        connection = NatsConnection(NatsOptions(url, timeout_s=PATIENCE_S))
        assert (await connection.client()).is_connected
        await connection._on_error(await connection.client(), OSError("the host is unreachable"))
        assert connection.trouble == "the host is unreachable"
        await connection.close()


async def test_a_connection_that_is_closed_before_it_is_usable_is_made_again() -> None:
    async with server(end, welcome) as (url, _):
        connection = NatsConnection(NatsOptions(url, timeout_s=PATIENCE_S))
        assert (await connection.client()).is_connected
        assert connection.reconnections == 1
        await connection.close()


async def test_the_doctor_tells_the_refusal() -> None:
    async with server(refuse, *[reset] * 500) as (url, _):
        (found,) = await services.nats(Config(nats_server=url, connect_timeout_s=0.5))
    assert (found.level, found.part) == ("error", "nats")
    assert found.text.endswith("nats: 'Authorization Violation' (tried for 0.5 s)")
    assert "NATS_AUTH_TOKEN" in found.advice

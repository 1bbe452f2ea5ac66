"""Ports of the loopback for servers that a peer needs."""

from __future__ import annotations

import asyncio
import socket
import time

START_S = 20.0


def free_port() -> int:
    """Return a port of the loopback that no process listens on now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


async def wait_until_open(host: str, port: int) -> None:
    """Return when the port takes connections. Raise TimeoutError if it does not within 20 s."""
    over = time.monotonic() + START_S
    while True:
        try:
            _, writer = await asyncio.open_connection(host, port)
        except ConnectionRefusedError:
            if time.monotonic() > over:
                raise TimeoutError(f"{host}:{port} took no connection within {START_S:g} s") from None
            await asyncio.sleep(0.01)
        else:
            writer.close()
            return

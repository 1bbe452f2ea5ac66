"""How a mock engine gets the blocks of a prompt from another one: over TCP. No block is sent, but its time passes.

The line `KEY TOKENS` asks for a prompt, and `done` answers it when the transfer is over. A connection that ends before
ends the transfer.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import Any

from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.engines.mock.timing import Timing

HOST = "127.0.0.1"
_DONE = b"done\n"


class Keeper:
    """The computed prompts of one engine that wait to be fetched.

    Args:
        timing: how long a transfer takes.
    """

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._server: asyncio.Server | None = None
        self._port = 0
        self._kept: dict[str, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen on a free port.

        Raises:
            OSError: it cannot.
        """
        self._server = await asyncio.start_server(self._connected, HOST, 0)
        self._port = self._server.sockets[0].getsockname()[1]

    def keep(self) -> dict[str, Any]:
        """Let another engine fetch a prompt. Returns what that needs for it; see `until_fetched`."""
        key = secrets.token_hex(8)
        self._kept[key] = asyncio.get_running_loop().create_future()
        return {"host": HOST, "port": self._port, "key": key}

    async def until_fetched(self, kv_transfer: dict[str, Any], timeout_s: float) -> None:
        """Wait until a prompt was fetched, until the fetching was given up, or until the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._kept[kv_transfer["key"]]

    def forget(self, kv_transfer: dict[str, Any]) -> None:
        """Do not keep a prompt any more."""
        self._kept.pop(kv_transfer["key"], None)

    async def close(self) -> None:
        """Stop listening, and end what runs."""
        if self._server is not None:
            self._server.close()
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._give(reader, writer), name="mock engine gives blocks")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _give(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            key, _, tokens = (await reader.readline()).decode().partition(" ")
            kept = self._kept.get(key)
            if kept is None:
                return
            try:
                async with asyncio.timeout(self._timing.transfer_ms(int(tokens)) / 1000):
                    await reader.read(1)  # The other engine has given up.
            except TimeoutError:
                if key in self._kept:
                    writer.write(_DONE)
            if not kept.done():
                kept.set_result(None)
        except (OSError, ValueError):  # The connection is lost, or another program has sent something else.
            return
        finally:
            writer.close()


async def fetch(kv_transfer: dict[str, Any], tokens: int) -> bool:
    """Fetch a prompt from another engine.

    Args:
        kv_transfer: what that said.
        tokens: those of the prompt that are not here yet.

    Returns:
        Whether its blocks have come. If not, the prompt is to be computed here.

    Raises:
        InvalidParameter: no mock engine has said this.
    """
    try:
        host, port, key = str(kv_transfer["host"]), int(kv_transfer["port"]), str(kv_transfer["key"])
    except (KeyError, TypeError, ValueError):
        raise InvalidParameter("kv_transfer", "it is not that of a mock engine") from None
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    try:
        writer.write(f"{key} {tokens}\n".encode())
        return await reader.readline() == _DONE
    except OSError:
        return False
    finally:
        writer.close()

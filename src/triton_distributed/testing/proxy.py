"""A proxy that stands between a client and one address and fails as networks do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_distributed.transport import unix
from triton_distributed.transport.address import Address

CHUNK = 64 * 1024  # carried at once, bytes; what the proxy holds of one direction of one connection
LINGER_NOTHING = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close sends a reset, see socket(7)


@dataclass(slots=True)
class Faults:
    """What happens to the bytes of one direction, on open connections and on new ones.

    Attributes:
        delay_s: seconds by which each piece of up to 64 KiB comes later; it therefore also limits the throughput.
        bytes_per_s: throughput of a connection, bytes a second; None for no limit.
        truncate_at: bytes of a connection after which both its directions end, as if the sender had died; None: never.
        corrupt_at: the byte of a connection, counted from 0, that arrives with all its bits turned; None for none.
    """

    delay_s: float = 0.0
    bytes_per_s: float | None = None
    truncate_at: int | None = None
    corrupt_at: int | None = None


class FaultProxy:
    """Carries connections to `target`; `async with` starts and closes it.

    Args:
        target: the address to carry to: `tcp://host:port` or `unix:///path`.
        listen: where to listen; by default a free port of 127.0.0.1, or the target's path with `.proxy` behind it.

    Attributes:
        address: what clients dial instead of the target; empty before the start.
        up: what happens to bytes from the client.
        down: what happens to bytes to the client.
    """

    def __init__(self, target: str, listen: str | None = None) -> None:
        self._target = Address.parse(target, "target")
        beside = "tcp://127.0.0.1:0" if self._target.scheme == "tcp" else f"{target}.proxy"
        self._listen = Address.parse(listen or beside, "listen")
        self._server: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], _Link] = {}  # one a connection
        self._open = asyncio.Event()
        self._open.set()
        self.address = ""
        self.up, self.down = Faults(), Faults()

    async def __aenter__(self) -> FaultProxy:
        if self._listen.scheme == "unix":
            with unix.reachable(Path(self._listen.host)) as path:
                self._server = await asyncio.start_unix_server(self._accept, path)
            self.address = str(self._listen)
        else:
            self._server = await asyncio.start_server(self._accept, self._listen.host, self._listen.port)
            port = self._server.sockets[0].getsockname()[1]
            self.address = str(Address("tcp", self._listen.host, port))
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._server is not None:
            self._server.close()
        links = list(self._links)
        for task in links:
            task.cancel()
        await asyncio.gather(*links, return_exceptions=True)
        if self._listen.scheme == "unix":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._listen.host)

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._links)

    def black_hole(self) -> None:
        """Carry nothing more; connections stay open and nobody is told."""
        self._open.clear()

    def heal(self) -> None:
        """Carry again, beginning with what was held."""
        self._open.set()

    def cut(self, *, reset: bool = False) -> None:
        """End every connection: both ends see its end, or with `reset` a reset (TCP). New ones are carried."""
        for task, link in list(self._links.items()):
            if reset:
                task.cancel()  # its end is a reset
            else:
                link.cut()
        self.heal()

    def half_close(self) -> None:
        """End what comes from the clients of the open connections; what goes to them is carried on."""
        for link in self._links.values():
            link.end(link.server)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(writer)
        task = asyncio.get_running_loop().create_task(self._carry(reader, link))
        self._links[task] = link
        task.add_done_callback(self._links.pop)

    async def _carry(self, client: asyncio.StreamReader, link: _Link) -> None:
        try:
            if self._target.scheme == "unix":
                with unix.reachable(Path(self._target.host)) as path:
                    server, link.server = await asyncio.open_unix_connection(path)
            else:
                server, link.server = await asyncio.open_connection(self._target.host, self._target.port)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(client, link.server, link, self.up))
                both.create_task(self._pump(server, link.client, link, self.down))
            await link.close()
        except* OSError:
            pass  # one end is gone without an end of its bytes: so it is for the other
        finally:
            link.reset()

    async def _pump(self, source: asyncio.StreamReader, sink: Any, link: _Link, faults: Faults) -> None:
        carried = 0
        while data := await source.read(CHUNK):
            if faults.delay_s:
                await asyncio.sleep(faults.delay_s)
            await self._open.wait()
            if link.over:
                continue  # read to the end all the same: closing on unread bytes would be a reset
            if faults.bytes_per_s:
                await asyncio.sleep(len(data) / faults.bytes_per_s)
            if faults.corrupt_at is not None and 0 <= (at := faults.corrupt_at - carried) < len(data):
                data = data[:at] + bytes((data[at] ^ 0xFF,)) + data[at + 1 :]
            if faults.truncate_at is not None:
                data = data[: max(0, faults.truncate_at - carried)]
            carried += len(data)
            if sink not in link.ended:
                sink.write(data)
                await sink.drain()
            if faults.truncate_at is not None and carried >= faults.truncate_at:
                link.cut()
        await self._open.wait()
        link.end(sink)


class _Link:
    """One connection through the proxy: the ends that are written to."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.server: asyncio.StreamWriter | None = None
        self.ended: set[asyncio.StreamWriter | None] = set()  # those that get no more bytes
        self.over = False

    def end(self, writer: asyncio.StreamWriter | None) -> None:
        if writer is not None and writer not in self.ended:
            self.ended.add(writer)
            with contextlib.suppress(OSError, RuntimeError):  # it is gone already
                writer.write_eof()

    def cut(self) -> None:
        self.over = True
        self.end(self.client)
        self.end(self.server)

    async def close(self) -> None:
        for writer in (self.client, self.server):
            if writer is not None:
                writer.close()
                await writer.wait_closed()

    def reset(self) -> None:
        for writer in (self.client, self.server):
            if writer is not None and not writer.is_closing():
                sock = writer.get_extra_info("socket")
                if sock.family in (socket.AF_INET, socket.AF_INET6):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOTHING)
                writer.transport.abort()

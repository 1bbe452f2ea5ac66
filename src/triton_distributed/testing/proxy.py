"""A proxy between a client and one address that fails as networks do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from triton_distributed.errors import ConfigError
from triton_distributed.system import unix_sockets
from triton_distributed.system.unix_sockets import stop_listening
from triton_distributed.transport.address import Address

# Bytes forwarded at once. A blocked direction has a few chunks in the proxy and is not read any further, so its sender
# is blocked as by a peer that does not read.
CHUNK = 64 * 1024
LINGER_NOTHING = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: closing sends a reset, see socket(7).


@dataclass(slots=True)
class Faults:
    """The faults of one direction, for open connections and new ones.

    Attributes:
        delay_s: delay of each piece of up to 64 KiB, in seconds; it therefore also limits the throughput.
        bytes_per_s: throughput of a connection, in bytes per second; None or 0 for no limit.
        truncate_at: bytes of a connection after which both its directions end, as if the sender had died; None: never.
        corrupt_at: the byte of a connection, counted from 0, that arrives with all its bits flipped; None for none.
    """

    delay_s: float = 0.0
    bytes_per_s: float | None = None
    truncate_at: int | None = None
    corrupt_at: int | None = None


class FaultProxy:
    """Forwards connections to `target`. `async with` starts and closes the proxy.

    An event at one end of a connection is passed to the other end: the end of its bytes ends that direction, and a
    reset resets the other end. A target that cannot be reached also resets the client.

    Args:
        target: the address to forward to: `tcp://host:port` or `unix:///path`.
        listen: the address to listen on; by default a free port of 127.0.0.1, or the target's path with `.proxy`.

    Attributes:
        address: the address that clients dial instead of the target; empty before the start.
        up: the faults of bytes from the client.
        down: the faults of bytes to the client.

    Raises:
        ConfigError: an address is invalid, or has the scheme `memory`, which uses no network.
    """

    def __init__(self, target: str, listen: str | None = None) -> None:
        self._target = _on_a_network(target, "target")
        beside = "tcp://127.0.0.1:0" if self._target.scheme == "tcp" else f"{target}.proxy"
        self._listen = _on_a_network(listen or beside, "listen")
        self._server: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], _Link] = {}  # One for each connection.
        self._open = asyncio.Event()
        self._open.set()
        self.address = ""
        self.up, self.down = Faults(), Faults()

    async def __aenter__(self) -> FaultProxy:
        if self._listen.scheme == "unix":
            with unix_sockets.reachable(Path(self._listen.host)) as path:
                self._server = await asyncio.start_unix_server(self._accept, path)
            self.address = str(self._listen)
        else:
            self._server = await asyncio.start_server(self._accept, self._listen.host, self._listen.port)
            port = self._server.sockets[0].getsockname()[1]
            self.address = str(Address("tcp", self._listen.host, port))
        return self

    async def __aexit__(self, *exception: object) -> None:
        server, self._server = self._server, None
        if server is not None:
            stop_listening(asyncio.get_running_loop(), server)
        links = dict(self._links)
        for task in links:
            task.cancel()
        await asyncio.gather(*links, return_exceptions=True)
        for link in links.values():
            link.reset()
            await link.gone()
        if self._listen.scheme == "unix":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._listen.host)

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._links)

    def black_hole(self) -> None:
        """Forward no further bytes. Connections stay open, and neither end notices."""
        self._open.clear()

    def heal(self) -> None:
        """Forward again, beginning with the bytes that were held back."""
        self._open.set()

    def cut(self, *, reset: bool = False) -> None:
        """End every connection: both ends see its end, or with `reset` a reset (TCP). New ones are forwarded."""
        for task, link in list(self._links.items()):
            if reset:
                task.cancel()  # A cancelled task resets its connection.
            else:
                link.cut()
        self.heal()

    def truncate_after(self, count: int) -> None:
        """Reset each present connection after another `count` bytes of either direction (TCP)."""
        for link in self._links.values():
            for end in (link.client, link.server):
                end.truncate_at = end.carried + count

    def corrupt_after(self, count: int) -> None:
        """Flip the bits of the byte after another `count` bytes, in both directions of each present connection."""
        for link in self._links.values():
            for end in (link.client, link.server):
                end.corrupt_at = end.carried + count

    @property
    def threatened(self) -> int:
        """The number of open connections that `truncate_after` or `corrupt_after` has affected or will affect."""
        ends = ((link.client, link.server) for link in self._links.values())
        return sum(
            any(end.corrupted or (end.truncate_at, end.corrupt_at) != (None, None) for end in both) for both in ends
        )

    def spare(self) -> None:
        """Cancel the faults of `truncate_after` and `corrupt_after` that have not happened yet."""
        for link in self._links.values():
            for end in (link.client, link.server):
                end.truncate_at = end.corrupt_at = None

    def half_close(self) -> None:
        """End the direction from the clients in all open connections. Bytes to the clients are still forwarded."""
        for link in self._links.values():
            link.server.end()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(reader, writer)
        if self._server is None:  # The connection came while the proxy was closing.
            link.reset()
            return
        task = asyncio.get_running_loop().create_task(self._carry(link))
        self._links[task] = link
        task.add_done_callback(self._carried)

    def _carried(self, task: asyncio.Task[None]) -> None:
        # This is not done in the task itself, because a task that is cancelled before its first step never begins.
        self._links.pop(task).reset()

    async def _carry(self, link: _Link) -> None:
        try:
            link.server.join(*await self._dial())
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(link.client, link.server, link, self.up))
                both.create_task(self._pump(link.server, link.client, link, self.down))
            await link.close()
        except* OSError:
            pass  # One end is gone without ending its bytes; the other end gets a reset.

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._target.scheme == "unix":
            with unix_sockets.reachable(Path(self._target.host)) as path:
                return await asyncio.open_unix_connection(path)
        return await asyncio.open_connection(self._target.host, self._target.port)

    async def _pump(self, source: _End, sink: _End, link: _Link, faults: Faults) -> None:
        try:
            while data := await source.read():
                if faults.delay_s:
                    await asyncio.sleep(faults.delay_s)
                if faults.bytes_per_s:
                    await asyncio.sleep(len(data) / faults.bytes_per_s)
                await self._open.wait()
                if link.over:
                    continue  # Read to the end nevertheless: closing with unread bytes would send a reset.
                for place in (faults.corrupt_at, source.corrupt_at):
                    if place is not None and 0 <= (at := place - source.carried) < len(data):
                        data = data[:at] + bytes((data[at] ^ 0xFF,)) + data[at + 1 :]
                        source.corrupted = True
                ends = [place for place in (faults.truncate_at, source.truncate_at) if place is not None]
                if ends:
                    data = data[: max(0, min(ends) - source.carried)]
                source.carried += len(data)
                await sink.write(data)
                if source.truncate_at is not None and source.carried >= source.truncate_at:
                    raise ConnectionResetError("truncated")
                if ends and source.carried >= min(ends):
                    link.cut()
        except OSError:
            await self._open.wait()  # In a black hole, neither end notices.
            raise
        await self._open.wait()
        sink.end()


def _on_a_network(address: str, name: str) -> Address:
    parsed = Address.parse(address, name)
    if parsed.scheme == "memory":
        raise ConfigError(name, address, "a proxy needs sockets: unix:///path or tcp://host:port")
    return parsed


class _End:
    """One end of a connection: the client's, or the server's, which joins a little later.

    Attributes:
        carried: forwarded bytes that came from this end.
        truncate_at: bytes from this end after which the connection is reset; None for never.
        corrupt_at: the byte from this end, counted from 0, that arrives with its bits flipped; None for none.
        corrupted: whether a byte was corrupted.
    """

    def __init__(self) -> None:
        self.carried = 0
        self.truncate_at: int | None = None
        self.corrupt_at: int | None = None
        self.corrupted = False
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._ended = False  # This end gets no further bytes.

    def join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        if self._ended:
            self._write_eof()

    async def read(self) -> bytes:
        """Return the next bytes; no bytes at the end.

        Raises:
            OSError: this end is gone without ending its bytes.
        """
        assert self._reader is not None
        return await self._reader.read(CHUNK)

    async def write(self, data: bytes) -> None:
        """Write data, unless this direction has ended, and wait until more can be written.

        Raises:
            OSError: this end is gone.
        """
        assert self._writer is not None
        if self._ended or not data:
            return
        if self._writer.is_closing():
            raise ConnectionResetError("one end of the connection is gone")
        self._writer.write(data)
        await self._writer.drain()

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            self._write_eof()

    def _write_eof(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError, RuntimeError):  # This end may be gone already.
                self._writer.write_eof()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def reset(self) -> None:
        if self._writer is None:
            return
        if not self._writer.is_closing():  # Otherwise the descriptor may belong to another socket by now.
            sock = self._writer.get_extra_info("socket")
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOTHING)
        self._writer.transport.abort()

    async def gone(self) -> None:
        if self._writer is not None:
            await self._writer.wait_closed()


class _Link:
    """One connection through the proxy.

    Attributes:
        over: both ends were notified of the connection's end; bytes that still come from them are dropped.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.client, self.server = _End(), _End()
        self.client.join(reader, writer)
        self.over = False

    def cut(self) -> None:
        self.over = True
        self.client.end()
        self.server.end()

    async def close(self) -> None:
        """Close both ends after they have accepted all written bytes."""
        self.client.close()
        self.server.close()
        await self.client.gone()
        await self.server.gone()

    def reset(self) -> None:
        """Reset both ends now; an end that is closed is not affected."""
        self.client.reset()
        self.server.reset()

    async def gone(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                await end.gone()

"""An array echoed over a bare Unix socket: whole messages of one known size between two buffered protocols.

It has only the workload `array`. Each end reads an array into fresh memory with huge pages and has it whole before it
sends or returns it, as every peer here does. There are no frames, calls or streams: this is what the socket can do.
"""

from __future__ import annotations

import asyncio
import mmap
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.handlers import Call, Handler

SIZE = 16 << 20  # Bytes of each message.
SEND_BUFFER = 512 * 1024  # As large as ours.


class Whole(asyncio.BufferedProtocol):
    """Reads messages of `SIZE` bytes. The serving end sends each one back."""

    transport: asyncio.Transport

    def __init__(self, echoes: bool) -> None:
        self.echoes = echoes
        self.memory: mmap.mmap | None = None
        self.have = 0
        self.arrived: asyncio.Future[mmap.mmap] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self.memory is None:
            self.memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self.memory.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(self.memory)[self.have :]

    def buffer_updated(self, count: int) -> None:
        self.have += count
        if self.have == SIZE:
            memory, self.memory, self.have = self.memory, None, 0
            assert memory is not None
            if self.echoes:
                self.transport.write(memory)  # type: ignore[arg-type]
            elif self.arrived is not None:
                self.arrived.set_result(memory)


class Bare:
    """One listening socket, for the handler `echo`."""

    def __init__(self, directory: Path, tcp: bool) -> None:
        self._path = str(directory / "bare")
        self._server: asyncio.Server | None = None

    async def serve(self, service: str, handlers: dict[str, Handler]) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: Whole(True), self._path)

    async def connect(self, service: str, handler: str) -> Call:
        if handler != "echo":
            raise NotImplementedError(f"the bare socket has only the handler echo, not {handler}")
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_unix_connection(lambda: Whole(False), self._path)

        async def call(array: Any) -> AsyncIterator[Any]:
            if array.nbytes != SIZE:
                raise ValueError(f"the bare socket echoes {SIZE:,} bytes, not {array.nbytes:,}")
            protocol.arrived = loop.create_future()
            protocol.transport.write(array.data.cast("B"))
            yield np.frombuffer(await protocol.arrived, np.float32)

        return call


make = Bare

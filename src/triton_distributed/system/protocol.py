"""What a transport calls: asyncio's `Protocol`, by its methods."""

from __future__ import annotations

from asyncio import BaseTransport
from typing import Protocol


class StreamProtocol(Protocol):
    """The methods of `asyncio.Protocol`, which is all that event loops look for. A compiled class cannot inherit it."""

    def connection_made(self, transport: BaseTransport, /) -> None: ...

    def data_received(self, data: bytes, /) -> None: ...

    def eof_received(self) -> bool | None: ...

    def connection_lost(self, error: Exception | None, /) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

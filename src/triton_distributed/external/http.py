"""A client's HTTP/1.1 connection: h11 on asyncio's streams, for the JSON gateways of other servers."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import h11

CHUNK = 64 * 1024
"""The most bytes read from the socket at a time."""


class HttpMissing(Exception):
    """h11 is not installed."""


class HttpConnection:
    """A connection that carries requests one after the other; made by `await HttpConnection.open(…)`.

    Nothing here has a timeout: the caller limits the whole exchange.

    Attributes:
        reused: it has carried a request before, so the server may close it at any moment.
    """

    def __init__(self, protocol: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._protocol, self._reader, self._writer = protocol, reader, writer
        self._aborted = False
        self.reused = False

    @classmethod
    async def open(cls, host: str, port: int, tls: ssl.SSLContext | None) -> HttpConnection:
        """Connect.

        Args:
            tls: context for https; the certificate must name `host` if the context requires it.

        Raises:
            HttpMissing: h11 is not installed.
            OSError: the connection or its TLS handshake failed.
        """
        try:
            import h11  # here, because few programs use HTTP, and all would pay for the import
        except ImportError as error:
            raise HttpMissing from error
        reader, writer = await asyncio.open_connection(host, port, ssl=tls, server_hostname=host if tls else None)
        return cls(h11.Connection(h11.CLIENT), reader, writer)

    async def post(self, target: str, headers: Iterable[tuple[str, str]], body: bytes) -> int:
        """Send a request and wait for the head of its response; `read` then returns the body.

        Returns:
            the status code.

        Raises:
            ConnectionError: the connection ended, or the response is not HTTP.
        """
        import h11

        request = h11.Request(method="POST", target=target, headers=[*headers, ("Content-Length", str(len(body)))])
        sent = [self._protocol.send(each) or b"" for each in (request, h11.Data(data=body), h11.EndOfMessage())]
        self._writer.write(b"".join(sent))
        await self._writer.drain()
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                return event.status_code

    async def read(self) -> bytes:
        """Return the next piece of the body; empty at its end. Trailers are ignored.

        Raises:
            ConnectionError: the connection ended before the body did, or the response is not HTTP.
        """
        import h11

        while True:
            event = await self._next()
            if isinstance(event, h11.Data):
                return bytes(event.data)
            if isinstance(event, h11.EndOfMessage):
                return b""

    async def _next(self) -> Any:
        import h11

        try:
            while (event := self._protocol.next_event()) is h11.NEED_DATA:
                self._protocol.receive_data(await self._reader.read(CHUNK))
        except h11.RemoteProtocolError as error:
            if not self._reader.at_eof():
                raise ConnectionError(f"not HTTP: {error}") from error
            raise self._closed() from error
        if isinstance(event, h11.ConnectionClosed):
            raise self._closed()
        return event

    def _closed(self) -> ConnectionError:
        return (
            ConnectionAbortedError("ended here")
            if self._aborted
            else ConnectionError("the server closed the connection")
        )

    def renew(self) -> bool:
        """Prepare for the next request; returns False if the connection cannot carry another."""
        import h11

        if self._protocol.states != {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}:
            return False
        self._protocol.start_next_cycle()
        self.reused = True
        return self.usable

    @property
    def usable(self) -> bool:
        """Whether the connection is still open, as far as this end knows."""
        return not (self._reader.at_eof() or self._writer.is_closing())

    def abort(self) -> None:
        """Close it now; its reader gets ConnectionAbortedError. Closing twice is harmless."""
        self._aborted = True
        self._writer.transport.abort()

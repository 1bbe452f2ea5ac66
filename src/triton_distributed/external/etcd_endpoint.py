"""One client URL of etcd: its connections, the limit of an attempt, the meaning of refusals."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from triton_distributed.errors import ConfigError
from triton_distributed.external import etcd_messages as messages
from triton_distributed.external.http import HttpConnection, HttpMissing

STALL_S = 0.5
"""Seconds by which an attempt may exceed its limit. Beyond that, this process stalled, not the server."""

# gRPC's codes, see https://grpc.github.io/grpc/core/md_doc_statuscodes.html
DEADLINE, NOT_FOUND, PERMISSION, UNAVAILABLE, UNAUTHENTICATED = 4, 5, 7, 14, 16


class EtcdError(Exception):
    """A request to etcd failed."""


class EtcdUnreachable(EtcdError):
    """No endpoint answers; the text lists each with its reason."""


class EtcdRefused(EtcdError):
    """etcd answered with an error. Fields: `code` (gRPC's), `message`."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message

    @property
    def lease_is_gone(self) -> bool:
        return self.code == NOT_FOUND and "lease" in self.message

    @property
    def compacted(self) -> bool:
        """Whether the requested revision no longer exists."""
        return "compacted" in self.message

    @property
    def token_is_stale(self) -> bool:
        """Whether a new token would help: this one has expired, users have changed, or there was none."""
        words = (
            "invalid auth token",
            "user name is empty",
            "revision of auth store is old",
            "revision in header is old",
        )
        return self.code == UNAUTHENTICATED or any(each in self.message for each in words)

    @property
    def passing(self) -> bool:
        """Whether another endpoint, or the same one later, may accept the request."""
        return self.code in (DEADLINE, UNAVAILABLE) or "too many requests" in self.message


@dataclass(frozen=True, slots=True)
class EtcdOptions:
    """How to reach etcd. `endpoints` is one or more URLs, separated by commas; `tls` makes contexts for https."""

    endpoints: str = field(default="http://localhost:2379", repr=False)  # it may contain a password
    username: str = ""
    password: str = field(default="", repr=False)
    tls: Callable[[], ssl.SSLContext] | None = None


class Endpoint:
    """One client URL, and the connections to it.

    Attributes:
        trouble: why the last attempt failed; empty if it succeeded.
        streams: number of open connections that carry a watch.

    Raises:
        ConfigError: the text is not a client URL.
    """

    def __init__(self, text: str) -> None:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        try:
            host, port = parts.hostname, parts.port or 2379
        except ValueError:
            host, port = None, 0
        if parts.scheme not in ("http", "https") or not host or parts.path not in ("", "/") or parts.query:
            raise ConfigError("ETCD_ENDPOINTS", text, "etcd's client URLs, http://host:port, separated by commas")
        self.host, self.port, self.secure = host, port, parts.scheme == "https"
        self.authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.url = f"{parts.scheme}://{self.authority}"
        self.trouble = "no answer yet"
        self.idle: list[HttpConnection] = []  # at most PARALLEL
        self.open: set[HttpConnection] = set()  # all connections: idle, in use, and watches
        self.streams = 0

    async def connect(self, tls: Callable[[], ssl.SSLContext] | None) -> HttpConnection:
        """Return an idle connection, or a new one.

        Raises:
            EtcdError: h11 is not installed.
            ConfigError: a certificate file cannot be used.
            OSError: the endpoint cannot be reached.
        """
        while self.idle:
            connection = self.idle.pop()
            if connection.usable:
                return connection
            self.end(connection)
        context = (tls() if tls else ssl.create_default_context()) if self.secure else None
        try:
            connection = await HttpConnection.open(self.host, self.port, context)
        except HttpMissing:
            raise EtcdError("its client needs h11: pip install 'triton-distributed[etcd]'") from None
        self.open.add(connection)
        return connection

    def headers(self, token: str) -> list[tuple[str, str]]:
        """Return the headers of every request."""
        headers = [("Host", self.authority), ("Content-Type", "application/json")]
        return [*headers, ("Authorization", token)] if token else headers

    def keep(self, connection: HttpConnection) -> None:
        """Keep a connection for another request after an exchange, if it can be used again."""
        if connection in self.open and connection.renew():
            self.idle.append(connection)
        else:
            self.end(connection)

    def end(self, connection: HttpConnection) -> None:
        """Close one connection."""
        self.open.discard(connection)
        connection.abort()

    def end_all(self, trouble: str) -> None:
        """Close every connection; tasks that wait on one get ConnectionAbortedError."""
        self.trouble = trouble
        self.idle.clear()
        while self.open:
            self.open.pop().abort()


class Attempt:
    """The time limit of one attempt. An endpoint that exceeds it counts as frozen and loses all its connections."""

    def __init__(self, endpoint: Endpoint, limit_s: float) -> None:
        self._endpoint, self._limit_s = endpoint, limit_s
        self._timeout = asyncio.timeout(limit_s)
        self._began = time.monotonic()

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *exception: Any) -> None:
        try:
            await self._timeout.__aexit__(*exception)
        except TimeoutError:
            reason = f"no answer within {self._limit_s:.2g} s"
            if time.monotonic() - self._began < self._limit_s + STALL_S:
                self._endpoint.end_all(reason)
            raise TimeoutError(reason) from None


def refusal(status: int, answer: bytes) -> EtcdRefused:
    """Return the error in an answer with a status other than 200."""
    try:
        reply = msgspec.json.decode(answer, type=messages.ErrorReply, strict=False)
    except msgspec.DecodeError:  # from a proxy between us and etcd
        return EtcdRefused(UNAVAILABLE, f"HTTP status {status}")
    return EtcdRefused(reply.code, reply.message or reply.error or f"HTTP status {status}")


def words(error: Exception) -> str:
    """Return the reason of a failed attempt as text."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    return str(error) or type(error).__name__

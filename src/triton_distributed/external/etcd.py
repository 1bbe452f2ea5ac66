"""A client of etcd's JSON gateway for one event loop: several endpoints, renewed tokens, watches that notice silence.

A call goes to the endpoint that answered last and moves on to the next if that fails, for as long as its caller waits;
the caller may put `asyncio.timeout` around it. All requests sent here are idempotent, so a call whose answer was lost
is simply repeated.

A frozen server keeps its connections open and sends nothing. So each attempt has a limit, and while a watch is open its
endpoint is probed every 1.5 s. If an endpoint does not answer in time, all its connections are closed at once; its
watches end and are opened at another endpoint.
"""

from __future__ import annotations

import asyncio
import logging
import random
from time import monotonic
from typing import TypeVar

import msgspec

from triton_distributed.errors import ConfigError
from triton_distributed.external import etcd_messages as messages
from triton_distributed.external.etcd_endpoint import (
    PERMISSION,
    Attempt,
    Endpoint,
    EtcdOptions,
    EtcdRefused,
    EtcdUnreachable,
    refusal,
    words,
)
from triton_distributed.external.http import HttpConnection

logger = logging.getLogger("triton_distributed.etcd")

ATTEMPT_S = 1.5
"""Seconds for one small request. A healthy etcd answers within milliseconds, an election takes one second."""

READ_S = 3.0
"""Seconds for one page of a listing."""

PROBE_S = 1.5
"""Seconds between probes of an endpoint that has an open watch."""

FIRST_WAIT_S, LAST_WAIT_S = 0.05, 1.0  # first and longest pause between rounds through all endpoints

PARALLEL = 8
"""Concurrent calls, apart from the lease's; so also the number of connections, apart from the watches'."""

MAX_REPLY_BYTES = 128 * 1024 * 1024
"""The largest reply in bytes. A page of 512 records of the largest size is a third of it."""

T = TypeVar("T")


class EtcdClient:
    """A client of the endpoints of one etcd; it belongs to the loop that uses it.

    Args:
        options: the endpoints and the credentials.
        probe_key: a key that probes of an endpoint read. The user needs access to it; it need not exist.
        rng: chooses the first endpoint and the length of pauses.

    Attributes:
        where: the endpoints, for error texts.
        reachable: False after a round through all endpoints has failed, until the next success.
        answered_at: when an endpoint last answered, on `time.monotonic`; 0 before the first answer.

    Raises:
        ConfigError: an endpoint is not a URL.
    """

    def __init__(self, options: EtcdOptions, probe_key: bytes, rng: random.Random | None = None) -> None:
        self._options = options
        self._probe_key = probe_key
        self._rng = rng or random.Random()
        if "@" in options.endpoints:
            reason = "user and password are settings of their own: TRD_ETCD_USERNAME and TRD_ETCD_PASSWORD"
            raise ConfigError("ETCD_ENDPOINTS", options.endpoints, reason)
        self._endpoints = [Endpoint(each.strip()) for each in options.endpoints.split(",") if each.strip()]
        if not self._endpoints:
            raise ConfigError("ETCD_ENDPOINTS", options.endpoints, "etcd's client URLs, separated by commas")
        self.where = ", ".join(each.url for each in self._endpoints)
        self._current = self._rng.choice(self._endpoints)
        self._token = ""
        self._logging_in = asyncio.Lock()
        self._room = asyncio.Semaphore(PARALLEL)
        self._streaming = asyncio.Event()
        self.reachable = True
        self.answered_at = 0.0

    def __repr__(self) -> str:
        return f"<EtcdClient at {self._current.url}{'' if self.reachable else ' unreachable'} of {self.where}>"

    # --- requests ----------------------------------------------------------------------------------------------------

    async def range(self, key: bytes, end: bytes = b"", *, limit: int = 0, revision: int = 0) -> messages.RangeReply:
        """Read one key, or all keys from `key` up to `end`."""
        body = messages.get(key, end, limit=limit, revision=revision)["request_range"]
        return await self.call("/v3/kv/range", body, messages.RangeReply, attempt_s=READ_S)

    async def txn(
        self,
        compare: list[messages.Operation],
        success: list[messages.Operation],
        failure: list[messages.Operation] | None = None,
        *,
        attempt_s: float = ATTEMPT_S,
    ) -> messages.TxnReply:
        """Do `success` if all comparisons hold, else `failure`, as one transaction."""
        body = {"compare": compare, "success": success, "failure": failure or []}
        return await self.call("/v3/kv/txn", body, messages.TxnReply, attempt_s=attempt_s)

    async def grant(self, ttl_s: int) -> int:
        """Make a lease; returns its id."""
        return (await self.call("/v3/lease/grant", {"TTL": ttl_s}, messages.LeaseReply)).id

    async def keep_alive(self, lease: int, attempt_s: float = ATTEMPT_S) -> bool:
        """Renew a lease; returns False if it is gone. Does not count towards `PARALLEL`."""
        body = {"ID": lease}
        reply = await self._ask("/v3/lease/keepalive", body, messages.KeepAliveReply, attempt_s, once=False)
        return reply.result.ttl > 0

    async def keys_of(self, lease: int) -> set[bytes]:
        """Return the keys that are attached to a lease."""
        reply = await self.call("/v3/lease/timetolive", {"ID": lease, "keys": True}, messages.LeaseReply)
        return set(reply.keys)

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys; tries each endpoint once.

        Raises:
            EtcdUnreachable: no endpoint answered.
        """
        await self.call("/v3/lease/revoke", {"ID": lease}, messages.Nothing, once=True)

    # --- calls -------------------------------------------------------------------------------------------------------

    async def call(
        self, path: str, body: object, reply: type[T], *, attempt_s: float = ATTEMPT_S, once: bool = False
    ) -> T:
        """Send a request until a member answers.

        Args:
            attempt_s: seconds for one attempt at one endpoint.
            once: give up after a round through all endpoints.

        Raises:
            EtcdRefused: it answered with an error.
            EtcdUnreachable: no member answered, if `once` is set.
            EtcdError: h11 is not installed.
        """
        async with self._room:
            return await self._ask(path, body, reply, attempt_s, once)

    async def _ask(self, path: str, body: object, reply: type[T], attempt_s: float, once: bool) -> T:
        encoded = msgspec.json.encode(body)
        wait_s = FIRST_WAIT_S
        failures = 0
        renewed = False
        while True:
            endpoint, token = self._current, ""
            try:
                token = await self._login(endpoint)
                answer = await self._exchange(endpoint, path, encoded, token, attempt_s)
                decoded = msgspec.json.decode(answer, type=reply, strict=False)
                self._answers(endpoint)
                return decoded
            except EtcdRefused as error:
                if error.token_is_stale and self._options.username and not renewed:
                    renewed = True
                    self._forget(token)
                    continue
                if not error.passing:
                    self._answers(endpoint)
                    raise
                self._failed(endpoint, error)
            except (OSError, msgspec.DecodeError) as error:
                self._failed(endpoint, error)
            failures += 1
            if failures % len(self._endpoints) == 0:
                self._no_answer()
                if once:
                    raise EtcdUnreachable(self.troubles())
                await asyncio.sleep(wait_s * self._rng.uniform(0.5, 1.0))
                wait_s = min(2 * wait_s, LAST_WAIT_S)

    def troubles(self) -> str:
        """Return each endpoint's last failure, for an error's text."""
        return "; ".join(f"{each.url}: {each.trouble}" for each in self._endpoints if each.trouble) or self.where

    async def _login(self, endpoint: Endpoint) -> str:
        if not self._options.username:
            return ""
        async with self._logging_in:  # one login for all calls: a password check takes etcd 0.1 s
            if not self._token:
                self._token = await self._authenticate(endpoint)
            return self._token

    async def _authenticate(self, endpoint: Endpoint) -> str:
        body = msgspec.json.encode({"name": self._options.username, "password": self._options.password})
        try:
            answer = await self._exchange(endpoint, "/v3/auth/authenticate", body, "", READ_S)
        except EtcdRefused as error:
            if "not enabled" in error.message:
                return ""  # no token is needed; checked again next time, because that may change
            raise
        return msgspec.json.decode(answer, type=messages.TokenReply).token

    def _forget(self, token: str) -> None:
        if self._token == token:
            self._token = ""

    async def _exchange(self, endpoint: Endpoint, path: str, body: bytes, token: str, attempt_s: float) -> bytes:
        async with Attempt(endpoint, attempt_s):
            while True:
                connection = await endpoint.connect(self._options.tls)
                try:
                    status = await connection.post(path, endpoint.headers(token), body)
                    answer = await _whole(connection)
                except BaseException as error:
                    endpoint.end(connection)
                    lost = isinstance(error, ConnectionError) and not isinstance(error, ConnectionAbortedError)
                    if lost and connection.reused:
                        continue  # closed while it was idle: this says nothing about the endpoint
                    raise
                endpoint.keep(connection)
                break
        if status != 200:
            raise refusal(status, answer)
        return answer

    # --- choice of the endpoint --------------------------------------------------------------------------------------

    def _answers(self, endpoint: Endpoint) -> None:
        endpoint.trouble = ""
        self.answered_at = monotonic()
        if not self.reachable:
            self.reachable = True
            logger.warning("etcd answers again at %s", endpoint.url)

    def _failed(self, endpoint: Endpoint, error: Exception) -> None:
        if not isinstance(error, ConnectionAbortedError):  # else the attempt that aborted the connection knows why
            endpoint.trouble = words(error)
        logger.debug("etcd at %s: %s", endpoint.url, endpoint.trouble)
        if self._current is endpoint:
            self._current = self._endpoints[(self._endpoints.index(endpoint) + 1) % len(self._endpoints)]

    def _no_answer(self) -> None:
        if self.reachable and self.answered_at:
            logger.warning("etcd cannot be reached, known records stay in use: %s", self.troubles())
        self.reachable = False

    async def watch_over(self) -> None:
        """Probe the endpoints of open watches; run this as a task."""
        while True:
            await self._streaming.wait()
            await asyncio.sleep(PROBE_S * self._rng.uniform(0.8, 1.0))
            watched = [each for each in self._endpoints if each.streams]
            if not watched:
                self._streaming.clear()
            await asyncio.gather(*map(self._probe, watched))

    async def _probe(self, endpoint: Endpoint) -> None:
        body = msgspec.json.encode({"key": self._probe_key, "limit": 1})
        try:
            await self._exchange(endpoint, "/v3/kv/range", body, self._token, PROBE_S)
            self.answered_at = monotonic()
        except EtcdRefused as error:
            if error.passing:  # it is alive but has lost the other members: its watches would get no events
                self._failed(endpoint, error)
                endpoint.end_all(words(error))
        except Exception as error:  # any error: the other endpoints must still be probed
            self._failed(endpoint, error)
            endpoint.end_all(words(error))

    def close(self) -> None:
        """End every connection."""
        for endpoint in self._endpoints:
            endpoint.end_all("closed")

    # --- watches -----------------------------------------------------------------------------------------------------

    async def watch(self, key: bytes, end: bytes, start_revision: int) -> EtcdWatch:
        """Open a watch of the keys from `key` up to `end` at one endpoint, from a given revision on.

        Raises:
            EtcdRefused: etcd refused the watch.
            OSError, TimeoutError: the watch could not be opened. Make another call before the next attempt: it finds an
                endpoint that answers.
        """
        endpoint = self._current
        create = {"key": key, "range_end": end, "start_revision": start_revision, "fragment": True}
        body = msgspec.json.encode({"create_request": create})
        try:
            token = await self._login(endpoint)
            async with Attempt(endpoint, ATTEMPT_S):
                connection = await endpoint.connect(self._options.tls)
                watch = EtcdWatch(endpoint, connection)
                try:
                    status = await connection.post("/v3/watch", endpoint.headers(token), body)
                    if status != 200:
                        raise refusal(status, await connection.read())
                    created = await watch.read()
                    if created.canceled and "permission denied" in created.cancel_reason:
                        self._forget(token)  # or the token has expired: etcd 3.4 gives the same reason
                        raise EtcdRefused(PERMISSION, created.cancel_reason)
                except BaseException:
                    watch.close()
                    raise
        except OSError as error:
            self._failed(endpoint, error)
            raise
        self._streaming.set()
        return watch


class EtcdWatch:
    """An open watch."""

    def __init__(self, endpoint: Endpoint, connection: HttpConnection) -> None:
        self._endpoint, self._connection = endpoint, connection
        self._partial: list[bytes] = []  # an incomplete line; etcd cuts messages at about 2 MB
        self._size = 0
        self._lines: list[bytes] = []  # complete lines, last first
        self._open = True
        endpoint.streams += 1

    async def read(self) -> messages.WatchReply:
        """Return the next message.

        Raises:
            EtcdRefused: the watch ended with an error from etcd.
            ConnectionError: the connection ended, or a message was invalid.
        """
        while not self._lines:
            piece = await self._connection.read()
            if not piece:
                raise ConnectionError("the server ended the watch")
            first, *others = piece.split(b"\n")
            self._partial.append(first)
            self._size += len(first)
            if others:
                whole = [b"".join(self._partial), *others[:-1]]
                self._lines = [each for each in reversed(whole) if each]
                self._partial, self._size = [others[-1]], len(others[-1])
            if self._size > MAX_REPLY_BYTES:
                raise ConnectionError(f"a message exceeds the limit of {MAX_REPLY_BYTES:,} bytes")
        try:
            line = _WATCH_LINE.decode(self._lines.pop())
        except msgspec.DecodeError as error:
            raise ConnectionError(f"invalid message of a watch: {error}") from error
        if line.error is not None:
            raise EtcdRefused(line.error.grpc_code or line.error.code, line.error.message)
        return line.result or messages.WatchReply()

    def close(self) -> None:
        """Close the watch. Closing twice is harmless."""
        if self._open:
            self._open = False
            self._endpoint.streams -= 1
            self._endpoint.end(self._connection)


_WATCH_LINE = msgspec.json.Decoder(messages.WatchLine, strict=False)


async def _whole(connection: HttpConnection) -> bytes:
    pieces, size = [], 0
    while piece := await connection.read():
        pieces.append(piece)
        size += len(piece)
        if size > MAX_REPLY_BYTES:
            raise OSError(f"a reply exceeds the limit of {MAX_REPLY_BYTES:,} bytes")
    return b"".join(pieces)

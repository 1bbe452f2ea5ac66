"""A client of etcd's JSON gateway for one event loop: several endpoints, renewed tokens, watches that notice silence.

A call goes to the endpoint that answered last and moves on to the next when it fails, for as long as its caller waits;
`asyncio.timeout` around it is the caller's. Everything sent here may be sent twice without harm, so a call whose answer
was lost is simply repeated.

A frozen server keeps its connections open and says nothing. So each attempt has a limit, and while a watch is open its
endpoint is asked something every 1.5 s; one that does not answer in time loses all its connections at once, whereupon
the watches on it end and are opened elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import random
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
"""Seconds for one small exchange. A healthy etcd answers within milliseconds, its elections take one second."""

READ_S = 3.0
"""Seconds for one page of a listing."""

PROBE_S = 1.5
"""Seconds between checks of an endpoint on which a watch is open."""

FIRST_WAIT_S, LAST_WAIT_S = 0.05, 1.0  # between rounds through all endpoints

PARALLEL = 8
"""Calls at a time besides the lease's, and so connections besides the watches'."""

MAX_REPLY_BYTES = 128 * 1024 * 1024
"""Bytes of one reply. A page of 512 records at their largest is a third of it."""

T = TypeVar("T")


class EtcdClient:
    """Talks to the endpoints of one etcd; belongs to the loop on which it is used.

    Args:
        options: where, and as whom.
        probe_key: a key that the user may read; it need not exist. Asked for to see whether an endpoint lives.
        rng: decides where to begin and how long to pause.

    Attributes:
        where: the endpoints, for error texts.
        reachable: False from a round through all endpoints without success to the next success.

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
        self._answered = False

    def __repr__(self) -> str:
        return f"<EtcdClient at {self._current.url}{'' if self.reachable else ' unreachable'} of {self.where}>"

    # --- what can be asked -------------------------------------------------------------------------------------------

    async def range(self, key: bytes, end: bytes = b"", *, limit: int = 0, revision: int = 0) -> messages.RangeReply:
        """Read one key, or those from `key` up to `end`."""
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
        """Do `success` where all comparisons hold, else `failure`, as one step."""
        body = {"compare": compare, "success": success, "failure": failure or []}
        return await self.call("/v3/kv/txn", body, messages.TxnReply, attempt_s=attempt_s)

    async def grant(self, ttl_s: int) -> int:
        """Make a lease; its id."""
        return (await self.call("/v3/lease/grant", {"TTL": ttl_s}, messages.LeaseReply)).id

    async def keep_alive(self, lease: int, attempt_s: float = ATTEMPT_S) -> bool:
        """Renew a lease; False where it is gone. Waits for no other call's turn."""
        body = {"ID": lease}
        reply = await self._ask("/v3/lease/keepalive", body, messages.KeepAliveReply, attempt_s, once=False)
        return reply.result.ttl > 0

    async def keys_of(self, lease: int) -> set[bytes]:
        """The keys that lie under a lease."""
        reply = await self.call("/v3/lease/timetolive", {"ID": lease, "keys": True}, messages.LeaseReply)
        return set(reply.keys)

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys; tries each endpoint once.

        Raises:
            EtcdUnreachable: none answered.
        """
        await self.call("/v3/lease/revoke", {"ID": lease}, messages.Nothing, once=True)

    # --- calls -------------------------------------------------------------------------------------------------------

    async def call(
        self, path: str, body: object, reply: type[T], *, attempt_s: float = ATTEMPT_S, once: bool = False
    ) -> T:
        """Ask until a member answers.

        Args:
            attempt_s: seconds for one attempt at one endpoint.
            once: give up after a round through all endpoints.

        Raises:
            EtcdRefused: it answered no.
            EtcdUnreachable: no member answered, with `once`.
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
        """Why each endpoint failed last, for an error's text."""
        return "; ".join(f"{each.url}: {each.trouble}" for each in self._endpoints if each.trouble) or self.where

    async def _login(self, endpoint: Endpoint) -> str:
        if not self._options.username:
            return ""
        async with self._logging_in:  # one does it for all: a password costs etcd a tenth of a second
            if not self._token:
                self._token = await self._authenticate(endpoint)
            return self._token

    async def _authenticate(self, endpoint: Endpoint) -> str:
        body = msgspec.json.encode({"name": self._options.username, "password": self._options.password})
        try:
            answer = await self._exchange(endpoint, "/v3/auth/authenticate", body, "", READ_S)
        except EtcdRefused as error:
            if "not enabled" in error.message:
                return ""  # it needs no token; asked again next time, because that may change
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
                        continue  # it was closed while it was idle: that says nothing of the endpoint
                    raise
                endpoint.keep(connection)
                break
        if status != 200:
            raise refusal(status, answer)
        return answer

    # --- which member -------------------------------------------------------------------------------------------------

    def _answers(self, endpoint: Endpoint) -> None:
        endpoint.trouble = ""
        self._answered = True
        if not self.reachable:
            self.reachable = True
            logger.warning("etcd answers again at %s", endpoint.url)

    def _failed(self, endpoint: Endpoint, error: Exception) -> None:
        if not isinstance(error, ConnectionAbortedError):  # then another attempt knows why
            endpoint.trouble = words(error)
        logger.debug("etcd at %s: %s", endpoint.url, endpoint.trouble)
        if self._current is endpoint:
            self._current = self._endpoints[(self._endpoints.index(endpoint) + 1) % len(self._endpoints)]

    def _no_answer(self) -> None:
        if self.reachable and self._answered:
            logger.warning("etcd cannot be reached, what is known stays in use: %s", self.troubles())
        self.reachable = False

    async def watch_over(self) -> None:
        """Look, as long as watches are open, whether their endpoints live; run this as a task."""
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
        except EtcdRefused as error:
            if error.passing:  # it lives, and has lost the others: its watches would not hear of anything
                self._failed(endpoint, error)
                endpoint.end_all(words(error))
        except Exception as error:  # whatever it is, those that follow must be looked at
            self._failed(endpoint, error)
            endpoint.end_all(words(error))

    def close(self) -> None:
        """End every connection."""
        for endpoint in self._endpoints:
            endpoint.end_all("closed")

    # --- watches -----------------------------------------------------------------------------------------------------

    async def watch(self, key: bytes, end: bytes, start_revision: int) -> EtcdWatch:
        """Open a watch of the keys from `key` up to `end` at one endpoint, from a revision on.

        Raises:
            EtcdRefused: it was not allowed.
            OSError, TimeoutError: it could not be opened, or broke; call something else before the next attempt, which
                finds an endpoint that answers.
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
                        self._forget(token)  # or the token had expired: etcd 3.4 says the same of both
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
        self._partial: list[bytes] = []  # of a line whose end has not come; etcd cuts messages at some 2 MB
        self._size = 0
        self._lines: list[bytes] = []  # whole ones, last first
        self._open = True
        endpoint.streams += 1

    async def read(self) -> messages.WatchReply:
        """The next message.

        Raises:
            EtcdRefused: the watch ended with an error.
            ConnectionError: it ended.
        """
        while not self._lines:
            piece = await self._connection.read()
            if not piece:
                raise ConnectionError("it ended the watch")
            first, *others = piece.split(b"\n")
            self._partial.append(first)
            self._size += len(first)
            if others:
                whole = [b"".join(self._partial), *others[:-1]]
                self._lines = [each for each in reversed(whole) if each]
                self._partial, self._size = [others[-1]], len(others[-1])
            if self._size > MAX_REPLY_BYTES:
                raise ConnectionError(f"a message above the limit of {MAX_REPLY_BYTES:,} bytes")
        try:
            line = _WATCH_LINE.decode(self._lines.pop())
        except msgspec.DecodeError as error:
            raise ConnectionError(f"not a message of a watch: {error}") from error
        if line.error is not None:
            raise EtcdRefused(line.error.grpc_code or line.error.code, line.error.message)
        return line.result or messages.WatchReply()

    def close(self) -> None:
        """End it. Closing twice is harmless."""
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
            raise OSError(f"a reply above the limit of {MAX_REPLY_BYTES:,} bytes")
    return b"".join(pieces)

"""One connection to NATS, made when first needed and shared by all parts of a runtime that use NATS."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from triton_distributed.errors import BrokerError, ConfigError
from triton_distributed.quiet import Quiet
from triton_distributed.redaction import without_secrets

if TYPE_CHECKING:
    from nats.aio.client import Client as NatsClient

logger = logging.getLogger("triton_distributed.nats")

RECONNECT_WAIT_S = 0.25
"""Seconds between attempts to connect. The client library gives up after 60 x 2 s by default."""

PING_INTERVAL_S = 5.0
"""Seconds between pings. The client leaves a frozen server after two unanswered pings."""

PINGS_UNANSWERED = 2

CANCELLATIONS = 10
"""The most attempts to cancel a task of the library."""

QUIET_S = 5.0
"""Seconds between two log entries with the same error of the client library."""

REFUSED = ("authorization", "authentication")  # in the server's words when it does not accept the credentials


class NatsOptions(msgspec.Struct, frozen=True):
    """How to reach a NATS server. `servers` is one or more URLs, separated by commas."""

    servers: str = "nats://localhost:4222"
    username: str = ""
    password: str = ""
    token: str = ""
    nkey: str = ""
    credentials_file: str = ""
    tls: Callable[[], ssl.SSLContext] | None = None
    timeout_s: float = 5.0

    def __repr__(self) -> str:
        return f"<NatsOptions for {without_secrets(self.servers)}>"  # All other fields may be secrets.


class NatsConnection:
    """A connection that is made by the first `client()`, and reconnects on its own until it is closed.

    Args:
        options: the servers and the credentials.
        name: the connection's name in the server's monitoring.

    Attributes:
        where: the servers without credentials, for error texts.
        last_error: the client library's last error; empty if there was none.
        trouble: why the connection cannot be made; "no answer" if that is not known.
        reconnections: how often a lost connection was made again.
        reconnected: called without arguments after each reconnection; subscriptions are restored by then.

    Raises:
        ConfigError: the servers are not URLs.
    """

    def __init__(self, options: NatsOptions, name: str = "triton-distributed") -> None:
        self._options = options
        self._name = name
        self._urls = [each.strip() for each in options.servers.split(",") if each.strip()]
        self.where = ", ".join(_without_user(each) for each in self._urls)
        if not all(map(_is_url, self._urls)) or any(
            "," in each.rpartition("@")[0] for each in options.servers.split("://")
        ):
            raise ConfigError(
                "NATS_SERVER",
                options.servers,
                "NATS URLs are nats://host:port or nats://user:password@host:port, separated by commas; "
                "in a password write each of , : / ? # [ ] @ % as %XX",
            )
        self.reconnected: list[Callable[[], None]] = []
        self._client: NatsClient | None = None
        self._connecting: asyncio.Task[NatsClient] | None = None
        self.last_error = ""
        self._refusal = ""  # the server's words about the credentials, since the last success
        self.reconnections = 0
        self._complaints = Quiet(QUIET_S)  # the library's errors by text
        self._closed = False

    async def client(self) -> NatsClient:
        """Return the connected client. It is shared: only `close` closes or drains it.

        Raises:
            BrokerError: no server answers within the timeout, it refuses the credentials, the library is not
                installed, or this connection was closed.
        """
        if self._client is not None and not self._client.is_closed:
            return self._client
        if self._closed:
            raise BrokerError("NATS", self.where, "the connection was closed")
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())
            self._connecting.add_done_callback(self._connected)
        return await asyncio.shield(self._connecting)

    def _connected(self, task: asyncio.Task[NatsClient]) -> None:
        self._connecting = None
        if not task.cancelled() and task.exception() is None:
            self._client = task.result()
            self._refusal = ""

    async def _connect(self) -> NatsClient:
        try:
            import nats.errors
            from nats.aio.client import Client
        except ImportError as error:
            raise BrokerError(
                "NATS", self.where, "its client is not installed: pip install 'triton-distributed[nats]'"
            ) from error
        options = self._options
        client = Client()
        arguments: dict[str, Any] = {
            "user": options.username or None,
            "password": options.password or None,
            "token": options.token or None,
            "user_credentials": options.credentials_file or None,
            "nkeys_seed_str": options.nkey or None,
        }
        if options.tls is not None:
            arguments["tls"] = options.tls()
        attempts = asyncio.get_running_loop().create_task(self._attempts(client, arguments))
        try:
            try:
                await asyncio.wait([attempts], timeout=options.timeout_s)
                if not attempts.done():
                    raise TimeoutError
                attempts.result()
            finally:
                await _end(attempts)
        except TimeoutError:
            await _abandon(client)
            raise BrokerError("NATS", self.where, f"{self.trouble} (tried for {options.timeout_s:g} s)") from None
        except (OSError, nats.errors.Error, ValueError) as error:
            await _abandon(client)
            raise BrokerError("NATS", self.where, str(error) or type(error).__name__) from error
        except BaseException:
            await _abandon(client)
            raise
        return client

    async def _attempts(self, client: NatsClient, arguments: dict[str, Any]) -> None:
        await client.connect(
            self._urls,
            name=self._name,
            error_cb=partial(self._on_error, client),
            disconnected_cb=self._on_disconnected,
            reconnected_cb=self._on_reconnected,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]
            connect_timeout=self._options.timeout_s,  # type: ignore[arg-type]
            ping_interval=PING_INTERVAL_S,  # type: ignore[arg-type]
            max_outstanding_pings=PINGS_UNANSWERED,
            **{name: value for name, value in arguments.items() if value is not None},
        )
        if client.is_connected:
            return
        made = asyncio.Event()  # The server closed the connection without a word, and the library makes another one.
        self.reconnected.append(made.set)
        try:
            await made.wait()
        finally:
            self.reconnected.remove(made.set)

    async def settle(self, timeout_s: float) -> None:
        """Wait until the server has processed everything sent on this connection so far.

        This uses a message to ourselves, because the library's own `flush` sends its PING ahead of waiting commands.

        Raises:
            TimeoutError, or an error of the library: the message did not arrive.
        """
        client = await self.client()
        inbox = client.new_inbox()
        back = await client.subscribe(inbox)
        try:
            await client.publish(inbox)
            await back.next_msg(timeout_s)
        finally:
            await back.unsubscribe()

    @property
    def trouble(self) -> str:
        """Why the connection cannot be made. A refusal of the credentials says more than what other attempts met."""
        return self._refusal or self.last_error or "no answer"

    @property
    def connected(self) -> bool:
        """Whether there is a connection at this moment."""
        return self._client is not None and self._client.is_connected

    @property
    def used(self) -> bool:
        """Whether a connection was made, or could not be made."""
        return self._client is not None or bool(self.last_error)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def fileno(self) -> int:
        """Return the connection's descriptor, which a forked child closes; -1 if it is closed or hidden."""
        writer = getattr(getattr(self._client, "_transport", None), "_io_writer", None)
        sock = writer.get_extra_info("socket") if writer is not None else None
        return -1 if sock is None else int(sock.fileno())

    async def close(self) -> None:
        """Send the waiting messages and close. Closing twice is harmless."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        client, self._client = self._client, None
        if client is not None and not client.is_closed:
            if client.is_connected:
                try:
                    async with asyncio.timeout(1.0):  # all messages are sent, or the server is frozen
                        await client.flush()
                except Exception:  # Whatever it is, the connection must be closed.
                    logger.debug("NATS at %s: the last flush failed", self.where)
            await _abandon(client)

    async def _on_error(self, client: NatsClient, error: Exception) -> None:
        text = without_secrets(str(error)) or type(error).__name__
        ended = isinstance(error, (ConnectionResetError, BrokenPipeError)) or type(error).__name__ == "UnexpectedEOF"
        if any(each in text.lower() for each in REFUSED):
            self._refusal = text
        elif ended and getattr(client, "_server_info", {}).get("auth_required"):
            # The server's refusal is lost where its end of the connection meets what was still on the way to it.
            text = f"the server asks for authentication, and ended the connection: {text}"
        self.last_error = text
        if self._complaints.due(text) is not None:
            logger.warning("NATS at %s: %s", self.where, text)

    async def _on_disconnected(self) -> None:
        if not self._closed:
            logger.warning("NATS at %s: disconnected, reconnecting", self.where)

    async def _on_reconnected(self) -> None:
        self.reconnections += 1
        self._refusal = ""
        logger.warning("NATS at %s: connected again", self.where)
        for each in list(self.reconnected):
            each()


async def _abandon(client: NatsClient) -> None:
    await _end(getattr(client, "_reconnection_task", None))  # it could open a connection after `close`
    try:
        async with asyncio.timeout(1.0):
            await client.close()
    except asyncio.CancelledError:
        # The library cancels its own reconnection while the latter waits for a lost connection to close. A later
        # waiter for the same, such as this one, gets that cancellation.
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise
    except Exception:  # nats-py raises errors of many types, and the connection is over anyway.
        logger.debug("closing a NATS connection failed", exc_info=True)


async def _end(task: asyncio.Task[Any] | None) -> None:
    """End a task that runs code of the library, which would otherwise go on.

    One cancellation may not do. `asyncio.wait_for` of Python 3.11, which the library uses, loses a cancellation that
    arrives together with its result: here the server's greeting, or the refused connection to a server that is down.
    """
    for _ in range(CANCELLATIONS):
        if task is None or task.done():
            return
        task.cancel()
        await asyncio.wait([task], timeout=0.1)


def _without_user(url: str) -> str:
    scheme, mark, rest = url.rpartition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}"


def _is_url(url: str) -> bool:
    """Return whether a URL names a host; False if part of a password would be read as the port, path or query."""
    try:
        parts = urlsplit(url if "://" in url else f"nats://{url}")
        return bool(parts.hostname) and parts.port != 0 and not ("@" in parts.path or parts.query or parts.fragment)
    except ValueError:
        return False

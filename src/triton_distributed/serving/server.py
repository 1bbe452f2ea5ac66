"""The worker's half of a runtime: its listener, its endpoints, and its shutdown."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Collection
from typing import Any

from triton_distributed.config import Config
from triton_distributed.errors import NotServed
from triton_distributed.names import EndpointName
from triton_distributed.observe.observer import RequestStart
from triton_distributed.serving.addresses import begin_to_listen
from triton_distributed.serving.admission import HandlerSlots
from triton_distributed.serving.endpoint import ServedEndpoint
from triton_distributed.serving.handler_context import ServedContext, served_context
from triton_distributed.serving.load_reports import LoadReports
from triton_distributed.serving.request import ServedRequest
from triton_distributed.serving.standstill import Standstill
from triton_distributed.transport.listener import Listener
from triton_distributed.transport.network import Networks
from triton_distributed.transport.session import Session, part
from triton_distributed.transport.tls import SessionTls
from triton_distributed.wire import frames as f
from triton_distributed.wire.assembly import Body, Memory

logger = logging.getLogger("triton_distributed.runtime")

AcceptedFactory = Callable[[Callable[..., None], Callable[[Session, str], None]], Session]


class Server:
    """Takes requests for the endpoints of one runtime.

    Args:
        loop: the running loop.
        config: settings.
        instance_id: the runtime's id; None to take requests for any id, if ids are made from addresses.
        factory: makes an accepted session, given the callbacks for a request and for the loss of the session.
        tls: the TLS contexts of TCP sessions, or None.
        networks: what serves the schemes other than sockets and memory.
        looked: see `Listener`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: Config,
        instance_id: int | None,
        factory: AcceptedFactory,
        tls: SessionTls | None,
        networks: Networks,
        looked: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._config = config
        self._instance_id = instance_id
        self._factory = factory
        self._by_key: dict[int, ServedEndpoint] = {}
        self._reserved: dict[int, Callable[[], ServedEndpoint]] = {}
        self._made: dict[int, ServedEndpoint] = {}  # Those of the reserved endpoints that were called.
        self._listener = Listener(
            loop,
            self._session,
            config.max_sessions,
            config.health_timeout_s,
            config.host_timeout_s,
            tls,
            networks,
            config.max_greeting,
            looked=looked,
        )
        self.slots = HandlerSlots(config.max_requests)
        self.standstill = Standstill(loop, self._by_key.values)
        self._reports = LoadReports(loop, self._by_key)
        self._listening: asyncio.Task[tuple[str, ...]] | None = None
        self.draining = False

    @property
    def endpoints(self) -> list[ServedEndpoint]:
        """The endpoints that are served now."""
        return list(self._by_key.values())

    @property
    def sessions(self) -> Collection[Session]:
        """A live view of the sessions that clients have opened."""
        return self._listener.sessions.keys()

    async def listen(self, name: EndpointName, instance_id: int, where: str) -> tuple[str, ...]:
        """Return the addresses to publish. The runtime begins to listen with its first endpoint.

        Args:
            name: the endpoint that it serves first.
            where: the place of discovery, for error texts.

        Raises:
            ConfigError, DiscoveryError, OSError: an address is not available, see `begin_to_listen`.
        """
        if self._listening is None and self._config.gc_freeze:
            gc.collect()
            gc.freeze()
        if self._listening is None or (self._listening.done() and self._listening.exception() is not None):
            self._listening = self._loop.create_task(
                begin_to_listen(self._loop, self._listener, self._config, name, instance_id, where)
            )
        return await asyncio.shield(self._listening)

    def reached(self, addresses: tuple[str, ...]) -> tuple[str, ...]:
        """The published addresses at which clients can reach this worker now."""
        return self._listener.reached(addresses)

    def add(self, endpoint: ServedEndpoint) -> None:
        """Take requests for `endpoint`."""
        self._by_key[endpoint.name.key] = endpoint

    def reserve(self, name: EndpointName, make: Callable[[], ServedEndpoint]) -> None:
        """Take requests for an endpoint of the runtime itself, which is not listed and does not drain.

        Args:
            make: makes the endpoint when the first request for it comes.
        """
        self._reserved[name.key] = make

    def _find_reserved(self, key: int) -> ServedEndpoint | None:
        found = self._made.get(key)
        if found is None and (make := self._reserved.get(key)) is not None:
            found = self._made[key] = make()
        return found

    def find(self, name: EndpointName, operation: str) -> ServedEndpoint:
        """The endpoint of this name.

        Raises:
            NotServed: it is not served here, or not registered yet.
        """
        endpoint = self._by_key.get(name.key)
        if endpoint is None or not endpoint.registered:
            raise NotServed(name.path, operation)
        return endpoint

    def remove(self, endpoint: ServedEndpoint) -> None:
        """Take no more requests for `endpoint`."""
        self._by_key.pop(endpoint.name.key, None)

    def _session(self, on_lost: Callable[[Session, str], None]) -> Session:
        """A session for one more client."""
        session = self._factory(self._request, on_lost)
        session.connection.on_ask = self._reports.asked
        return session

    def _request(
        self,
        stream: Any,
        instance_id: int,
        key: int,
        timeout_s: float,
        metadata: Body,
        body: Body,
        buffers: list[Memory] | None,
    ) -> None:
        endpoint = self._by_key.get(key)
        if endpoint is None:
            endpoint = self._find_reserved(key)
        if endpoint is None or (instance_id != self._instance_id and self._instance_id is not None):
            words = f"this worker is instance {self._instance_id}"
            if instance_id == self._instance_id or self._instance_id is None:
                words += " and does not serve that endpoint, or no longer"
            else:
                words += f", not {instance_id}, and does not serve that endpoint under that id"
            stream.abort(f.REJECT, f.RejectCode.UNKNOWN, words.encode())
        else:
            context = served_context(stream, metadata) if metadata else ServedContext(stream)
            request = ServedRequest(endpoint, stream, context, body, buffers)
            observers = endpoint.observers
            if observers.present:
                request.observed = observers.request(RequestStart(str(endpoint.name), endpoint.instance.id, context))
            endpoint.gate.admit(request, timeout_s)

    async def drain(self, timeout_s: float) -> None:
        """Admit no more requests, send clients away, and let running handlers finish.

        A client that connects meanwhile has its requests refused. The worker goes on to accept connections so that
        `trd` can ask what holds up the drain.

        Handlers that still run after `timeout_s` are cancelled. The log names those that run even after that, see
        `stuck`.
        """
        self.draining = True
        for endpoint in self.endpoints:
            endpoint.gate.drain()
        for session in self._listener.sessions:
            session.go_away(f.GoawayCode.DRAINING, "the worker is shutting down")
        if self._config.backend.fixed:  # Clients would go on dialling an address that never leaves their list.
            self._listener.close_listening()
        await self._cut([each for each in self.endpoints if not each.graceful])
        late = False
        try:
            async with asyncio.timeout(timeout_s):
                for endpoint in self.endpoints:
                    await endpoint.gate.idle()
                await self._part()  # An answer is finished when its caller has read it.
        except TimeoutError:
            late = True
        if late:
            if cut := await self._cut(self.endpoints):
                words = ", ".join(cut[:20])
                logger.warning("drain: %d request(s) were cancelled after %g s: %s", len(cut), timeout_s, words)
            else:
                logger.warning("drain: after %g s some clients had not read their answers", timeout_s)
        for words in self.stuck()[:20]:
            logger.warning("drain: %s, although it was cancelled", words)

    def stuck(self) -> list[str]:
        """The cancelled requests whose handlers still run, each with the current line of its handler."""
        return [words for endpoint in self.endpoints for words in endpoint.lingering.describe()]

    @staticmethod
    async def _cut(endpoints: list[ServedEndpoint]) -> list[str]:
        """Cancel the requests of these endpoints at the same time; return their ids."""
        return [each for cut in await asyncio.gather(*[endpoint.cut() for endpoint in endpoints]) for each in cut]

    async def _part(self) -> None:
        parting = [self._loop.create_task(part(each)) for each in self._listener.sessions]
        try:
            if parting:
                await asyncio.wait(parting)
        finally:
            for task in parting:
                task.cancel()

    def remove_files(self) -> None:
        """Remove the files of the sockets, because the process ends at once. Any thread may call this."""
        self._listener.remove_files()

    def close(self) -> None:
        """Close the sessions and cancel the handlers that still run."""
        for endpoint in (*self.endpoints, *self._made.values()):
            endpoint.lingering.close()
        self.standstill.close()
        self._reports.close()
        self._listener.close()

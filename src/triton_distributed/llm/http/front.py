"""The front end: the OpenAI API and other routes, with keys, limits, probes, metrics and a log around them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as Path
from starlette.types import ASGIApp, Receive, Scope, Send

from triton_distributed import __version__
from triton_distributed.api.connection import Connection
from triton_distributed.integrations.http.app import install
from triton_distributed.integrations.http.request import CLIENT_LEFT, REQUEST_ID
from triton_distributed.llm.http.access import Access
from triton_distributed.llm.http.api import Answering, Api, is_api
from triton_distributed.llm.http.exchange import MAX_HELD_BYTES, Held
from triton_distributed.llm.http.facts import KEY, Facts
from triton_distributed.llm.http.head import read_head
from triton_distributed.llm.http.keys import Keys
from triton_distributed.llm.http.limits import Limits, ending
from triton_distributed.llm.http.metrics import FrontMetrics
from triton_distributed.llm.http.openapi import OPENAI, description
from triton_distributed.llm.http.overasgi import AsgiExchange, Presences
from triton_distributed.llm.http.routes import Route, RoutedEndpoint
from triton_distributed.llm.models.routed import Routed

PROBES = ("/health", "/live", "/ping")
OPEN = frozenset(("/", *PROBES, "/version", "/metrics", "/openapi.json"))
"""Paths that need no key."""

Page = Callable[[Request], Awaitable[Response]]


class Listed(Protocol):
    """The models that are served now."""

    def list(self) -> Any: ...


class FrontEnd:
    """An ASGI app. Made by `front_end`.

    Attributes:
        api: the OpenAI API with its limits.
        direct: the same, if a request may reach it without ASGI; None if something has to be around it.
    """

    def __init__(
        self,
        connection: Connection,
        routes: Sequence[RoutedEndpoint],
        openai: Answering | None,
        models: Listed | None,
        limits: Limits,
        held: Held,
        origins: Sequence[str],
        access_log: bool,
    ) -> None:
        self._connection, self._routes, self._models = connection, routes, models
        self._limits, self._held, self._presences = limits, held, Presences()
        metrics = FrontMetrics()
        connection.metrics.add(metrics)
        pages: dict[str, Page] = {
            "/": self._root,
            "/health": self._health,
            "/live": self._live,
            "/ping": self._live,
            "/version": self._version,
            "/metrics": self._metrics,
            "/openapi.json": self._description,
        }
        paths = [Path(path, page) for path, page in pages.items()]
        self._own = Starlette(
            routes=[*paths, *(Path(each.route.path, each.answer, methods=[each.route.method]) for each in routes)]
        )
        self._own.state.trd = connection
        install(self._own)
        known = {*pages, *OPENAI, *(each.route.path for each in routes)}
        self._access = Access(metrics, known, PROBES, access_log)
        self.api = Api(openai, limits, self._access)
        self.direct = None if origins else self.api
        self._cors: ASGIApp | None = None
        if origins:
            shown = ["x-request-id", "retry-after", "x-trd-route"]
            self._cors = CORSMiddleware(
                self._limited, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=shown
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request of ASGI."""
        if scope["type"] != "http":
            await self._own(scope, receive, send)
            return
        if self.direct is not None and is_api(scope["path"]):
            await self.api.answer(AsgiExchange(scope, receive, send, Facts(), self._presences))
            return
        scope[KEY] = visit = self._access.begin(read_head(scope["headers"]))
        try:
            await (self._cors or self._limited)(scope, receive, visit.noting(send))
        except asyncio.CancelledError:
            if not self.draining:
                raise
            if not visit.begun:  # The time of the drain is over.
                await self.api.refuse(AsgiExchange(scope, receive, send, visit, self._presences, visit.head), ending())
            visit.error = visit.error or "unavailable"  # A stream of a route has said so.
        except Exception:
            if visit.status == CLIENT_LEFT:
                visit.status = 500  # The server answers so.
            raise
        finally:
            self._access.end(scope["method"], scope["path"], visit)

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, visit = scope["path"], scope[KEY]
        if path in OPEN:
            await self._own(scope, receive, send)
            return
        exchange = AsgiExchange(scope, receive, send, visit, self._presences, visit.head)
        if is_api(path):
            await self.api.admit(exchange, visit)
            return
        refusal = self._limits.refusal(visit.head, self.running)
        if refusal is not None:
            await self.api.refuse(exchange, refusal)
            return
        self.api.running += 1
        try:
            id = REQUEST_ID, visit.head.id.encode()
            scope["headers"] = [*(each for each in scope["headers"] if each[0] != REQUEST_ID), id]
            await self._own(scope, receive, send)
        finally:
            self.api.running -= 1
            self._held.release(visit)

    @property
    def running(self) -> int:
        """Requests of clients that run now; probes do not count."""
        return self.api.running

    @property
    def draining(self) -> bool:
        """Whether the server is about to end: `/health` then says 503, so that no new request is sent here."""
        return self.api.draining

    @draining.setter
    def draining(self, value: bool) -> None:
        self.api.draining = value

    async def _root(self, request: Request) -> Response:
        found = {"name": "triton_distributed", "version": __version__, "description": "/openapi.json"}
        return _json(found)

    async def _version(self, request: Request) -> Response:
        return _json({"version": __version__})

    async def _live(self, request: Request) -> Response:
        return _json({"status": "live"})

    async def _health(self, request: Request) -> Response:
        models = [] if self._models is None else self._models.list()
        names = [each.card.name for each in models]
        routes = {each.route.path: each.instances for each in self._routes}
        healthy = bool(names) or any(routes.values())
        status = "draining" if self.draining else "healthy" if healthy else "unavailable"
        discovery = self._connection.runtime.config.discovery
        found = {"status": status, "mode": discovery.partition(":")[0], "models": names, "routes": routes}
        if routing := {each.card.name: _routing(each.routed) for each in models if each.routed is not None}:
            found["routing"] = routing
        return _json(found, 200 if status == "healthy" else 503)

    async def _metrics(self, request: Request) -> Response:
        accept, encoding = (request.headers.get(each, "") for each in ("accept", "accept-encoding"))
        page = await asyncio.to_thread(self._connection.metrics.page, accept, encoding)
        headers = {"content-type": page.content_type}
        if page.content_encoding:
            headers["content-encoding"] = page.content_encoding
        return Response(page.body, headers=headers)

    async def _description(self, request: Request) -> Response:
        routes = [(each.route, each.contract) for each in self._routes]
        return _json(description(__version__, self.api.known, routes))


def _routing(routed: Routed) -> dict[str, Any]:
    """How the requests of a model are routed, and what is wrong with it."""
    states, prefills = routed.states(), routed.prefills.router.core.workers
    silent = [each for each in states if each.silent]
    found: dict[str, Any] = {
        "policy": routed.policy,
        "workers": {f"{each.instance_id}/{each.rank}": each.mode for each in states},
        "warnings": [f"instance {each.instance_id} should report its KV cache, and has not" for each in silent],
    }
    if prefills:
        found["prefill_workers"] = [f"{instance_id}/{rank}" for instance_id, rank in prefills]
    return found


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def front_end(
    connection: Connection,
    *,
    openai: Answering | None = None,
    models: Listed | None = None,
    routes: Iterable[Route] = (),
    keys: Iterable[str] = (),
    origins: Sequence[str] = (),
    max_body_bytes: int = 32 * 1024 * 1024,
    max_requests: int | None = None,
    held: Held | None = None,
    access_log: bool = True,
) -> FrontEnd:
    """Make a front end. It is open as long as the connection.

    Args:
        connection: calls the workers.
        openai: what answers `/v1`; see `openai_app`. Without it these paths are not found.
        models: the models that `/health` shows.
        routes: other endpoints with their paths.
        keys: API keys, or their hashes; without any, every request is answered.
        origins: web pages that may call from a browser, e.g. `https://chat.example.com`; `*` for all.
        max_body_bytes: the largest body.
        max_requests: requests that may run at once; None for no limit.
        held: counts the memory of the requests to `routes`, e.g. together with those of `openai`; by default a limit of
            their own.
        access_log: whether each request gets a line in the log.

    Raises:
        ValueError: a key is invalid, two routes are the same, or one is a path of the front end itself.
        DiscoveryError: discovery cannot be read.
    """
    found: dict[tuple[str, str], RoutedEndpoint] = {}
    held = Held(MAX_HELD_BYTES) if held is None else held
    for route in routes:
        key = route.method, route.path
        if key in found or route.path in OPEN or route.path.startswith("/v1/"):
            raise ValueError(f"the path {route.path} is taken")
        name = route.endpoint
        runtime = connection.runtime
        client = await runtime.namespace(name.namespace).component(name.component).endpoint(name.endpoint).client()
        found[key] = RoutedEndpoint(route, connection, client, max_body_bytes, held)
    connection.runtime.worker.watchdog.start()  # Of a worker, it starts with the first endpoint.
    limits = Limits(Keys(keys), max_body_bytes, max_requests)
    return FrontEnd(connection, list(found.values()), openai, models, limits, held, origins, access_log)

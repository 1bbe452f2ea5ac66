"""Any endpoint as a path of the front end: JSON in, JSON or server-sent events out."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from triton_distributed.api.connection import Connection
from triton_distributed.errors import NoInstances
from triton_distributed.integrations.http.errors import Problem
from triton_distributed.integrations.http.items import sse
from triton_distributed.integrations.http.request import CLIENT_LEFT
from triton_distributed.integrations.http.text import to_json
from triton_distributed.llm.http.errors import Refused
from triton_distributed.llm.http.exchange import ClientLeft, Held
from triton_distributed.llm.http.facts import KEY
from triton_distributed.llm.http.limits import BUSY_S
from triton_distributed.llm.http.overasgi import read_body
from triton_distributed.names import EndpointName
from triton_distributed.runtime import Client

METHODS = ("POST", "PUT", "PATCH")
"""The methods whose requests have a body."""

_PATH = re.compile(r"/[A-Za-z0-9._~/-]*")


class Route(NamedTuple):
    """A path and the endpoint that answers it.

    Attributes:
        method, path: of the HTTP request.
        endpoint: what is called.
    """

    method: str
    path: str
    endpoint: EndpointName


def read_route(text: str) -> Route:
    """Read `POST /path=namespace.component.endpoint`; the method may be left out.

    Raises:
        ValueError: the text does not have that form.
    """
    words, mark, name = text.partition("=")
    method, *rest = words.split() if words.strip().startswith(METHODS) else ("POST", *words.split())
    if not mark or len(rest) != 1 or not _PATH.fullmatch(rest[0]) or method not in METHODS:
        raise ValueError(f"{text!r} is not a route: write POST /path=namespace.component.endpoint")
    return Route(method, rest[0], EndpointName.parse(name.strip()))


class RoutedEndpoint:
    """Answers the requests of one route.

    Args:
        route: the route.
        connection: makes the calls.
        client: knows the endpoint's instances.
        max_body_bytes: the largest body.
        held: counts the memory of the requests.
    """

    def __init__(self, route: Route, connection: Connection, client: Client, max_body_bytes: int, held: Held) -> None:
        self.route = route
        self._connection, self._client = connection, client
        self._max_body_bytes, self._held = max_body_bytes, held

    @property
    def instances(self) -> int:
        """The number of instances."""
        return len(self._client.candidates.table.instances)

    @property
    def contract(self) -> dict[str, Any]:
        """The schema that an instance has published; empty without one."""
        published = (each.contract for each in self._client.candidates.table.instances)
        return dict(next((each for each in published if each), {}))

    async def answer(self, request: Request) -> Response:
        """Answer a request. A stream is answered with events, and so is a caller that accepts only them.

        Raises:
            NoInstances: no worker serves the endpoint. A call would wait for one.
            TritonError: the call failed before its answer began.
        """
        visit = request.scope[KEY]
        try:
            value = msgspec.json.decode(await read_body(request.receive, self._max_body_bytes, self._held, visit))
        except Refused as error:
            wait_s = BUSY_S if error.status == 503 else None
            return Problem(error.status, error.code, error.message, visit.head.id, wait_s).response()
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return Problem(400, "invalid_json", f"The body is not JSON: {error}", visit.head.id, None).response()
        except ClientLeft:
            return Response(status_code=CLIENT_LEFT)
        if not self.instances:
            raise NoInstances(str(self.route.endpoint))
        name = str(self.route.endpoint)
        kind = self.contract.get("kind")
        if kind == "unary" or (kind is None and "text/event-stream" not in request.headers.get("accept", "")):
            return Response(to_json(await self._connection.call(name, value)), media_type="application/json")
        return await sse(self._connection.stream(name, value))

"""Answers requests to the program's routes."""

from __future__ import annotations

import logging
import threading
from typing import Any

import msgspec

from triton_distributed.errors import InvalidRequest
from triton_distributed.status.http import Request, Response, error_response, json_response
from triton_distributed.status.loop import Loop, Stuck
from triton_distributed.status.port import HttpError, Route

logger = logging.getLogger("triton_distributed.status")

AT_ONCE = 8
"""Routes that run at once: the other connections stay free for probes and scrapes."""

LIMIT_S = 600.0
"""Seconds that a route may take: an engine may load its weights."""


class Routes:
    """Calls the handlers of routes.

    Args:
        loop: runs the async ones.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._places = threading.BoundedSemaphore(AT_ONCE)

    def answer(self, route: Route, request: Request) -> Response:
        """Answer a request to a route. Called in the thread of its connection."""
        try:
            given = msgspec.json.decode(request.body) if request.body else dict(request.query)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return error_response(400, f"the body is not JSON: {error}")
        if not self._places.acquire(blocking=False):
            return error_response(503, f"{AT_ONCE} requests to routes run already", {"Retry-After": "1"})
        try:
            result = self._call(route, (given,) if route.takes_body else ())
        except HttpError as error:
            return error_response(error.status, error.reason)
        except InvalidRequest as error:
            return error_response(400, str(error))
        except Stuck as error:
            return error_response(503, str(error))
        except Exception as error:
            logger.exception("%s %s: the handler raised", route.method, route.path)
            return error_response(500, f"{type(error).__name__}: {error}")
        finally:
            self._places.release()
        try:
            return json_response(result)
        except (TypeError, ValueError) as error:
            logger.warning("%s %s: the handler's result is not JSON: %s", route.method, route.path, error)
            return error_response(500, f"the handler's result is not JSON: {error}")

    def _call(self, route: Route, arguments: tuple[Any, ...]) -> Any:
        context = route.context.copy()
        if not route.is_async:
            return context.run(route.handler, *arguments)
        return self._loop.run(lambda: route.handler(*arguments), LIMIT_S, context)

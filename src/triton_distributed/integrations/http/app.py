"""The life of the connection of an app, and what an app needs for its calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.types import ASGIApp

from triton_distributed.api.connection import connect
from triton_distributed.config import Config
from triton_distributed.errors import TritonError
from triton_distributed.integrations.http.errors import answer_error, problem_of
from triton_distributed.integrations.http.request import RequestMiddleware


def lifespan(
    own: Callable[[Any], AbstractAsyncContextManager[Any]] | None = None, *, config: Config | None = None
) -> Callable[[Any], AbstractAsyncContextManager[Any]]:
    """A lifespan that connects at startup, keeps the connection in `app.state.trd`, and closes it at shutdown.

    Args:
        own: the app's own lifespan. It runs inside, so it may use the connection.
        config: the settings; by default those of the environment.

    Raises, at startup:
        RuntimeError: `install(app)` was not called.
        ConfigError: a setting is invalid.
    """

    @asynccontextmanager
    async def connected(app: Starlette) -> AsyncIterator[Any]:
        installed: list[object] = [each.cls for each in app.user_middleware]
        if RequestMiddleware not in installed:
            raise RuntimeError("this app's requests are not prepared for calls: call install(app) after making the app")
        async with connect(config) as connection:
            app.state.trd = connection
            try:
                if own is None:
                    yield None
                else:
                    async with own(app) as state:
                        yield state
            finally:
                del app.state.trd

    return connected


def install(app: Starlette, *, show_errors: bool = False) -> None:
    """Prepare an app for calls. While it handles an HTTP request, `trd.call` and `trd.stream` use its connection.

    - Errors of calls become responses: 503 with `Retry-After`, 504, 502, 500, 422 or 413, with a body as in RFC 9457.
    - `x-request-id` of the request, or a random id, becomes the id of its calls and is in the response.
      `traceparent`, `tracestate` and `baggage` travel with the calls.
    - If the client leaves, the calls of its request are cancelled, and so are their handlers.

    Args:
        app: an app of Starlette or FastAPI, not started yet.
        show_errors: show the text of an error that a worker's handler raised. By default the body only says that the
            service failed, and the error is logged.

    Raises:
        RuntimeError: the app was started before.
    """

    def answer(error: Exception) -> ASGIApp:
        return problem_of(error).response()

    app.add_middleware(RequestMiddleware, answer=answer, show_errors=show_errors)
    app.add_exception_handler(TritonError, answer_error)

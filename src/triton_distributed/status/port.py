"""The status port as a program sees it: where it is, and what the program adds to it."""

from __future__ import annotations

import contextvars
import functools
import inspect
import logging
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

logger = logging.getLogger("triton_distributed.status")

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")

RESERVED = ("", "live", "ready", "health", "metrics", "statistics", "requests", "stacks", "dashboard")
"""Beginnings of paths that belong to the status port itself."""

CHECK_S = 1.0
"""Seconds that a health check may take by default: as long as Kubernetes waits for a probe's response."""

_PATH = r"(/[A-Za-z0-9._~-]+)+"  # Compiled when it is used, since most programs add no routes.


class HttpError(Exception):
    """Raised by a route's handler to answer with another HTTP status than 200.

    Args:
        status: the HTTP status, from 400 to 599.
        reason: the text of the response's `error`.

    Raises:
        ValueError: the status is not an error's.
    """

    def __init__(self, status: int, reason: str) -> None:
        if not 400 <= status <= 599:
            raise ValueError(f"HttpError: status={status!r}: must be from 400 to 599")
        super().__init__(status, reason)
        self.status, self.reason = status, reason

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}"


class Route(NamedTuple):
    """One route of the program.

    Attributes:
        method, path: the requests that it answers.
        handler: answers them.
        takes_body: the handler has a parameter.
        is_async: the handler runs on the event loop, otherwise in a thread.
        context: the handler runs in a copy of it.
    """

    method: str
    path: str
    handler: Callable[..., Any]
    takes_body: bool
    is_async: bool
    context: contextvars.Context


class HealthCheck(NamedTuple):
    """One health check of the program.

    Attributes:
        function: returns None or True if all is well, otherwise False or the reason as text.
        is_async: it runs on the event loop, otherwise in a thread.
        timeout_s: seconds that it may take.
        context: it runs in a copy of it.
    """

    function: Callable[[], Any]
    is_async: bool
    timeout_s: float
    context: contextvars.Context


class Opened(Protocol):
    """An open status port."""

    url: str

    async def problems(self, max_age_s: float) -> list[str]: ...

    async def close(self) -> None: ...


class StatusPort:
    """The status port of a runtime. It is open while `TRD_STATUS_PORT` is set and the runtime is not closed.

    What the program adds is kept in any case, so that a program does not depend on the setting.

    Attributes:
        url: where it listens, e.g. `http://127.0.0.1:9090`; empty if it is not open.
        problem: why it could not be opened; empty if it could, or should not be opened.
        routes: the routes of the program, by method and path.
        checks: the health checks of the program, by name.
    """

    def __init__(self) -> None:
        self.url = self.problem = ""
        self.routes: dict[tuple[str, str], Route] = {}
        self.checks: dict[str, HealthCheck] = {}
        self._opened: Opened | None = None

    def open(self, make: Callable[[], Opened], where: str) -> None:
        """Open the port. If that fails, log the reason: the runtime serves without it.

        Args:
            make: opens it; an OSError says that it cannot listen.
            where: the host and the port of the settings, for the log.
        """
        try:
            self._opened = make()
        except (OSError, UnicodeError) as error:
            self.problem = not_open(error, where, "This process serves")
        else:
            self.url = self._opened.url
            logger.info("the status port is %s", self.url)

    def route(self, route: str, handler: Callable[..., Any], *, context: contextvars.Context | None = None) -> None:
        """Answer requests to a path of the status port.

        Args:
            route: the method and the path, e.g. `POST /sleep`. A path has letters, digits, `.`, `_`, `~` and `-`
                between slashes.
            handler: an async function, which runs on the event loop, or a plain one, which runs in a thread. A
                parameter gets the request's JSON body, or without a body the parameters of the query as a dict of
                text. The result is the response, as JSON. `HttpError` answers with another status, and other errors
                with 500.
            context: the `contextvars` context in which it runs; by default a copy of the present one.

        Raises:
            ValueError: the route is malformed, reserved or taken.
            TypeError: the handler is not a function of at most one argument.
        """
        method, path = split_route(route)
        if (method, path) in self.routes:
            raise ValueError(f"route {route!r} is taken by {self.routes[method, path].handler!r}")
        takes_body = takes_argument(handler, route)
        self.routes[method, path] = Route(
            method, path, handler, takes_body, is_async(handler), context or contextvars.copy_context()
        )

    def health_check(
        self,
        function: Callable[[], Any],
        *,
        timeout_s: float = CHECK_S,
        name: str = "",
        context: contextvars.Context | None = None,
    ) -> None:
        """Let `/health` also ask a function of the program.

        Args:
            function: an async function, which runs on the event loop, or a plain one, which runs in a thread. It
                returns None or True if all is well, otherwise False or the reason as text; an error is a reason, too.
            timeout_s: seconds after which it counts as failed.
            name: its name in the response; by default the function's own.
            context: as for `route`.

        Raises:
            TypeError: it is not a function without arguments.
            ValueError: the name is taken, or the time limit is not a positive number.
        """
        check_function(function)
        check_timeout(timeout_s)
        name = name or getattr(function, "__qualname__", type(function).__qualname__)
        if name in self.checks:
            raise ValueError(f"a health check named {name!r} exists already: give another name=")
        self.checks[name] = HealthCheck(function, is_async(function), timeout_s, context or contextvars.copy_context())

    async def problems(self, max_age_s: float = 0.0) -> list[str]:
        """Why `/health` says that the program is not healthy: the checks and canaries that have failed.

        The checks run now, for `PROBLEMS_S` at most. Without an open port no check runs, and the result is empty.

        Args:
            max_age_s: seconds for which an earlier result counts.
        """
        return [] if self._opened is None else await self._opened.problems(max_age_s)

    async def close(self) -> None:
        """Close the port. Responses under way get a moment to leave."""
        opened, self._opened, self.url = self._opened, None, ""
        if opened is not None:
            await opened.close()

    def __repr__(self) -> str:
        return f"<StatusPort {self.url or self.problem or 'not open'}>"


def split_route(route: str) -> tuple[str, str]:
    """The method and the path of a route such as `POST /sleep`.

    Raises:
        ValueError: it is malformed, or its path belongs to the status port.
    """
    method, _, path = route.partition(" ")
    if method not in METHODS or not re.fullmatch(_PATH, path):
        raise ValueError(f"route {route!r}: must be a method and a path, e.g. 'POST /sleep'; methods: {METHODS}")
    if path.split("/")[1] in RESERVED:
        raise ValueError(f"route {route!r}: /{path.split('/')[1]} belongs to the status port itself")
    return method, path


def check_timeout(timeout_s: float) -> None:
    """Check the time limit of a health check.

    Raises:
        ValueError: it is not a positive number of seconds.
    """
    if not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s={timeout_s!r}: must be a positive number of seconds")


def not_open(error: OSError | UnicodeError, where: str, what_serves: str) -> str:
    """Log that a status port cannot be opened; return why.

    Args:
        error: what opening it has raised.
        where: the host and the port of the settings.
        what_serves: what goes on without it, with its verb.
    """
    problem = f"cannot listen on {where}: {getattr(error, 'strerror', None) or error}"
    logger.warning(
        "no status port: %s. %s without it. TRD_STATUS_PORT=0 takes any free port, and TRD_STATUS_HOST must be an "
        "address of this machine",
        problem,
        what_serves,
    )
    return problem


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a function, or the `__call__` of an object, is async."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def takes_argument(handler: Callable[..., Any], route: str) -> bool:
    """Whether a route's handler takes an argument.

    Raises:
        TypeError: it is not a function of at most one argument.
    """
    if callable(handler):
        signature = inspect.signature(handler)
        for arguments in ((None,), ()):
            try:
                signature.bind(*arguments)
            except TypeError:
                continue
            return bool(arguments)
    raise TypeError(f"route {route!r}: {handler!r} is not a function of at most one argument")


def check_function(function: Callable[[], Any]) -> None:
    """Check that a health check can be called.

    Raises:
        TypeError: it is not a function without arguments.
    """
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):
        raise TypeError(f"health check {function!r}: must be a function without arguments") from None

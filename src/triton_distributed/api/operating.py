"""What a program declares for operating it: `@route` and `@health_check` for the status port, and its observers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar, overload

from triton_distributed.api.connection import Connection
from triton_distributed.observe.observer import Observer
from triton_distributed.status.port import CHECK_S, check_timeout, split_route

ADDED = "__trd_status_port__"
"""The attribute of a function that holds its `_Added`."""

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


class _Added(NamedTuple):
    """What a function adds to the status port.

    Attributes:
        routes: the routes that it answers.
        timeout_s: seconds that it may take as a health check; None if it is not one.
    """

    routes: tuple[str, ...] = ()
    timeout_s: float | None = None


def route(route: str, /) -> Callable[[FunctionT], FunctionT]:
    """Declare that a function or method answers requests to a path of the status port.

    `trd.run` and `trd serve MODULE` add the functions of the module that they serve, and the methods of the objects
    whose methods they serve. Elsewhere, `here.route` adds one.

    Args:
        route: the method and the path; see `StatusPort.route`, which also says what the function gets and returns.

    Returns:
        A decorator that returns the function itself.

    Raises:
        ValueError: the route is malformed or reserved.
    """
    split_route(route)

    def declare(function: FunctionT) -> FunctionT:
        known = _added(function)
        return _mark(function, known._replace(routes=(*known.routes, route)), "route")

    return declare


@overload
def health_check(function: FunctionT, /) -> FunctionT: ...
@overload
def health_check(*, timeout_s: float = CHECK_S) -> Callable[[FunctionT], FunctionT]: ...


def health_check(function: Any = None, /, *, timeout_s: float = CHECK_S) -> Any:
    """Declare that `/health` of the status port also asks a function or method, which takes no arguments.

    `@trd.health_check` and `@trd.health_check(timeout_s=3)` both work. It is found as `route` says.

    Args:
        function: returns None or True if all is well, otherwise False or the reason; see `StatusPort.health_check`.
        timeout_s: seconds after which it counts as failed.

    Raises:
        TypeError: the decorated object is not a function.
        ValueError: the time limit is not a positive number.
    """
    check_timeout(timeout_s)

    def declare(function: FunctionT) -> FunctionT:
        return _mark(function, _added(function)._replace(timeout_s=timeout_s), "health_check")

    return declare if function is None else declare(function)


def _added(function: object) -> _Added:
    found = getattr(function, ADDED, None)
    return found if isinstance(found, _Added) else _Added()


def _mark(function: FunctionT, added: _Added, decorator: str) -> FunctionT:
    if not inspect.isroutine(function):
        raise TypeError(f"{decorator} decorates a function or a method, not {function!r}")
    setattr(function, ADDED, added)
    return function


def add_declared(here: Connection, namespace: Mapping[str, Any], handlers: Iterable[Any]) -> None:
    """Add what a program has declared to its status port, and the observers in its module.

    Args:
        here: its connection.
        namespace: the names and values of its module.
        handlers: the handlers that it serves; of bound methods, the methods of the same objects are added, too.

    Raises:
        TypeError, ValueError: as `StatusPort.route` and `StatusPort.health_check`.
    """
    for observer in [each for each in namespace.values() if isinstance(each, Observer)]:
        here.observers.add(observer)
    functions = {id(each): each for each in namespace.values() if _added(each) != _Added()}
    owners = {id(owner): owner for each in handlers if (owner := getattr(each, "__self__", None)) is not None}
    found = list(functions.values())
    for owner in owners.values():
        names = [name for name, each in inspect.getmembers_static(owner) if _added(each) != _Added()]
        found += [getattr(owner, name) for name in names]
    for each in found:
        added = _added(each)
        for route in added.routes:
            here.route(route, each)
        if added.timeout_s is not None:
            here.health_check(each, timeout_s=added.timeout_s)

"""The options of calls and of served endpoints, listed once: editors show them, and type checkers find a wrong one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol, TypedDict

from triton_distributed.context import Context


class RequestOptions(TypedDict, total=False):
    """The options of every call, of the original's face and of the native API."""

    context: Context | None
    """Controls the call: its id, its metadata and its travelling values are sent, and `stop_generating()` and `kill()`
    reach the handler. A call within a handler inherits the id and the travelling values of the handler's request."""

    timeout: float | None
    """Seconds for the whole call. A call within a handler inherits the handler's remaining time, if less."""

    metadata: Mapping[str, Any] | None
    """Plain values by name, at most 64 KiB encoded. The handler finds them in `context.metadata`."""

    idempotent: bool
    """The request may be sent to a second instance if the first is lost, or shuts down and cancels its handler, before
    the caller has an item."""

    priority: int | None
    """From -128 to 127. Among waiting requests, those with a larger priority are admitted first. A call within a
    handler has the priority of the handler's request, unless it sets its own."""


class CallOptions(RequestOptions, total=False):
    """The options of a client's calls, as keyword arguments: `client.generate(request, timeout=2)`."""

    resume: bool
    """If the instance is lost in the middle of the stream, another continues after the last item for which the handler
    gave a token (`context.checkpoint`), and the caller sees one sequence. Items after the last token are made again and
    skipped by number. A handler that gives no token starts from the beginning."""


class ServeOptions(TypedDict, total=False):
    """The options of a served endpoint, as keyword arguments: `endpoint.serve_endpoint(handler, max_inflight=8)`."""

    max_inflight: int | None
    """The most handlers that run at once; None for no limit."""

    max_queue: int
    """The most requests that wait beyond `max_inflight`. The next is refused with `Overloaded`, so that the caller
    tries another instance."""

    metadata: Mapping[str, Any] | None
    """Plain JSON values to publish with the instance. They are copied at once."""

    interrupt: bool
    """False does not cancel a running handler whose caller leaves or whose deadline passes: the handler learns that
    from `context.is_stopped()`. Only the end of a drain cancels it. True by default."""

    canary: Any
    """A request that the status port sends to this worker while no other request ends well, to see whether the handler
    still works: `/health` shows the result. It has the metadata `{"canary": True}`. Not for streamed requests."""


class _TakesContext(Protocol):
    def __call__(self, request: Any, /, *, context: Context) -> Any: ...


class _TakesCtx(Protocol):
    def __call__(self, request: Any, /, *, ctx: Context) -> Any: ...


HandlerFunction = Callable[[Any], Any] | Callable[[Any, Context], Any] | _TakesContext | _TakesCtx
"""A handler: it takes a request and optionally the context."""


def unexpected(method: str, unknown: Iterable[str], known: Collection[str], note: str = "") -> TypeError:
    """The error for an argument that a public method does not have.

    Args:
        method: the method, as the caller writes it.
        unknown: the names that the method does not have; the error is about the first.
        known: the names that it has.
        note: what helps; by default the name that was probably meant.
    """
    import difflib  # only this error needs it

    name = next(iter(unknown))
    if not note and (near := difflib.get_close_matches(name, known, 1)):
        note = f"did you mean {near[0]!r}?"
    return TypeError(f"{method}() got an unexpected keyword argument {name!r}{note and '; '}{note}")

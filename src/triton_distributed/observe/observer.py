"""The observation seam: observers learn of the calls and the requests of a runtime.

A runtime without observers pays for one test where a call or a request begins, and one where it ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

from triton_distributed.context import Context
from triton_distributed.observe.timing import Timing
from triton_distributed.quiet import Quiet

T = TypeVar("T")

logger = logging.getLogger("triton_distributed.runtime")

QUIET_S = 60.0
"""Seconds between two log entries for the errors of one observer."""


class CallStart(msgspec.Struct, frozen=True):
    """A call that begins.

    Attributes:
        endpoint: the endpoint that is called, `namespace.component.endpoint`.
        unary: the caller sees the answer only when it is complete.
        hedge: it is the second attempt of a hedged call, on another instance.
        travelling: the values that travel with the call.
    """

    endpoint: str
    unary: bool
    hedge: bool
    travelling: Mapping[str, Any]


class CallEnd(msgspec.Struct, frozen=True):
    """The end of a call: everything has arrived from the worker, or nothing more will. Items may still wait unread.

    Attributes:
        outcome: `ok`, `error` (the handler raised), `invalid`, `cancelled`, `deadline`, `refused`, `lost` or
            `unreachable`.
        error: what the caller gets, or None.
        request_id: the request's id, as the handler sees it; empty if the request was never sent.
        instance_id: the instance that had the request last; None if there was none.
        timing: where the time went.
    """

    outcome: str
    error: BaseException | None
    request_id: str
    instance_id: int | None
    timing: Timing


class RequestStart(msgspec.Struct, frozen=True):
    """A request that has arrived at a worker.

    Attributes:
        endpoint: the endpoint that serves it, `namespace.component.endpoint`.
        instance_id: the worker's instance.
        context: the context that the handler gets: id, metadata, travelling values, priority.
    """

    endpoint: str
    instance_id: int
    context: Context


class RequestEnd(msgspec.Struct, frozen=True):
    """The end of a request at a worker.

    Attributes:
        outcome: `ok`, `error` (the handler raised), `invalid`, `cancelled`, `deadline`, `refused` (no handler began),
            `lost` (the connection broke) or `cut` (a drain was over before the handler had ended).
        error: what the handler raised, or None.
        timing: where the time went; the parts of the client and the network are None.
    """

    outcome: str
    error: BaseException | None
    timing: Timing


class CallObserver:
    """Observes one call. Extend it, and override what you need.

    Attributes:
        travelling: values that travel with the call, in place of those of the same name. Set it in `__init__`.
    """

    travelling: Mapping[str, Any] = MappingProxyType({})

    def attempt_failed(self, instance_id: int, reason: str, again: bool) -> None:
        """An attempt failed.

        Args:
            instance_id: the instance that was tried.
            reason: what happened, as text.
            again: another attempt follows.
        """

    def ended(self, end: CallEnd) -> None:
        """The call ended."""


class RequestObserver:
    """Observes one request at a worker. Extend it, and override what you need."""

    def began(self) -> None:
        """The handler is about to begin. This runs in its task, so the handler sees the context variables set here."""

    def ended(self, end: RequestEnd) -> None:
        """The request ended, whether or not its handler had begun."""


class Observer:
    """Observes all calls and requests of a runtime. Extend it, and add it with `here.observers.add(…)`.

    `trd.run` and `trd serve MODULE` add the observers that are global variables of the module.

    The methods of observers run on the event loop, so they must return at once. What they raise is logged, and the call
    or the request goes on.
    """

    def call(self, start: CallStart) -> CallObserver | None:
        """A call begins. Returns what observes it, or None."""

    def request(self, start: RequestStart) -> RequestObserver | None:
        """A request has arrived. Returns what observes it, or None."""


class Observers:
    """The observers of one runtime.

    Attributes:
        present: the observers. The list itself is shared with all parts of the runtime.
    """

    def __init__(self) -> None:
        self.present: list[Observer] = []
        self._quiet = Quiet(QUIET_S)

    def add(self, observer: Observer) -> None:
        """Let an observer see the calls and requests that begin from now on. Adding it twice has no further effect.

        Raises:
            TypeError: it is not an `Observer`.
        """
        if not isinstance(observer, Observer):
            raise TypeError(f"add({observer!r}): must be an object of a class that extends triton_distributed.Observer")
        if observer not in self.present:
            self.present.append(observer)

    def remove(self, observer: Observer) -> None:
        """Show an observer no further calls and requests. It still sees the end of those that it observes.

        Raises:
            ValueError: it was not added.
        """
        if observer not in self.present:
            raise ValueError(f"remove({observer!r}): it was not added")
        self.present.remove(observer)

    def call(self, start: CallStart) -> ObservedCall | None:
        """Tell the observers of a call; None if none of them observes it."""
        asked = [self._asked(observer.call, start, CallObserver) for observer in tuple(self.present)]
        found = [each for each in asked if each is not None]
        return ObservedCall(self, found) if found else None

    def request(self, start: RequestStart) -> ObservedRequest | None:
        """Tell the observers of a request; None if none of them observes it."""
        asked = [self._asked(observer.request, start, RequestObserver) for observer in tuple(self.present)]
        found = [each for each in asked if each is not None]
        return ObservedRequest(self, found) if found else None

    def safely(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Call a method of an observer. An error is logged, and the result is then None."""
        try:
            return method(*arguments)
        except Exception as error:
            self.failed(getattr(method, "__qualname__", repr(method)), error)
            return None

    def failed(self, name: str, error: Exception) -> None:
        """Log an error of an observer's method or attribute."""
        if (more := self._quiet.due(name)) is not None:
            words = f" ({more} more like it since the last report)" if more else ""
            logger.warning("an observer's %s raised an error%s", name, words, exc_info=error)

    def _asked(self, method: Callable[[Any], Any], start: CallStart | RequestStart, kind: type[T]) -> T | None:
        """What an observer returns for a begin; None, with a log entry, if that is of another type."""
        found = self.safely(method, start)
        if found is None or isinstance(found, kind):
            return found
        name = getattr(method, "__qualname__", repr(method))
        self.failed(name, TypeError(f"it returned a {type(found).__qualname__}, not a {kind.__name__} or None"))
        return None


class ObservedCall:
    """A call and its observers."""

    __slots__ = ("_observers", "_present")

    def __init__(self, observers: Observers, present: list[CallObserver]) -> None:
        self._observers = observers
        self._present = present

    @property
    def travelling(self) -> Mapping[str, Any]:
        """The values that travel with the call on behalf of its observers."""
        found: dict[str, Any] = {}
        for each in self._present:
            try:
                found |= dict(each.travelling)
            except Exception as error:  # It may be anything.
                self._observers.failed(f"{type(each).__qualname__}.travelling", error)
        return found

    def attempt_failed(self, instance_id: int, failures: Sequence[tuple[str, str]], again: bool) -> None:
        """An attempt failed at these addresses, for these reasons."""
        reason = "; ".join(f"{address}: {why}" for address, why in failures)
        for each in self._present:
            self._observers.safely(each.attempt_failed, instance_id, reason, again)

    def ended(self, end: CallEnd) -> None:
        """The call ended."""
        for each in self._present:
            self._observers.safely(each.ended, end)


class ObservedRequest:
    """A request and its observers.

    Attributes:
        began: when the handler took its first step, on `time.monotonic`; 0 before.
        error: what the handler raised, until the end of the request.
    """

    __slots__ = ("_observers", "_present", "began", "error")

    def __init__(self, observers: Observers, present: list[RequestObserver]) -> None:
        self._observers = observers
        self._present = present
        self.began = 0.0
        self.error: BaseException | None = None

    def begin(self, now: float) -> None:
        """The handler takes its first step."""
        self.began = now
        for each in self._present:
            self._observers.safely(each.began)

    def ended(self, outcome: str, timing: Timing) -> None:
        """The request ended."""
        end, self.error = RequestEnd(outcome, self.error, timing), None
        for each in self._present:
            self._observers.safely(each.ended, end)

"""The open watches of a backend. All backends of this process share this code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from triton_distributed.discovery.base import Added, Change, Removed, Sink, Snapshot
from triton_distributed.names import EndpointName, Instance

_log = logging.getLogger("triton_distributed.discovery")


class Watcher:
    """One open watch."""

    __slots__ = ("_on_close", "_sink", "closed", "endpoint")

    def __init__(self, endpoint: EndpointName | None, sink: Sink, on_close: Callable[[Watcher], None]) -> None:
        self.endpoint = endpoint
        self.closed = False
        self._sink: Sink | None = sink
        self._on_close: Callable[[Watcher], None] | None = on_close

    def wants(self, endpoint: EndpointName) -> bool:
        return self.endpoint is None or self.endpoint == endpoint

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        on_close, self._on_close, self._sink = self._on_close, None, None
        if on_close is not None:
            on_close(self)

    def deliver(self, change: Change) -> None:
        if self._sink is None:
            return
        try:
            self._sink(change)
        except Exception:  # A sink must not raise. If one does, the other watches must still get the change.
            _log.exception("a watch of %s raised at %r", self.endpoint or "every endpoint", change)


class Watchers:
    """The open watches of one backend. Their number is bounded by the watches that its users have not closed."""

    __slots__ = ("_open",)

    def __init__(self) -> None:
        self._open: dict[Watcher, None] = {}  # Ordered: watches get changes in the order in which they were opened.

    def __len__(self) -> int:
        return len(self._open)

    def add(
        self,
        endpoint: EndpointName | None,
        sink: Sink,
        instances: Iterable[Instance],
        on_close: Callable[[Watcher], None] | None = None,
    ) -> Watcher:
        """Open a watch. Its sink gets a snapshot before any change.

        Args:
            instances: all instances that exist now, also those of other endpoints.
            on_close: called when the watch is closed.
        """

        def closed(watcher: Watcher) -> None:
            self._open.pop(watcher, None)
            if on_close is not None:
                on_close(watcher)

        watcher = Watcher(endpoint, sink, closed)
        self._open[watcher] = None
        watcher.deliver(Snapshot(tuple(each for each in instances if watcher.wants(each.endpoint))))
        return watcher

    def publish(self, change: Added | Removed) -> None:
        endpoint = change.instance.endpoint if isinstance(change, Added) else change.endpoint
        for watcher in tuple(self._open):  # A sink may close its own watch or another one.
            if watcher.wants(endpoint):
                watcher.deliver(change)

    def replace(self, instances: Iterable[Instance]) -> None:
        """Give every watch a new snapshot, which is cheaper than a large number of single changes."""
        present = tuple(instances)
        for watcher in tuple(self._open):
            watcher.deliver(Snapshot(tuple(each for each in present if watcher.wants(each.endpoint))))

    def close(self) -> None:
        for watcher in tuple(self._open):
            watcher.close()

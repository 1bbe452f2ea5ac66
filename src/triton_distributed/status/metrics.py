"""The metrics of a runtime, as a page for Prometheus. `status.page` makes it, and is imported for the first page."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from triton_distributed.system.fork import no_fork

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from triton_distributed.calling.candidates import Candidates
    from triton_distributed.discovery import Discovery
    from triton_distributed.external.nats import NatsConnection
    from triton_distributed.names import EndpointName
    from triton_distributed.observe import CallStats, LoopStats, RequestStats
    from triton_distributed.observe.labels import Labels
    from triton_distributed.observe.totals import Totals
    from triton_distributed.serving.server import Server
    from triton_distributed.serving.threads import HandlerThreads
    from triton_distributed.transport.fairness import FairShare
    from triton_distributed.transport.pool import SessionPool
    from triton_distributed.transport.shared_pool import SharedPool
    from triton_distributed.wire.window import ByteBudget


class Sources(msgspec.Struct, frozen=True):
    """The parts of a runtime that hold its counters.

    Attributes:
        served: the counters of served endpoints, by name and the program's labels.
        called: the counters of calls.
        candidates: what is known of called endpoints; a live view.
        draining: whether the runtime is shutting down.
        certificates: the files of its certificates, by setting.
    """

    instance_id: int
    served: Totals[tuple[EndpointName, Labels], RequestStats]
    called: Totals[EndpointName, CallStats]
    candidates: Mapping[EndpointName, Candidates]
    server: Server
    pool: SessionPool
    share: FairShare
    held: ByteBudget
    shared: SharedPool
    threads: HandlerThreads
    loop: LoopStats
    discovery: Discovery
    nats: NatsConnection
    draining: Callable[[], bool]
    certificates: Mapping[str, str]


class Collects(Protocol):
    """A registry or collector of prometheus-client."""

    def collect(self) -> Iterable[Metric]:
        """The metrics with their present values."""


class Page(NamedTuple):
    """A page of metrics.

    Attributes:
        body: the page, compressed if `content_encoding` is `gzip`.
        content_type, content_encoding: the headers of these names; no encoding if the latter is empty.
    """

    body: bytes
    content_type: str
    content_encoding: str = ""


class Metrics:
    """The metrics of one runtime, as a page for Prometheus. Made by the runtime.

    The page also has what the program registers with prometheus-client, in its default registry or one passed to `add`.

    Args:
        sources: the runtime's counters.
        loop_thread: the thread of the runtime's loop.
    """

    def __init__(self, sources: Sources, loop_thread: int) -> None:
        self._sources, self._loop_thread = sources, loop_thread
        self._added: list[Collects] = []
        self._rendering: Any = None

    def add(self, registry: Collects) -> None:
        """Put the metrics of one more registry on the page, after those of prometheus-client's default registry.

        Args:
            registry: a `prometheus_client.CollectorRegistry`, or any object with the method `collect`. It is asked in
                another thread than the loop's each time that the page is.

        Raises:
            TypeError: it has no such method.
        """
        if not callable(getattr(registry, "collect", None)):
            raise TypeError(f"{registry!r}: must be a prometheus_client.CollectorRegistry, or have a method collect()")
        if not any(each is registry for each in self._added):
            self._added.append(registry)

    def text(self) -> str:
        """The page in Prometheus' text format, for a program that has an HTTP server of its own.

        It takes some milliseconds. In a handler, call it with `await asyncio.to_thread(…)`.
        """
        return self.page().body.decode()

    def page(self, accept: str = "", accept_encoding: str = "") -> Page:
        """The page for one HTTP request.

        Args:
            accept: the header `Accept`: it chooses between Prometheus' text format and OpenMetrics.
            accept_encoding: the header `Accept-Encoding`; the page is compressed if it allows gzip.
        """
        if self._rendering is None:
            with no_fork:
                module = importlib.import_module("triton_distributed.status.page")
            self._rendering = module.Rendering(self._sources, self._added)
        paced = threading.get_ident() != self._loop_thread
        return Page(*self._rendering.page(accept, accept_encoding, paced))

"""The runtime and its endpoints, as Dynamo's programs use them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

from triton_distributed.compat.dynamo.client import Client, RouterMode
from triton_distributed.compat.dynamo.handlers import adapted
from triton_distributed.compat.dynamo.llm.exceptions import DynamoException
from triton_distributed.compat.dynamo.settings import config_for, sends_canaries
from triton_distributed.errors import InvalidName, NotServed
from triton_distributed.names import EndpointName
from triton_distributed.runtime import DistributedRuntime as NativeRuntime
from triton_distributed.runtime import Endpoint as NativeEndpoint
from triton_distributed.runtime import Metrics
from triton_distributed.runtime.options import ServeOptions

logger = logging.getLogger("triton_distributed.compat")


class RuntimeMetrics:
    """Puts a program's own metrics on the runtime's metrics page."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def register_prometheus_expfmt_callback(self, callback: Callable[[], str]) -> None:
        """Add the metrics that a callback returns as Prometheus text. It is called for each page, in another thread."""
        self._metrics.add(_Text(callback))

    register_prometheus_typed_callback = register_prometheus_expfmt_callback


class _Text:
    """A collector of metrics in Prometheus' text format."""

    def __init__(self, callback: Callable[[], str]) -> None:
        self._callback = callback

    def collect(self) -> Iterator[Any]:
        from prometheus_client.parser import text_string_to_metric_families

        return iter(text_string_to_metric_families(self._callback()))

    def __repr__(self) -> str:
        return f"the callback {self._callback!r}"


class Endpoint:
    """An endpoint, to serve or to call. Made by `runtime.endpoint("namespace.component.endpoint")`.

    Attributes:
        native: the same endpoint with the API of this runtime, for example for `native.update_metadata({…})`.
    """

    def __init__(self, native: NativeEndpoint, metrics: Metrics) -> None:
        self.native = native
        self._metrics = metrics

    def serve_endpoint(
        self,
        handler: Callable[..., Any],
        graceful_shutdown: bool = True,
        metrics_labels: Sequence[tuple[str, str]] | None = None,
        health_check_payload: Mapping[str, Any] | None = None,
    ) -> Awaitable[None]:
        """Serve the endpoint until the runtime shuts down.

        Args:
            handler: an async generator function of a request and, if it has that parameter, of a `context`. It is not
                interrupted: `context.is_stopped()` tells it that it should end. With a parameter `response_sender` it
                pushes its items to that instead of yielding them.
            graceful_shutdown: True lets running requests finish at shutdown, False cancels them.
            metrics_labels: labels to add to the metrics of the endpoint, as pairs.
            health_check_payload: the request with which the system server tries the idle endpoint, if
                `DYN_HEALTH_CHECK_ENABLED` is true.

        Raises:
            TypeError: the handler is not an async generator function of one request.
        """
        options: ServeOptions = {"interrupt": False}
        if health_check_payload is not None and sends_canaries():
            options["canary"] = health_check_payload
        return self.native.serve_endpoint(adapted(handler), bool(graceful_shutdown), metrics_labels, **options)

    def serve_bidirectional_endpoint(
        self,
        handler: Callable[..., Any],
        graceful_shutdown: bool = True,
        metrics_labels: Sequence[tuple[str, str]] | None = None,
    ) -> Awaitable[None]:
        """Serve an endpoint whose handler gets a stream of requests in place of one; see `serve_endpoint`."""
        adapter = adapted(handler, bidirectional=True)
        return self.native.serve_endpoint(adapter, bool(graceful_shutdown), metrics_labels, interrupt=False)

    async def client(self, router_mode: RouterMode | None = None) -> Client:
        """A client of the endpoint, which takes the instances in turn by default."""
        mode = RouterMode.RoundRobin if router_mode is None else router_mode
        if not isinstance(mode, RouterMode):
            raise TypeError(f"router_mode={router_mode!r}: must be a RouterMode")
        if not mode.exact:
            logger.warning("%s: %r is not in this runtime yet: %s is used", self.native.name, mode, mode.policy)
        return Client(await self.native.client(mode.policy))

    def connection_id(self) -> int:
        """The id of this runtime's instances."""
        return self.native.lease_id()

    async def unregister_endpoint_instance(self) -> None:
        """Withdraw this runtime's instance: it is not called until it is registered again."""
        try:
            await self.native.pause()
        except NotServed:
            logger.debug("%s is not served yet, so there is nothing to unregister", self.native.name)

    async def register_endpoint_instance(self) -> None:
        """Register the instance again. An endpoint that is not served yet is registered when it is served."""
        try:
            await self.native.resume()
        except NotServed:
            logger.debug("%s is registered when it is served", self.native.name)

    @property
    def metrics(self) -> RuntimeMetrics:
        """Takes Prometheus callbacks."""
        return RuntimeMetrics(self._metrics)

    def __repr__(self) -> str:
        return repr(self.native)


class Component:
    """A group of endpoints, for programs of earlier releases."""

    def __init__(self, runtime: DistributedRuntime, namespace: str, name: str) -> None:
        self._runtime, self._namespace, self._name = runtime, namespace, name

    def endpoint(self, name: str) -> Endpoint:
        """One endpoint of the component."""
        native = self._runtime.native
        return Endpoint(native.namespace(self._namespace).component(self._name).endpoint(name), native.metrics)

    async def create_service(self) -> None:
        """Do nothing: serving an endpoint is enough."""


class Namespace:
    """A group of components, for programs of earlier releases."""

    def __init__(self, runtime: DistributedRuntime, name: str) -> None:
        self._runtime, self._name = runtime, name

    def component(self, name: str) -> Component:
        """One component of the namespace."""
        return Component(self._runtime, self._name, name)


class DistributedRuntime:
    """One process's part in the system.

    Args:
        event_loop: the running loop.
        discovery_backend: `file`, `etcd` or `mem`; by default the settings decide.
        request_plane: `tcp` (direct connections) or `nats`; by default the settings decide.
        enable_nats: not used, as in Dynamo itself.
        event_plane: `nats`, or `zmq` for the default of this runtime.
        response_plane: not used: responses take the way of their requests.

    Attributes:
        native: the same runtime with the API of this package.

    Raises:
        DynamoException: a backend is not in this runtime.
        TypeError: a backend is not text.
    """

    def __init__(
        self,
        event_loop: asyncio.AbstractEventLoop,
        discovery_backend: str | None = None,
        request_plane: str | None = None,
        enable_nats: bool | None = None,
        *,
        event_plane: str | None = None,
        response_plane: str | None = None,
    ) -> None:
        try:
            config = config_for(discovery_backend, request_plane, event_plane)
        except ValueError as error:
            raise DynamoException(str(error)) from error
        self._is_ready = True
        self.native = NativeRuntime(event_loop, config=config)

    def endpoint(self, path: str) -> Endpoint:
        """The endpoint with the path `namespace.component.endpoint`, with or without `dyn://`.

        Raises:
            ValueError: the path does not have exactly three valid parts.
        """
        try:
            EndpointName.parse(path)
        except InvalidName as error:
            raise ValueError(
                f"Invalid endpoint path {path!r}. Expected format: 'namespace.component.endpoint' or "
                f"'dyn://namespace.component.endpoint': {error}"
            ) from None
        return Endpoint(self.native.endpoint(path), self.native.metrics)

    def namespace(self, name: str) -> Namespace:
        """A namespace, for programs of earlier releases."""
        return Namespace(self, name)

    def event_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the runtime."""
        return self.native.event_loop()

    def shutdown(self) -> None:
        """Begin to drain and return at once. `serve_endpoint` ends after the drain, within `TRD_DRAIN_TIMEOUT_S`."""
        self.native.shutdown()

    def set_health_status(self, ready: bool) -> None:
        """Let `/health` of the system server answer 503 while the program is not ready. Requests still come."""
        self._is_ready = bool(ready)
        port = self.native.status_port
        if "set_health_status" not in port.checks:
            port.health_check(lambda: self._is_ready or "the program is not ready", name="set_health_status")

    def register_engine_route(
        self, route_name: str, callback: Callable[[dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]]
    ) -> None:
        """Let a callback answer POST requests to `/engine/{route_name}` of the system server; it gets the JSON body.

        Raises:
            ValueError: the name has characters that a path cannot have.
            TypeError: the callback is not a function of one argument.
        """
        port = self.native.status_port
        route = f"POST /engine/{route_name}"
        port.routes.pop(("POST", f"/engine/{route_name}"), None)  # A later callback replaces the former one.
        port.route(route, callback)

    def system_status_server_url(self) -> str | None:
        """Where the system server listens; None if `DYN_SYSTEM_PORT` and `TRD_STATUS_PORT` are not set."""
        return self.native.status_port.url or None

    def __repr__(self) -> str:
        return repr(self.native)

"""Namespace, component and endpoint: plain names until an endpoint is served or called."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, Protocol, Unpack

from triton_distributed.calling.services import Services
from triton_distributed.events import Event, Subscription, WorkQueue
from triton_distributed.events.inbox import MAX_BYTES, MAX_EVENTS
from triton_distributed.names import EndpointName, check_name, service_name
from triton_distributed.routing.policies import MetadataPolicy, Policy
from triton_distributed.runtime.client import Client
from triton_distributed.runtime.clients import Clients
from triton_distributed.runtime.core import Core
from triton_distributed.runtime.events import component_subject, namespace_subject
from triton_distributed.runtime.options import HandlerFunction, ServeOptions, unexpected
from triton_distributed.runtime.serve_task import ServeTask
from triton_distributed.runtime.worker import Serving, Worker


class Owner(Core, Protocol):
    """A runtime as its namespaces, components and endpoints see it."""

    worker: Worker
    clients: Clients


class Namespace:
    """A group of components. Made by `runtime.namespace(name)`."""

    def __init__(self, runtime: Owner, name: str) -> None:
        self._runtime = runtime
        self.name = check_name("namespace", name)

    def component(self, name: str) -> Component:
        """One component of the namespace; no I/O.

        Raises:
            InvalidName: `name` is not a valid component name.
        """
        return Component(self._runtime, self.name, name)

    def event_subject(self, name: str) -> str:
        """The subject under which events of this name are published."""
        return namespace_subject(self.name, name)

    def publish(self, name: str, payload: object) -> Coroutine[Any, Any, None]:
        """Publish an event of the whole namespace; see `Component.publish`."""
        self._runtime.check("publish")
        return self._runtime.events.publish(self.event_subject(name), payload)

    def subscribe(self, name: str, *, max_events: int = MAX_EVENTS, max_bytes: int = MAX_BYTES) -> Subscription[Event]:
        """Subscribe to events of the whole namespace; see `Component.subscribe`."""
        self._runtime.check("subscribe")
        return self._runtime.events.subscribe(name, self.event_subject(name), max_events, max_bytes)

    def __repr__(self) -> str:
        return f"<Namespace {self.name}>"


class Component:
    """A group of endpoints that belong together. Made by `namespace.component(name)`."""

    def __init__(self, runtime: Owner, namespace: str, name: str) -> None:
        self._runtime = runtime
        self.namespace = namespace
        self.name = check_name("component", name)

    def endpoint(self, name: str) -> Endpoint:
        """One endpoint of the component; no I/O.

        Raises:
            InvalidName: `name` is not a valid endpoint name.
        """
        return Endpoint(self._runtime, EndpointName(self.namespace, self.name, name))

    def create_service(self) -> asyncio.Future[None]:
        """Declare the component. It is optional, since serving an endpoint is enough, and may be called repeatedly."""
        self._runtime.check("create_service")
        done: asyncio.Future[None] = self._runtime.event_loop().create_future()
        done.set_result(None)
        return done

    def service_name(self) -> str:
        """The slug with which the component's subjects begin, e.g. `triton_init_backend_720278f8`."""
        return service_name(self.namespace, self.name)

    def event_subject(self, name: str) -> str:
        """The subject under which events of this name are published; see `names.subject_token` for unusual names."""
        return component_subject(self.namespace, self.name, name)

    def publish(self, name: str, payload: object) -> Coroutine[Any, Any, None]:
        """Publish an event to all its subscribers: at most once, in this runtime's order.

        The call itself encodes the payload, so the payload may be changed before the returned coroutine is awaited.
        Publishing does not wait for subscribers: one that does not keep up loses events, and knows how many.

        Args:
            name: the event's name; the rules for component names apply.
            payload: any value that can be sent as a request.

        Raises:
            BrokerError: NATS cannot be reached, and the queue of waiting events is full.
            ConfigError: the settings name no event plane that can be used.
            DiscoveryError: the private folder is not private.
            MessageTooLarge: the event is larger than `TRD_MAX_MESSAGE_BYTES`, or than NATS' own `max_payload`.
            TypeError, ValueError: the payload cannot be encoded.
            InvalidName: the event name is invalid.
            ForkError, RuntimeClosed: the runtime cannot be used here, or no more.
        """
        self._runtime.check("publish")
        return self._runtime.events.publish(self.event_subject(name), payload)

    def subscribe(self, name: str, *, max_events: int = MAX_EVENTS, max_bytes: int = MAX_BYTES) -> Subscription[Event]:
        """Subscribe to events of this name; read them with `async for event in …`, see `Subscription`.

        Await the subscription to be sure that every event published afterwards, in any process, arrives.

        Args:
            max_events: the most unread events. Beyond that the oldest are dropped; see `subscription.dropped`.
            max_bytes: the most bytes of unread events; a single event may be larger.

        Raises (from the call): ConfigError, ForkError, InvalidName, RuntimeClosed, ValueError for a limit below 1.
        Raises (from awaiting or reading): BrokerError, DiscoveryError.
        """
        self._runtime.check("subscribe")
        return self._runtime.events.subscribe(name, self.event_subject(name), max_events, max_bytes)

    def queue(self, name: str, *, ack_wait_s: float = 30.0, max_deliveries: int | None = None) -> WorkQueue:
        """A work queue of this component, kept by NATS JetStream; no I/O. See `WorkQueue` for the arguments.

        Raises:
            ConfigError: `NATS_SERVER` is not set.
            InvalidName: `name` is not a valid queue name.
            ValueError: a limit is invalid.
        """
        self._runtime.check("queue")
        return self._runtime.events.queue(self.namespace, self.name, name, ack_wait_s, max_deliveries)

    def __repr__(self) -> str:
        return f"<Component {self.namespace}/{self.name}>"


class Endpoint:
    """An endpoint, to serve or to call. Made by `component.endpoint(name)` or `runtime.endpoint("a.b.c")`."""

    def __init__(self, runtime: Owner, name: EndpointName) -> None:
        self._runtime = runtime
        self.name = name

    def serve_endpoint(
        self,
        handler: HandlerFunction,
        graceful_shutdown: bool = True,
        metrics_labels: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
        **options: Unpack[ServeOptions],
    ) -> ServeTask:
        """Serve the endpoint until the runtime shuts down. The returned task then ends with None.

        Args:
            handler: an async generator, coroutine, generator or plain function with one parameter (request) or two
                (request, context). A plain handler runs in one thread and one context to its end. A request parameter
                annotated as an async iterator takes a stream of requests. Annotations of requests and answers are
                enforced. A yielded value may change as soon as the handler goes on. Large memory that a function
                returns is sent without a copy, so it must not change before it is sent.
            graceful_shutdown: True lets running requests finish at shutdown, False cancels them.
            metrics_labels: labels to add to the metrics of the endpoint, e.g. `{"model": "llama"}` or pairs; at most 8.
            options: see `ServeOptions`.

        Raises (from the task):
            DiscoveryError: the instance cannot be registered.
            OSError: the address to listen on cannot be bound.

        Raises (from the call itself):
            AlreadyServed: this runtime already serves the endpoint.
            TypeError, ValueError: the handler, an option or a limit is invalid.
            ForkError, RuntimeClosed, WrongLoop.
        """
        if unknown := options.keys() - ServeOptions.__annotations__.keys():
            known = {"handler", "graceful_shutdown", *ServeOptions.__annotations__}
            raise unexpected("Endpoint.serve_endpoint", sorted(unknown), known)
        serving = Serving(graceful_shutdown, metrics_labels=metrics_labels, **options)
        self._runtime.check("serve_endpoint")
        return self._runtime.worker.serve(self.name, handler, serving)

    def client(self, policy: str | Policy | MetadataPolicy = "round_robin") -> asyncio.Task[Client]:
        """A task whose result is a client of the endpoint. The client knows the present instances.

        Args:
            policy: chooses the instance of each `generate`: `round_robin`, `random`, `least_loaded`, `p2c`, or a
                function `(request, instances, load) -> instance`, which may have a fourth parameter `metadata`.

        Raises (from the task):
            DiscoveryError: discovery cannot be read; its address is in the text.
            ConfigError: there is no such policy.

        Raises (from the call): ForkError, RuntimeClosed.
        """
        self._runtime.check("client")
        return self._runtime.event_loop().create_task(self._client(policy))

    async def _client(self, policy: str | Policy | MetadataPolicy) -> Client:
        client = self.unopened_client(policy)
        await client.candidates.open()
        return client

    def unopened_client(self, policy: str | Policy | MetadataPolicy = "round_robin") -> Client:
        """A client that does not know the instances yet; `await client.candidates.open()` reads them."""
        runtime = self._runtime
        candidates = runtime.candidates(self.name)
        where, retries = runtime.discovery.where, runtime.config.retries
        services = Services(runtime, runtime.event_loop(), candidates, runtime.pool, runtime.prober, where, retries)
        runtime.observers.look()
        client = Client(services, policy, runtime.rng, runtime.looks_elsewhere, runtime.observers)
        runtime.clients.add(client)
        return client

    async def pause(self) -> None:
        """Withdraw this runtime's instance: clients call other instances, and this one begins no request.

        Running requests go on. Waiting requests, and those that arrive before clients notice, are refused, and their
        calls go to another instance. Without another instance the caller gets `Paused` or `NoInstances`. So a worker
        may free its memory when `pause` has returned and its last request has ended. Pausing twice is harmless.

        Raises:
            NotServed: this runtime does not serve the endpoint, or has not registered it yet.
            DiscoveryError: discovery is static, so its list is fixed.
            ForkError, RuntimeClosed: the runtime cannot be used here, or no more.
        """
        await self._runtime.worker.registrations.pause(self.name)

    async def resume(self) -> None:
        """Register this runtime's instance again, under the same id, and admit requests. Resuming twice is harmless.

        Raises:
            NotServed: this runtime does not serve the endpoint, or has not registered it yet.
            DiscoveryError: the instance cannot be registered; it stays paused.
            ForkError, RuntimeClosed: also while the runtime drains.
        """
        await self._runtime.worker.registrations.resume(self.name)

    async def update_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Replace the metadata that this runtime publishes with its instance; clients see it in `instances()`.

        A paused endpoint publishes the new metadata when it resumes.

        Args:
            metadata: plain JSON values; they are copied.

        Raises:
            NotServed: this runtime does not serve the endpoint, or has not registered it yet.
            DiscoveryError: the metadata is not plain JSON or too large, or discovery cannot be written or is static.
                The former metadata stays.
            ForkError, RuntimeClosed: the runtime cannot be used here, or no more.
        """
        await self._runtime.worker.registrations.update_metadata(self.name, metadata)

    def lease_id(self) -> int:
        """The instance id of this runtime, the same for all its endpoints."""
        return self._runtime.instance_id

    instance_id = lease_id

    def __repr__(self) -> str:
        return f"<Endpoint {self.name}>"

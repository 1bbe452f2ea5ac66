"""Namespace, component, endpoint: plain names until something is served or called."""

from __future__ import annotations

import asyncio
import copy
import weakref
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

from triton_distributed.calling.services import Services
from triton_distributed.events import Event, Subscription, WorkQueue
from triton_distributed.events.inbox import MAX_BYTES, MAX_EVENTS
from triton_distributed.names import EndpointName, check_name, service_name
from triton_distributed.routing.policies import Policy
from triton_distributed.runtime.client import Client
from triton_distributed.runtime.core import Core
from triton_distributed.runtime.events import component_subject, namespace_subject
from triton_distributed.runtime.serve_task import ServeTask
from triton_distributed.runtime.worker import ServeOptions, Worker


class Owner(Core, Protocol):
    """A runtime as its namespaces, components and endpoints see it."""

    worker: Worker
    clients: weakref.WeakSet[Client]


class Namespace:
    """A group of components. Made by `runtime.namespace(name)`."""

    def __init__(self, runtime: Owner, name: str) -> None:
        self._runtime = runtime
        self.name = check_name("namespace", name)

    def component(self, name: str) -> Component:
        """One of its components; no I/O.

        Raises:
            InvalidName: `name` cannot name one.
        """
        return Component(self._runtime, self.name, name)

    def event_subject(self, name: str) -> str:
        """The subject that events of this name are published under."""
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
        """One of its endpoints; no I/O.

        Raises:
            InvalidName: `name` cannot name one.
        """
        return Endpoint(self._runtime, EndpointName(self.namespace, self.name, name))

    def create_service(self) -> asyncio.Future[None]:
        """Declare the component. Optional: serving an endpoint is enough. Legal any number of times."""
        self._runtime.check("create_service")
        done: asyncio.Future[None] = self._runtime.event_loop().create_future()
        done.set_result(None)
        return done

    def service_name(self) -> str:
        """The slug that names the component's subjects, e.g. `triton_init_backend_720278f8`."""
        return service_name(self.namespace, self.name)

    def event_subject(self, name: str) -> str:
        """The subject that events of this name are published under; see `names.subject_token` for unusual names."""
        return component_subject(self.namespace, self.name, name)

    def publish(self, name: str, payload: object) -> Coroutine[Any, Any, None]:
        """Publish an event to all its subscribers: at most once, in this runtime's order.

        The call itself encodes the payload, so it may be changed before what this returns is awaited. Nothing here
        waits for subscribers: one that does not keep up loses events, and knows how many.

        Args:
            name: of the event, any name that could be a component's.
            payload: whatever can be sent as a request.

        Raises:
            BrokerError: NATS is away and no more can wait for it.
            ConfigError: the settings name nothing that carries events.
            DiscoveryError: the private folder is not private.
            MessageTooLarge: it is above `TRD_MAX_MESSAGE_BYTES`, or NATS' own `max_payload`.
            TypeError, ValueError: the payload cannot travel.
            ForkError, InvalidName, RuntimeClosed.
        """
        self._runtime.check("publish")
        return self._runtime.events.publish(self.event_subject(name), payload)

    def subscribe(self, name: str, *, max_events: int = MAX_EVENTS, max_bytes: int = MAX_BYTES) -> Subscription[Event]:
        """Subscribe to events of this name; `async for event in …`, see `Subscription`.

        Await it to be sure that every event published afterwards, in any process, arrives.

        Args:
            max_events: events that may wait unread. Beyond that the oldest are dropped; see `subscription.dropped`.
            max_bytes: bytes of these events; a single event may be larger.

        Raises (from the call): ConfigError, ForkError, InvalidName, RuntimeClosed, ValueError for a limit below 1.
        Raises (from awaiting or reading): BrokerError, DiscoveryError.
        """
        self._runtime.check("subscribe")
        return self._runtime.events.subscribe(name, self.event_subject(name), max_events, max_bytes)

    def queue(self, name: str, *, ack_wait_s: float = 30.0, max_deliveries: int | None = None) -> WorkQueue:
        """A work queue of this component, kept by NATS JetStream; no I/O. See `WorkQueue` for the arguments.

        Raises:
            ConfigError: `NATS_SERVER` is not set.
            InvalidName: `name` cannot name one.
            ValueError: a limit is invalid.
        """
        self._runtime.check("queue")
        return self._runtime.events.queue(self.namespace, self.name, name, ack_wait_s, max_deliveries)

    def __repr__(self) -> str:
        return f"<Component {self.namespace}/{self.name}>"


class Endpoint:
    """Something that can be served and called. Made by `component.endpoint(name)` or `runtime.endpoint("a.b.c")`."""

    def __init__(self, runtime: Owner, name: EndpointName) -> None:
        self._runtime = runtime
        self.name = name

    def serve_endpoint(
        self,
        handler: Callable[..., Any],
        graceful_shutdown: bool = True,
        metrics_labels: object = None,
        *,
        max_inflight: int | None = None,
        max_queue: int = 0,
        metadata: Mapping[str, Any] | None = None,
    ) -> ServeTask:
        """Serve the endpoint until the runtime is shut down; the task is then done with None.

        Args:
            handler: an async generator, coroutine, generator or plain function of one parameter (request) or two
                (request, context). A plain one runs in one thread and one context to its end. A request parameter
                annotated as an async iterator takes a stream of requests. Annotations are enforced both ways. What was
                yielded may change as soon as the handler goes on. Large memory that a function returns is sent from
                its own place, so it must not be changed before it was sent.
            graceful_shutdown: True lets running requests finish at shutdown, False cuts them.
            metrics_labels: accepted for programs of the original's successor.
            max_inflight: handlers that may run at once; None for no limit.
            max_queue: requests that may wait beyond that; the next is refused with Overloaded, and goes elsewhere.
            metadata: plain JSON values published with the instance, as they are now.

        Raises (from the task):
            DiscoveryError: the instance cannot be registered.
            OSError: the address to listen on cannot be bound.

        Raises (from the call itself):
            AlreadyServed: this runtime serves the endpoint.
            TypeError, ValueError: the handler or a limit is invalid.
            ForkError, RuntimeClosed, WrongLoop.
        """
        if max_inflight is not None and (type(max_inflight) is not int or max_inflight < 1):
            raise ValueError(f"max_inflight={max_inflight!r}: a whole number of at least 1, or None for no limit")
        if type(max_queue) is not int or max_queue < 0:
            raise ValueError(f"max_queue={max_queue!r}: a whole number of at least 0")
        if max_queue and max_inflight is None:
            raise ValueError(f"max_queue={max_queue}: requests only wait where max_inflight= limits those that run")
        self._runtime.check("serve_endpoint")
        metadata = copy.deepcopy(dict(metadata or {}))  # the instance is registered later, and perhaps again
        options = ServeOptions(graceful_shutdown, max_inflight, max_queue, metadata)
        return self._runtime.worker.serve(self.name, handler, options)

    def client(self, policy: str | Policy = "round_robin") -> asyncio.Task[Client]:
        """A task whose result is a client that knows the present instances.

        Args:
            policy: of `generate`: `round_robin`, `random`, `least_loaded`, `p2c`, or a function
                `(request, instances, load) -> instance`.

        Raises (from the task):
            DiscoveryError: the place where instances are registered cannot be read; its address is in the text.
            ConfigError: there is no such policy.

        Raises (from the call): ForkError, RuntimeClosed.
        """
        self._runtime.check("client")
        return self._runtime.event_loop().create_task(self._client(policy))

    async def _client(self, policy: str | Policy) -> Client:
        runtime = self._runtime
        candidates = await runtime.candidates(self.name)
        where, retries = runtime.discovery.where, runtime.config.retries
        services = Services(runtime, runtime.event_loop(), candidates, runtime.pool, runtime.prober, where, retries)
        client = Client(services, policy, runtime.rng, runtime.looks_elsewhere)
        runtime.clients.add(client)
        return client

    async def pause(self) -> None:
        """Take this runtime's instance out of rotation: clients call other instances, and this one begins no request.

        Requests that run go on. Requests that wait for a place here, or come before clients know, are refused and go
        to another instance by themselves; where there is none, the caller gets `Paused` or `NoInstances`. So a worker
        may give up its memory when this has returned and its last request has ended. Pausing twice is harmless.

        Raises:
            NotServed: this runtime does not serve the endpoint, or its registration is not through yet.
            DiscoveryError: with static discovery, whose list is fixed.
            ForkError, RuntimeClosed.
        """
        await self._runtime.worker.registrations.pause(self.name)

    async def resume(self) -> None:
        """Put this runtime's instance back into rotation, under the id that it had. Resuming twice is harmless.

        Raises:
            NotServed: this runtime does not serve the endpoint, or its registration is not through yet.
            DiscoveryError: it cannot be registered; it stays out.
            ForkError, RuntimeClosed: also while the runtime drains.
        """
        await self._runtime.worker.registrations.resume(self.name)

    def lease_id(self) -> int:
        """The instance id of this runtime, the same for all its endpoints."""
        return self._runtime.instance_id

    instance_id = lease_id

    def __repr__(self) -> str:
        return f"<Endpoint {self.name}>"

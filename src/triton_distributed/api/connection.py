"""`connect`: the place from which a program calls and serves endpoints."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, Unpack, overload

import msgspec

from triton_distributed.api.contracts import Bidirectional, Contract, Stream, Unary
from triton_distributed.api.declarations import (
    BidirectionalHandler,
    Declaration,
    StreamHandler,
    UnaryHandler,
    check_known,
    declaration_of,
)
from triton_distributed.api.fit import check_bound, check_handler
from triton_distributed.api.options import ServeOptions, StreamOptions, UnaryOptions
from triton_distributed.api.served import Served
from triton_distributed.api.targets import Target
from triton_distributed.calling.accepted import accepted
from triton_distributed.calling.item_stream import ItemStream
from triton_distributed.calling.response_stream import discard
from triton_distributed.calling.unary import answer
from triton_distributed.config import Config
from triton_distributed.context import Context, current
from triton_distributed.names import EndpointName
from triton_distributed.observe.observer import Observers
from triton_distributed.routing.policies import MetadataPolicy, Policy
from triton_distributed.runtime.component import Endpoint
from triton_distributed.runtime.distributed import DistributedRuntime
from triton_distributed.runtime.instances import InstanceStatus
from triton_distributed.runtime.worker import Serving
from triton_distributed.status.port import CHECK_S

R = TypeVar("R")
A = TypeVar("A")

_here: ContextVar[Connection | None] = ContextVar("triton_distributed_connection", default=None)


def connect(config: Config | None = None, *, runtime: DistributedRuntime | None = None) -> Connection:
    """Connect this process to the others: `async with trd.connect() as here`. No I/O happens before it is needed.

    Args:
        config: the settings; by default those of the environment.
        runtime: an existing runtime to use; the connection does not close it.

    Raises:
        ConfigError: a setting is invalid.
        RuntimeError: no event loop is running in this thread; `trd.connect_sync()` needs none.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "connect() needs a running event loop: use it inside `async def`, or use connect_sync() without a loop"
        ) from None
    if runtime is None and _instead is not None:
        return _instead(config)
    return Connection(runtime or DistributedRuntime(config=config), runtime is None)


_instead: Callable[[Config | None], Connection] | None = None


@contextmanager
def connect_by(make: Callable[[Config | None], Connection]) -> Iterator[None]:
    """Inside a `with` block, make all connections of this process by calling a function, e.g. during a test.

    Args:
        make: gets the settings that the program gave. It is called while the event loop of `connect` runs.
    """
    global _instead
    before, _instead = _instead, make
    try:
        yield
    finally:
        _instead = before


def target_of(connection: Connection, contract: Stream[Any, Any]) -> Target:
    """The target of a contract, for callers that read their calls themselves."""
    return connection._any(contract)


class Connection:
    """Calls and serves endpoints. Made by `connect`; belongs to the event loop in which it was made.

    Attributes:
        runtime: the runtime under it, with the API of the original.
        metrics: the metrics of this connection, as a page for Prometheus.
    """

    def __init__(self, runtime: DistributedRuntime, owned: bool) -> None:
        self.runtime = runtime
        self.metrics = runtime.metrics
        self._owned = owned
        self._targets: dict[object, Target] = {}
        self._called: dict[object, Target] = {}  # The targets of `call`: their kind was already checked.
        self._streamed: dict[object, Target] = {}  # The same for `stream`.
        self._entered: contextvars.Token[Connection | None] | None = None

    # calling

    @overload
    async def call(self, endpoint: Unary[R, A], request: R, **options: Unpack[UnaryOptions]) -> A: ...
    @overload
    async def call(self, endpoint: str, request: Any, **options: Unpack[UnaryOptions]) -> Any: ...

    async def call(
        self,
        endpoint: Any,
        request: Any,
        *,
        policy: str | Policy | MetadataPolicy | None = None,
        hedge_after_s: float | None = None,
        **options: Any,
    ) -> Any:
        """Call an endpoint that answers with one value, and return the value.

        Without an instance, the call waits for one, at most for its timeout.

        Args:
            endpoint: a `Unary` contract, or the endpoint's name.
            request: the request. Large arrays and buffers are not copied: they must not change until this returns.
            options: see `UnaryOptions`.

        Raises:
            NoInstances, ConnectionFailed: no instance can take the request.
            ContractMismatch: the worker serves the endpoint with another contract.
            InvalidRequest: the request does not fit the contract.
            Overloaded, Draining, Paused: the workers that were tried refused the request.
            DeadlineExceeded: the call's time is over.
            RemoteError: the handler raised; the error is also an instance of the type that was raised.
            StreamIncomplete: the worker was lost after the handler had begun.
            NotUnary: the handler answered with no value, or with more than one.
            TypeError: the request cannot be encoded, or the endpoint is not unary.
        """
        target = self._called.get(endpoint)
        if target is None:
            target = self._called[endpoint] = self._open(endpoint, "call", "unary")
        client, decoder = target.client, target.decoder
        chooses = client.policy_of(policy)
        if hedge_after_s is not None:
            return await client.hedged("Connection.call", request, chooses, decoder, True, hedge_after_s, options)
        return await answer(
            client.start("Connection.call", request, chooses, False, True, options, None, decoder, True)
        )

    @overload
    def stream(self, endpoint: Stream[R, A], request: R, **options: Unpack[StreamOptions]) -> ItemStream[A]: ...
    @overload
    def stream(
        self, endpoint: Bidirectional[R, A], request: AsyncIterable[R], **options: Unpack[StreamOptions]
    ) -> ItemStream[A]: ...
    @overload
    def stream(self, endpoint: str, request: Any, **options: Unpack[StreamOptions]) -> ItemStream[Any]: ...

    def stream(
        self,
        endpoint: Any,
        request: Any,
        *,
        policy: str | Policy | MetadataPolicy | None = None,
        **options: Any,
    ) -> ItemStream[Any]:
        """Call an endpoint that answers with a stream.

        The call begins now. Without an instance, it waits for one, at most for its timeout.

        Args:
            endpoint: a `Stream` or `Bidirectional` contract, or the endpoint's name.
            request: the request. It is encoded or copied now, so later changes do not reach the handler. For a
                bidirectional endpoint, an async iterator of items.
            options: see `StreamOptions`.

        Returns:
            The items; see `ItemStream` for what they raise.

        Raises:
            TypeError: the request cannot be encoded, or the endpoint is unary.
            ValueError: an option is invalid.
        """
        target = self._streamed.get(endpoint)
        if target is None:
            target = self._streamed[endpoint] = self._open(endpoint, "stream", "stream", "bidirectional")
        return ItemStream(target.start(request, target.client.policy_of(policy), options))

    def _any(self, endpoint: Contract[Any, Any] | str) -> Target:
        return self._open(endpoint, "", "unary", "stream", "bidirectional")

    def _open(self, endpoint: Any, verb: str, *kinds: str) -> Target:
        """Find the target of a contract or a name, whose kind must be one of these."""
        contract = endpoint if isinstance(endpoint, Contract) else None
        if contract is not None and contract.kind not in kinds:
            use = "call" if contract.kind == "unary" else "stream"
            raise TypeError(f"{verb}(): {contract!r} is {contract.kind}: use {use}()")
        if (known := self._targets.get(endpoint)) is not None:
            return known
        name = EndpointName.parse(endpoint) if contract is None else contract.name
        target = self._targets[endpoint] = self._target(name, contract)
        return target

    def _target(self, name: EndpointName, contract: Contract[Any, Any] | None) -> Target:
        return Target(Endpoint(self.runtime, name).unopened_client(), contract)

    async def send(
        self, endpoint: Unary[R, Any] | Stream[R, Any] | str, request: R, **options: Unpack[StreamOptions]
    ) -> None:
        """Hand a request over. The handler runs to its end, and its items are dropped.

        It returns when a handler has begun with the request. If a handler calls this, the new request does not depend
        on the request that the handler serves: its deadline and its cancellation have no effect on the new one. `close`
        waits for such requests as long as for the requests that this process serves.

        Args:
            endpoint: the endpoint's contract, which is not bidirectional, or its name.
            request: the request.
            options: see `StreamOptions`. A `timeout` also ends the handler.

        Raises:
            TritonError: as `ItemStream.accepted` raises it.
        """
        target = self._open(endpoint, "send", "unary", "stream")
        serving = current.get()
        if options.get("context") is None and serving is not None and not serving.over:
            options["context"] = context = Context(serving.id(), None, serving.travelling)
            context.independent = True
            options["priority"] = options.get("priority", serving.priority)
        policy = options.pop("policy", None)
        chooses = target.client.policy_of(policy)
        call = target.client.start("Connection.send", request, chooses, False, False, options, None, None, True)
        await accepted(call)
        self.runtime.finish_first(discard(call))

    async def instances(self, endpoint: Contract[Any, Any] | str) -> list[InstanceStatus]:
        """The present instances of an endpoint, each with its state, its metadata and its load; see `InstanceStatus`.

        Args:
            endpoint: its contract or its name.

        Raises:
            DiscoveryError: discovery cannot be read.
        """
        client = self._any(endpoint).client
        await client.candidates.open()
        return client.instances()

    async def wait_for_instances(
        self, endpoint: Contract[Any, Any] | str, count: int = 1, *, timeout: float | None = None
    ) -> None:
        """Wait until at least `count` instances of an endpoint exist.

        Args:
            endpoint: its contract or its name.
            count: how many instances.
            timeout: seconds; None for no limit.

        Raises:
            TooFewInstances: there are fewer; a TimeoutError that names the endpoint and what was found.
            DiscoveryError: discovery cannot be read.
        """
        client = self._any(endpoint).client
        await client.candidates.open()
        await client.wait_for_instances(count, timeout)

    # serving

    @overload
    async def serve(
        self, endpoint: Unary[R, A], handler: UnaryHandler[R, A], **options: Unpack[ServeOptions]
    ) -> Served: ...
    @overload
    async def serve(
        self, endpoint: Stream[R, A], handler: StreamHandler[R, A], **options: Unpack[ServeOptions]
    ) -> Served: ...
    @overload
    async def serve(
        self, endpoint: Bidirectional[R, A], handler: BidirectionalHandler[R, A], **options: Unpack[ServeOptions]
    ) -> Served: ...
    @overload
    async def serve(self, endpoint: str, handler: Callable[..., Any], **options: Unpack[ServeOptions]) -> Served: ...
    @overload
    async def serve(self, endpoint: Callable[..., Any], /) -> Served: ...

    async def serve(self, endpoint: Any, handler: Any = None, **options: Any) -> Served:
        """Serve an endpoint. It can be called when this returns.

        Args:
            endpoint: a function that `@trd.serve` has declared; or a contract or a name, followed by the handler.
            handler: the handler: a function or a bound method.
            options: see `ServeOptions`.

        Raises:
            TypeError: the handler does not fit, or was not declared; or an option is unknown.
            AlreadyServed: this connection already serves the endpoint.
            DiscoveryError: the instance cannot be registered.
            OSError: the address to listen on cannot be bound.
        """
        if handler is None:
            declared = declaration_of(endpoint)
            if declared is None:
                raise TypeError(f"{endpoint!r} is not declared: decorate it with @trd.serve, or pass its endpoint")
            if options:
                raise TypeError(
                    f"serve(): @trd.serve has the options of {endpoint!r}: pass {next(iter(options))}= there"
                )
            handler = endpoint
        else:
            check_known(options)
            contract = endpoint if isinstance(endpoint, Contract) else None
            name = EndpointName.parse(endpoint) if contract is None else contract.name
            if contract is not None:
                check_handler(handler, contract)
            declared = Declaration(name, contract, options)  # type: ignore[arg-type]
        return await self.serve_declared(handler, declared)

    async def serve_declared(self, handler: Any, declared: Declaration) -> Served:
        """Serve a handler as a declaration says; see `serve`."""
        self.runtime.check("serve_endpoint")
        check_bound(handler)
        name, contract, options = declared
        serving = Serving(
            options.get("graceful_shutdown", True),
            options.get("max_inflight"),
            options.get("max_queue", 0),
            options.get("metadata"),
            None if contract is None else contract.schema,
            None if contract is None else contract.types,
            options.get("interrupt", True),
            options.get("metrics_labels"),
            options.get("canary", msgspec.UNSET),
        )
        task = self._context().run(self.runtime.worker.serve, name, handler, serving)
        try:
            futures: list[asyncio.Future[Any]] = [task, task.registered]
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task])  # Then the endpoint can be served again.
            raise
        if not task.registered.done():
            await task  # It raises what went wrong.
            self.runtime.check("serve_endpoint")
        return Served(Endpoint(self.runtime, name), task, task.registered.result())

    # operating

    @property
    def observers(self) -> Observers:
        """What observes the calls and requests of this connection, e.g. `here.observers.add(observer)`."""
        return self.runtime.observers

    def route(self, route: str, handler: Callable[..., Any]) -> None:
        """Answer requests to a path of the status port, e.g. `here.route("POST /sleep", sleep)`.

        Args:
            route, handler: see `StatusPort.route`. Calls of the handler use this connection.

        Raises:
            TypeError, ValueError: as `StatusPort.route` raises them.
        """
        self.runtime.status_port.route(route, handler, context=self._context())

    def health_check(self, function: Callable[[], Any], *, timeout_s: float = CHECK_S) -> None:
        """Let `/health` of the status port also ask a function.

        Args:
            function, timeout_s: see `StatusPort.health_check`. Calls of the function use this connection.

        Raises:
            TypeError, ValueError: as `StatusPort.health_check` raises them.
        """
        self.runtime.status_port.health_check(function, timeout_s=timeout_s, context=self._context())

    def _context(self) -> contextvars.Context:
        """A copy of the present context, in which `trd.here()` is this connection."""
        context = contextvars.copy_context()
        context.run(_here.set, self)
        return context

    # life

    async def __aenter__(self) -> Connection:
        self._entered = _here.set(self)
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._entered is not None:
            _reset(self._entered)
        await self.close()

    @contextmanager
    def as_here(self) -> Iterator[None]:
        """Let `trd.call`, `trd.stream` and `trd.here` use this connection inside a `with` block. It stays open."""
        token = _here.set(self)
        try:
            yield
        finally:
            _reset(token)

    async def close(self) -> None:
        """Drain what is served and wait for the requests of `send`, together at most `TRD_DRAIN_TIMEOUT_S`.

        Then cancel open calls, and close everything.
        """
        try:
            if self._owned:
                await self.runtime.close()
        finally:
            for target in self._targets.values():
                target.close()
            for known in (self._targets, self._called, self._streamed):
                known.clear()  # If the program gave its own runtime, its handlers still run.

    def __repr__(self) -> str:
        return f"<Connection of {self.runtime!r}>"


def _reset(token: contextvars.Token[Connection | None]) -> None:
    try:
        _here.reset(token)
    except ValueError:  # The block was left in another context than it was entered in, for example by a fixture.
        pass


def here() -> Connection:
    """The connection of the handler that runs here, or of the `async with trd.connect()` around this code.

    Raises:
        RuntimeError: this code runs neither in a handler nor in such a block.
    """
    found = _here.get()
    if found is None:
        raise RuntimeError("there is no connection here: call from a handler, or in `async with trd.connect()`")
    return found

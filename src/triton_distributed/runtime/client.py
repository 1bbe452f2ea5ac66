"""The client of one endpoint."""

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop as _running_loop
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from random import Random as Rng
from typing import Any, Literal, Unpack, overload

from triton_distributed.annotated import Annotated
from triton_distributed.calling.call import Call
from triton_distributed.calling.candidates import Candidates
from triton_distributed.calling.conditions import UNCONDITIONAL
from triton_distributed.calling.hedge import AnotherInstance, first_answer
from triton_distributed.calling.items import ItemDecoder
from triton_distributed.calling.response_stream import ResponseStream
from triton_distributed.calling.services import Limit, Services
from triton_distributed.calling.unary import answer
from triton_distributed.context import current
from triton_distributed.errors import TooFewInstances
from triton_distributed.names import EndpointName, Instance
from triton_distributed.observe import CallStats, OutlierStats
from triton_distributed.observe.observer import Observers
from triton_distributed.payload.codec import Message, encode
from triton_distributed.routing.load import LoadBook
from triton_distributed.routing.policies import (
    Direct,
    MetadataPolicy,
    Policy,
    Random,
    RoundRobin,
    WithMetadata,
    policy_named,
)
from triton_distributed.runtime.conditions import conditions_of, seconds
from triton_distributed.runtime.instances import InstanceStatus, of_candidates
from triton_distributed.runtime.metadata import visible
from triton_distributed.runtime.observing import observed
from triton_distributed.runtime.options import CallOptions
from triton_distributed.system import placed
from triton_distributed.transport.pool import SessionPool

# Types that are never streams of requests. Checking the abstract class takes longer than encoding a small request.
_NO_STREAMS = frozenset({type(None), bool, int, float, str, bytes, list, dict, tuple})


class Client:
    """Calls one endpoint's instances. Made by `await endpoint.client()`, for the event loop of its runtime.

    `generate` uses the client's policy; `random`, `round_robin` and `direct` are the same call with another one.

    Args of every call:
        request: any value that can be encoded: plain values, dataclasses, Structs, pydantic models, arrays, buffers. An
            async iterator sends a stream of requests to a handler that takes one. `generate` takes the request before
            it returns: later changes do not reach the handler. `call` does not copy large arrays and buffers: they must
            not change until it returns. Items of a request stream must not change until the iterator is asked for the
            next one.
        annotated: True (the default) yields items as `Annotated`; False or None yields the values themselves and skips
            items that are None.
        options: see `CallOptions`.

    Raises, from the call itself:
        ValueError: the timeout is not a number of seconds, or the metadata is too large.
        TypeError: there is no such option; or the request contains a value that cannot be encoded, and the text names
            the path to it.
        ConfigError: there is no policy of this name.
        ForkError, RuntimeClosed, WrongLoop: the runtime cannot be used here, or is closed.
    """

    def __init__(
        self,
        services: Services,
        policy: str | Policy | MetadataPolicy,
        rng: Rng,
        looks_elsewhere: bool,
        observers: Observers,
    ) -> None:
        self._services = services
        self._rng = rng
        self._observers = observers
        self._observed = observers.present
        self._looks_elsewhere = looks_elsewhere  # There may be instances in folders that this runtime does not watch.
        self._policy = policy_named(policy, rng)
        self._round_robin = self._policy if isinstance(self._policy, RoundRobin) else RoundRobin(rng)
        self._random = Random(rng)
        self._named: dict[str, Policy] = {"round_robin": self._round_robin, "random": self._random}

    @overload
    def generate(
        self,
        request: Any,
        annotated: Literal[True] = True,
        *,
        policy: str | Policy | MetadataPolicy | None = None,
        **options: Unpack[CallOptions],
    ) -> ResponseStream[Annotated]: ...

    @overload
    def generate(
        self,
        request: Any,
        annotated: bool | None,
        *,
        policy: str | Policy | MetadataPolicy | None = None,
        **options: Unpack[CallOptions],
    ) -> ResponseStream[Any]: ...

    def generate(
        self,
        request: Any,
        annotated: bool | None = True,
        *,
        policy: str | Policy | MetadataPolicy | None = None,
        **options: Unpack[CallOptions],
    ) -> ResponseStream[Any]:
        """Call an instance chosen by the client's policy, or by `policy`: a name or a function, as for `client()`."""
        chooses = self._policy if policy is None else self.policy_of(policy)
        return ResponseStream(self.start("Client.generate", request, chooses, bool(annotated), False, options))

    @overload
    def round_robin(
        self, request: Any, annotated: Literal[True] = True, **options: Unpack[CallOptions]
    ) -> ResponseStream[Annotated]: ...

    @overload
    def round_robin(
        self, request: Any, annotated: bool | None, **options: Unpack[CallOptions]
    ) -> ResponseStream[Any]: ...

    def round_robin(
        self, request: Any, annotated: bool | None = True, **options: Unpack[CallOptions]
    ) -> ResponseStream[Any]:
        """Call the instances in turn."""
        return ResponseStream(
            self.start("Client.round_robin", request, self._round_robin, bool(annotated), False, options)
        )

    @overload
    def random(
        self, request: Any, annotated: Literal[True] = True, **options: Unpack[CallOptions]
    ) -> ResponseStream[Annotated]: ...

    @overload
    def random(self, request: Any, annotated: bool | None, **options: Unpack[CallOptions]) -> ResponseStream[Any]: ...

    def random(
        self, request: Any, annotated: bool | None = True, **options: Unpack[CallOptions]
    ) -> ResponseStream[Any]:
        """Call an instance chosen at random."""
        return ResponseStream(self.start("Client.random", request, self._random, bool(annotated), False, options))

    @overload
    def direct(
        self, request: Any, instance_id: int, annotated: Literal[True] = True, **options: Unpack[CallOptions]
    ) -> ResponseStream[Annotated]: ...

    @overload
    def direct(
        self, request: Any, instance_id: int, annotated: bool | None, **options: Unpack[CallOptions]
    ) -> ResponseStream[Any]: ...

    def direct(
        self, request: Any, instance_id: int, annotated: bool | None = True, **options: Unpack[CallOptions]
    ) -> ResponseStream[Any]:
        """Call the instance with this id."""
        chooses = Direct(int(instance_id), self.candidates.name.path, self._known)
        return ResponseStream(self.start("Client.direct", request, chooses, bool(annotated), False, options))

    async def call(
        self,
        request: Any,
        *,
        policy: str | Policy | MetadataPolicy | None = None,
        hedge_after_s: float | None = None,
        **options: Unpack[CallOptions],
    ) -> Any:
        """Call and return the single value of the answer, never as `Annotated`.

        Args:
            request: the request; see `Client`.
            policy: a name or a function, as for `client()`; by default the client's own policy.
            hedge_after_s: seconds without an answer after which the request is also sent to a second instance. The
                first answer counts and the other handler is cancelled. It needs `idempotent=True` and shares the
                budget of retries.
            options: see `CallOptions`.

        Raises:
            NotUnary: the handler answered with no item, or with more than one.
            ValueError: a hedged call is not idempotent, or its request is a stream.
        """
        chooses = self.policy_of(policy)
        if hedge_after_s is not None:
            return await self.hedged("Client.call", request, chooses, None, False, hedge_after_s, options)
        return await answer(self.start("Client.call", request, chooses, False, True, options))

    async def hedged(
        self,
        operation: str,
        request: Any,
        policy: Policy,
        decoder: ItemDecoder | None,
        waits: bool,
        hedge_after_s: float,
        options: Mapping[str, Any],
    ) -> Any:
        """Call, and call a second instance if there is no answer within `hedge_after_s` seconds; see `call`."""
        hedge_after_s = seconds(hedge_after_s, "hedge_after_s", "no second attempt")
        if not options.get("idempotent"):
            raise ValueError("hedge_after_s= may run two handlers: pass idempotent=True if that does no harm")
        if request.__class__ not in _NO_STREAMS and isinstance(request, AsyncIterable):
            raise ValueError("hedge_after_s=: a streamed request cannot be sent a second time")
        call = self.start(operation, request, policy, False, True, options, None, decoder, waits)

        def second() -> Call | None:
            if call.stopping or len(self.candidates.instances) < 2 or not self._services.take_retry():
                return None
            # The body is the encoded request of the first attempt; `request` may have changed since.
            other = AnotherInstance(call.policy, call)
            self._services.stats.hedges += 1
            return self.start(operation, request, other, False, True, options, call.body, decoder)

        return await first_answer(call, hedge_after_s, second, answer)

    def limit(self, limit: Limit | None) -> None:
        """Limit the choice of instances at each attempt from now on; None for no limit."""
        self._services.limit = limit

    def policy_of(self, policy: str | Policy | MetadataPolicy | None) -> Policy:
        """The policy of one call. A named one is made once, so that its state lasts from call to call."""
        if policy is None:
            return self._policy
        if not isinstance(policy, str):
            return policy_named(policy, self._rng)
        known = self._named.get(policy)
        if known is None:
            known = self._named[policy] = policy_named(policy, self._rng)
        return known

    def start(
        self,
        operation: str,
        request: Any,
        policy: Policy,
        annotated: bool,
        unary: bool,
        options: Mapping[str, Any],
        encoded: bytes | Message | None = None,
        decoder: ItemDecoder | None = None,
        waits: bool = False,
    ) -> Call:
        """Start a call: the one entry of all public methods, of this class and of the native API.

        Args:
            operation: the name of the public method, for the error about an unknown option.
            request: the request.
            policy: chooses the instance.
            annotated, unary, decoder, waits: see `Call`.
            options: the options, as the caller gave them.
            encoded: the encoded request, if it was encoded before.

        Raises:
            TypeError: there is no such option; and all errors listed at `Client`.
        """
        services = self._services
        if services.core.unusable or _running_loop() is not services.loop:
            services.core.check("a call")
        request_stream: AsyncIterator[Any] | None = None
        body: bytes | Message
        if encoded is not None:
            body = encoded
        elif request.__class__ not in _NO_STREAMS and isinstance(request, AsyncIterable):
            if options.get("resume"):
                raise ValueError("resume=True: a streamed request cannot be sent a second time")
            request_stream, body = aiter(request), b""
        else:
            body = encode(request, "request")
            if isinstance(body, Message) and not unary:
                body = body.owned(placed.find)
        conditions, serving = UNCONDITIONAL, current.get()
        if options or serving is not None:
            context = options.get("context")
            if serving is not None and (serving.over or (context is not None and context.independent)):
                serving = None
            conditions = conditions_of(operation, options, serving, services.loop)
            if isinstance(policy, WithMetadata):
                policy = policy.of_call(visible(context, options.get("metadata"), serving))
        if self._observed:
            conditions = observed(self._observers, self.name, unary, encoded is not None, options, serving, conditions)
        call = Call(services, request, body, request_stream, policy, annotated, unary, conditions, decoder, waits)
        call.start()
        return call

    def endpoint_ids(self) -> list[int]:
        """The ids of the present instances."""
        return [each.id for each in self.candidates.table.instances]

    instance_ids = endpoint_ids

    def instances(self) -> list[InstanceStatus]:
        """The present instances, ordered by id, each with its state and its load.

        The first use asks the workers to which this runtime is connected for their load, so `load` is None until a
        moment later, and for a worker without a connection. Reports then come at most every 100 ms, as long as this
        method or a policy uses them.
        """
        self._services.core.check("instances")
        return of_candidates(self.candidates)

    def wait_for_endpoints(self, count: int = 1, timeout: float | None = None) -> asyncio.Future[list[int]]:
        """A future that is done when at least `count` instances exist; its result is the ids of the instances.

        Args:
            count: the number of instances.
            timeout: seconds; None for no limit.

        Raises (from the future):
            TooFewInstances: there are fewer; a TimeoutError that names the endpoint and what was found.
            RuntimeClosed: the runtime was closed meanwhile.

        Raises (from the call itself):
            ValueError: the count or the timeout is invalid.
            ForkError, RuntimeClosed, WrongLoop.
        """
        if type(count) is not int or count < 1:
            raise ValueError(f"count={count!r}: must be a whole number of at least 1")
        if timeout is not None:
            timeout = seconds(timeout)
        self._services.core.check("wait_for_instances")
        loop = self._services.loop
        if len(ids := self.endpoint_ids()) >= count:
            known: asyncio.Future[list[int]] = loop.create_future()
            known.set_result(ids)
            return known
        waiting = loop.create_task(self._wait(count, timeout))
        # Reading the exception prevents asyncio's warning if the task is never awaited.
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
        return waiting

    wait_for_instances = wait_for_endpoints

    async def _wait(self, count: int, timeout: float | None) -> list[int]:
        core, where, name = self._services.core, self._services.where, self.name
        elsewhere = (lambda: core.elsewhere(name)) if self._looks_elsewhere else None
        try:
            async with asyncio.timeout(timeout):
                await self.candidates.open()
                await self.candidates.wait(where, elsewhere, count)
        except TimeoutError:
            found = len(self.endpoint_ids())
            others = "" if found or elsewhere is None else elsewhere()
            raise TooFewInstances(name.path, where, count, found, max(0.0, timeout or 0.0), others) from None
        return self.endpoint_ids()

    def _known(self) -> Mapping[int, Instance]:
        return self.candidates.table.by_id

    @property
    def candidates(self) -> Candidates:
        """The instances of the endpoint, shared by all clients of it in this runtime."""
        return self._services.candidates

    @property
    def pool(self) -> SessionPool:
        """The runtime's sessions to workers."""
        return self._services.pool

    @property
    def name(self) -> EndpointName:
        """The name of the endpoint that this client calls."""
        return self.candidates.name

    @property
    def load(self) -> LoadBook:
        """The open streams of this runtime on each instance of the endpoint."""
        return self._services.load

    @property
    def closing(self) -> bool:
        """Whether the runtime is shutting down or closed."""
        return self._services.core.closing

    @property
    def stats(self) -> CallStats:
        """Counters of this client's calls."""
        return self._services.stats

    @property
    def outlier_stats(self) -> OutlierStats:
        """Counters of ejected instances, shared by all clients of the endpoint in this runtime."""
        return self._services.ejector.stats

    def __repr__(self) -> str:
        out = f" ({self.outlier_stats.out} ejected)" if self.outlier_stats.out else ""
        return (
            f"<Client of {self.candidates.name}, {len(self.candidates.table.instances)} instances{out}, {self.stats!r}>"
        )

"""The client of one endpoint, as Dynamo's programs use it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, NoReturn

from triton_distributed import names
from triton_distributed.compat.dynamo.contexts import Context
from triton_distributed.compat.dynamo.llm.exceptions import translated
from triton_distributed.compat.dynamo.streams import AsyncResponseStream
from triton_distributed.runtime import Client as NativeClient
from triton_distributed.runtime import ResponseStream, current_context


class RouterMode(enum.Enum):
    """How a client chooses an instance. `KV`, `Direct` and `DeviceAwareWeighted` are not here yet: see `policy`."""

    RoundRobin = 0
    Random = 1
    PowerOfTwoChoices = 2
    KV = 3
    Direct = 4
    LeastLoaded = 5
    DeviceAwareWeighted = 6

    def __int__(self) -> int:
        return int(self.value)

    def __repr__(self) -> str:
        return f"RouterMode.{self.name}"

    @property
    def policy(self) -> str:
        """The policy of this runtime: the same one, or the nearest."""
        return _POLICIES.get(self.name, "round_robin")

    @property
    def exact(self) -> bool:
        """Whether the policy does the same. `Direct` needs an instance id, so without one it takes them in turn."""
        return self.name in _POLICIES and self is not RouterMode.DeviceAwareWeighted


_POLICIES = {
    "RoundRobin": "round_robin",
    "Random": "random",
    "PowerOfTwoChoices": "p2c",
    "LeastLoaded": "least_loaded",
    "Direct": "round_robin",
    "DeviceAwareWeighted": "least_loaded",
}


class TransportType:
    """How an instance is reached.

    Attributes:
        kind: `tcp` for direct connections of any kind, `nats_tcp` over NATS.
        address: its first address.
    """

    def __init__(self, kind: str, address: str) -> None:
        self.kind = kind
        self.address = address


class Instance:
    """One registered instance of an endpoint, as discovery knew it when the object was made.

    Attributes:
        instance_id: its id.
        namespace, component, endpoint: the parts of its endpoint's name.
        transport: how it is reached.
        metadata: the plain values that its worker publishes.
        device_type: the `device_type` of that metadata, or None.
    """

    def __init__(self, found: names.Instance) -> None:
        name, address = found.endpoint, found.addresses[0] if found.addresses else ""
        self.instance_id = found.id
        self.namespace, self.component, self.endpoint = name.namespace, name.component, name.endpoint
        self.transport = TransportType("nats_tcp" if address.startswith("nats:") else "tcp", address)
        self.metadata: Mapping[str, Any] = found.metadata
        self.device_type: str | None = found.metadata.get("device_type")

    def __str__(self) -> str:
        return f"{self.namespace}/{self.component}/{self.endpoint}/{self.instance_id}"

    def __repr__(self) -> str:
        return f"Instance({self})"


class Client:
    """Calls the instances of one endpoint. Made by `await endpoint.client()`.

    Args of every call:
        request: any plain value; an async iterator streams requests to a bidirectional endpoint.
        annotated: True (the default) yields `Annotated` items; False or None yields their data, without None.
        context: its id and metadata are sent, and its stop ends the stream. Without one a call is independent, also of
            the request in whose handler it is made.

    Raises, from `await` and from iteration: see `AsyncResponseStream`.
    """

    def __init__(self, native: NativeClient) -> None:
        self._native = native

    def _started(
        self, start: Any, request: Any, annotated: bool | None, context: Context | None, *instance: int
    ) -> AsyncResponseStream:
        options: dict[str, Any] = {}
        if context is not None:
            if not isinstance(context, Context):
                raise TypeError(f"context={context!r}: must be a Context of this module")
            options = {"context": context.native, "metadata": context.metadata.copy()}
        elif (serving := current_context()) is not None:
            options["context"] = serving.detached()
        call: ResponseStream = start(request, *instance, annotated=True, **options)
        return AsyncResponseStream(call, bool(annotated), context)

    def generate(
        self, request: Any, annotated: bool | None = True, context: Context | None = None
    ) -> AsyncResponseStream:
        """Call an instance chosen by the client's router mode."""
        return self._started(self._native.generate, request, annotated, context)

    def round_robin(
        self, request: Any, annotated: bool | None = True, context: Context | None = None
    ) -> AsyncResponseStream:
        """Call the instances in turn."""
        return self._started(self._native.round_robin, request, annotated, context)

    def random(
        self, request: Any, annotated: bool | None = True, context: Context | None = None
    ) -> AsyncResponseStream:
        """Call an instance chosen at random."""
        return self._started(self._native.random, request, annotated, context)

    def direct(
        self, request: Any, instance_id: int, annotated: bool | None = True, context: Context | None = None
    ) -> AsyncResponseStream:
        """Call the instance with this id."""
        return self._started(self._native.direct, request, annotated, context, instance_id)

    def device_aware_weighted(
        self, request: Any, annotated: bool | None = True, context: Context | None = None
    ) -> AsyncResponseStream:
        """Call the instance with the fewest open streams: this runtime does not weigh devices."""

        def start(request: Any, **options: Any) -> ResponseStream:
            return self._native.generate(request, policy="least_loaded", **options)

        return self._started(start, request, annotated, context)

    def instance_ids(self) -> list[int]:
        """The ids of the present instances."""
        return self._native.instance_ids()

    def instances(self) -> list[Instance]:
        """The present instances."""
        return [Instance(each) for each in self._native.candidates.table.instances]

    async def wait_for_instances(self) -> list[int]:
        """Wait for a first instance. Returns the ids of the present instances."""
        try:
            return list(await self._native.wait_for_instances())
        except Exception as error:
            raise translated(error) from None

    async def wait_for_instance_by_runtime_data(self, key: str, value: str, timeout_s: float | None = None) -> int:
        """Not here yet.

        Raises:
            NotImplementedError: this runtime has no model cards.
        """
        _no_model_cards("wait_for_instance_by_runtime_data")

    async def wait_for_instances_by_runtime_data(
        self, key: str, value: str, min_count: int, timeout_s: float | None = None
    ) -> list[int]:
        """Not here yet.

        Raises:
            NotImplementedError: this runtime has no model cards.
        """
        _no_model_cards("wait_for_instances_by_runtime_data")

    def __repr__(self) -> str:
        return repr(self._native)


def _no_model_cards(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name}: this runtime has no model cards; publish values with serve_endpoint(metadata=…) or "
        "update_metadata({…}) of the native endpoint, and read them from client.instances()"
    )

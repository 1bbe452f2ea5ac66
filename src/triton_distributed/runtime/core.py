"""The part of a runtime that its clients need."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any, Protocol

from triton_distributed.calling.candidates import Candidates
from triton_distributed.calling.prober import Prober
from triton_distributed.config import Config
from triton_distributed.discovery import Discovery
from triton_distributed.names import EndpointName
from triton_distributed.runtime.events import RuntimeEvents
from triton_distributed.runtime.observing import Observing
from triton_distributed.transport.pool import SessionPool


class Core(Protocol):
    """A runtime as its clients see it; see `runtime.distributed.DistributedRuntime`."""

    config: Config
    rng: random.Random
    instance_id: int
    discovery: Discovery
    pool: SessionPool
    prober: Prober
    events: RuntimeEvents
    unusable: bool
    observers: Observing

    @property
    def closing(self) -> bool: ...

    @property
    def looks_elsewhere(self) -> bool: ...

    def event_loop(self) -> asyncio.AbstractEventLoop: ...

    def check(self, operation: str) -> None: ...

    def check_loop(self, operation: str) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]: ...

    def elsewhere(self, name: EndpointName | None) -> str: ...

    def candidates(self, name: EndpointName) -> Candidates: ...

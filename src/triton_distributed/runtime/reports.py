"""What a worker says of itself in a few words: its build, and the state and load of each endpoint that it serves."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Iterable

import msgspec

from triton_distributed import __version__
from triton_distributed.compiled import is_compiled
from triton_distributed.names import EndpointName
from triton_distributed.runtime.worker import Worker
from triton_distributed.serving.endpoint import ServedEndpoint


class ServedReport(msgspec.Struct, frozen=True):
    """One endpoint that a worker serves.

    Attributes:
        endpoint: its name.
        instance_id: the id under which the worker registers it.
        state: `starting` (discovery has not accepted it yet), `serving`, `paused` or `draining`.
        addresses: the addresses that the worker publishes.
        age_s: seconds since the worker began to serve it.
        running, waiting: requests that were admitted and have not ended, and requests in its queue.
        max_inflight, max_queue: its limits; `max_inflight` is None if there is no limit.
    """

    endpoint: EndpointName
    instance_id: int
    state: str
    addresses: tuple[str, ...]
    age_s: float
    running: int
    waiting: int
    max_inflight: int | None
    max_queue: int


class WorkerReport(msgspec.Struct, frozen=True):
    """A worker and its endpoints.

    Attributes:
        version: the version of this package.
        compiled: whether its hot path is compiled.
        python: the version of Python.
        pid: the number of its process.
        host: the name of its host.
        endpoints: what it serves.
        running, max_requests: requests of all its endpoints that were admitted and have not ended, and their limit
            (`TRD_MAX_REQUESTS`).
        problems: its health checks and canaries that have failed. Empty without a status port.
        replica: the number of its process among the replicas of a program; None if it is not a replica.
    """

    version: str
    compiled: bool
    python: str
    pid: int
    host: str
    endpoints: tuple[ServedReport, ...]
    running: int
    max_requests: int
    problems: tuple[str, ...] = ()
    replica: int | None = None  # Earlier versions do not report it.


def report_of(worker: Worker, problems: Iterable[str] = ()) -> WorkerReport:
    """Report a worker. It takes some microseconds for each endpoint, and does no I/O."""
    return WorkerReport(
        version=__version__,
        compiled=is_compiled(),
        python=platform.python_version(),
        pid=os.getpid(),
        host=socket.gethostname(),
        endpoints=tuple(map(_of_endpoint, worker.server.endpoints)),
        running=worker.server.slots.taken,
        max_requests=worker.server.slots.most,
        problems=tuple(problems),
        replica=worker.replica,
    )


def _of_endpoint(endpoint: ServedEndpoint) -> ServedReport:
    gate, instance = endpoint.gate, endpoint.instance
    return ServedReport(
        endpoint=endpoint.name,
        instance_id=instance.id,
        state=endpoint.state,
        addresses=instance.addresses,
        age_s=max(0.0, time.time() - instance.since),
        running=len(gate.running),
        waiting=len(gate.queue),
        max_inflight=gate.queue.max_inflight,
        max_queue=gate.queue.max_queue,
    )

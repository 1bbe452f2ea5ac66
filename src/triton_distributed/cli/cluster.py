"""Asks the workers of the system about themselves; see `runtime.inspection`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from triton_distributed.config import Config
from triton_distributed.errors import ConnectionFailed, TritonError
from triton_distributed.runtime import Client, DistributedRuntime, ResponseStream
from triton_distributed.runtime.backends import make_discovery
from triton_distributed.runtime.inspection import INSPECT, WorkersDiscovery

ASKED_AT_ONCE = 64
"""Workers asked at a time: well below the usual limit of 256 to 1024 open files of a process."""


class Answer(NamedTuple):
    """What one worker answered.

    Attributes:
        instance_id: the worker.
        items: the items of its answer; empty if it did not answer.
        reason: why it did not answer; empty if it did.
        timed_out: it did not answer in time, but it may do later.
    """

    instance_id: int
    items: list[Any]
    reason: str
    timed_out: bool = False


class Cluster:
    """The workers that discovery lists.

    Args:
        runtime: a runtime whose discovery is a `WorkersDiscovery`.
        client: its client of the reserved endpoint.
        timeout_s: seconds to wait for each answer.
    """

    def __init__(self, runtime: DistributedRuntime, client: Client, timeout_s: float) -> None:
        self.runtime = runtime
        self._client = client
        self._timeout_s = timeout_s
        self._places = asyncio.Semaphore(ASKED_AT_ONCE)

    def workers(self) -> list[int]:
        """The instance ids of the workers that are listed now."""
        return sorted(self._client.instance_ids())

    async def ask(self, workers: Iterable[int], about: str, **details: Any) -> list[Answer]:
        """Ask workers at the same time, and wait for their answers.

        Args:
            workers: instance ids.
            about, details: see `inspection.Question`.
        """
        question = {"about": about, **details}
        return await asyncio.gather(*(self._ask(each, question) for each in workers))

    def follow(self, worker: int, about: str, **details: Any) -> ResponseStream:
        """Ask one worker, whose answer goes on until the stream is cancelled.

        Args:
            worker: its instance id.
            about, details: see `inspection.Question`.
        """
        return self._client.direct({"about": about, **details}, worker, annotated=False)

    async def _ask(self, worker: int, question: dict[str, Any]) -> Answer:
        async with self._places:
            try:
                stream = self._client.direct(question, worker, annotated=False, timeout=self._timeout_s)
                return Answer(worker, [each async for each in stream], "")
            except ConnectionFailed as error:
                return Answer(worker, [], "; ".join(f"{address}: {reason}" for address, reason in error.attempts))
            except TimeoutError:
                words = f"it did not answer within {self._timeout_s:g} s: its event loop may be stuck"
                return Answer(worker, [], words, timed_out=True)
            except TritonError as error:
                return Answer(worker, [], str(error))


@asynccontextmanager
async def cluster(config: Config, timeout_s: float) -> AsyncIterator[Cluster]:
    """Open the cluster that the settings name.

    Raises:
        DiscoveryError: discovery cannot be read.
    """
    discovery = WorkersDiscovery(make_discovery(config))
    async with DistributedRuntime(config=config, discovery=discovery) as runtime:
        name = INSPECT
        client = await runtime.namespace(name.namespace).component(name.component).endpoint(name.endpoint).client()
        yield Cluster(runtime, client, timeout_s)

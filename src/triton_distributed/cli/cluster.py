"""Asks the workers of the system about themselves; see `runtime.inspection`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from triton_distributed.cli.health import Answer, Row, rows
from triton_distributed.cli.instances import absence, dialable, listed
from triton_distributed.config import Config
from triton_distributed.errors import ConnectionFailed, InvalidRequest, TritonError
from triton_distributed.names import INSPECT, Instance
from triton_distributed.runtime import Client, DistributedRuntime, ResponseStream
from triton_distributed.runtime.backends import make_discovery, make_elsewhere
from triton_distributed.runtime.inspection import WorkersDiscovery

ASKED_AT_ONCE = 64
"""Workers asked at a time: well below the usual limit of 256 to 1024 open files of a process."""


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

    async def instances(self) -> list[Instance]:
        """All instances of all endpoints that are listed now, by endpoint and id.

        Raises:
            DiscoveryError: discovery cannot be read.
        """
        return await listed(self.runtime.discovery)

    async def rows(self, instances: Sequence[Instance]) -> list[Row]:
        """Ask the workers of these instances for their state, and wait for their answers."""
        absent = {
            each.id: Answer(each.id, [], absence(each), reached=False) for each in instances if not dialable(each)
        }
        answers = await self.ask({each.id for each in instances} - absent.keys(), "worker")
        return rows(instances, absent | {each.instance_id: each for each in answers})

    def asked(self) -> str:
        """Text about the place that was asked, and about live instances that it does not list."""
        found = make_elsewhere(self.runtime.config)
        return f"{self.runtime.discovery.where} was asked{'' if found is None else found.words(None)}"

    def workers(self) -> list[int]:
        """The instance ids of the workers that are listed now."""
        return sorted(self._client.instance_ids())

    async def ask(self, workers: Iterable[int], about: str, **details: Any) -> list[Answer]:
        """Ask workers at the same time, and wait for their answers.

        Args:
            workers: instance ids.
            about, details: see `answering.Question`.
        """
        question = {"about": about, **details}
        return await asyncio.gather(*(self._ask(each, question) for each in workers))

    def follow(self, worker: int, about: str, **details: Any) -> ResponseStream:
        """Ask one worker, whose answer goes on until the stream is cancelled.

        Args:
            worker: its instance id.
            about, details: see `answering.Question`.
        """
        return self._client.direct({"about": about, **details}, worker, annotated=False)

    async def _ask(self, worker: int, question: dict[str, Any]) -> Answer:
        async with self._places:
            try:
                # A little longer than the time to connect, whose error says more.
                stream = self._client.direct(question, worker, annotated=False, timeout=1.2 * self._timeout_s)
                return Answer(worker, [each async for each in stream], "")
            except ConnectionFailed as error:
                reason = "; ".join(f"{address}: {_without_setting(reason)}" for address, reason in error.attempts)
            except TimeoutError:
                words = f"it did not answer within {self._timeout_s:g} s: its event loop may be stuck"
                return Answer(worker, [], words, timed_out=True, reached=False)
            except InvalidRequest as error:
                return Answer(worker, [], str(error))
            except TritonError as error:
                reason = str(error)
            return Answer(worker, [], reason, reached=False)


def _without_setting(reason: str) -> str:
    """Why a connection failed, without the setting that commands with --timeout do not use."""
    return reason.replace(", see TRD_CONNECT_TIMEOUT_S", "")


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

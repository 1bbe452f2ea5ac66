"""The statistics of NATS services, in which the original's workers tell their load."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from triton_distributed.llm.original.messages import LOAD_METRICS, Load, ServiceStats, StatsEndpoint
from triton_distributed.llm.original.outlet import runtime_of
from triton_distributed.runtime.component import Component

logger = logging.getLogger("triton_distributed.llm")

EVERY_S = 1.0
"""Seconds between two questions to all workers."""

_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(ServiceStats)


@contextlib.asynccontextmanager
async def answering(component: Component, load: Callable[[], Load]) -> AsyncIterator[None]:
    """Answer the questions of the original's routers with the load of this worker.

    Raises:
        BrokerError: NATS cannot be reached.
    """
    runtime = runtime_of(component)
    service, id = component.service_name(), runtime.instance_id
    subject = f"{service}.{LOAD_METRICS}-{id:x}"
    started = datetime.now(UTC).isoformat()
    client = await runtime.nats.client()

    async def answer(message: Any) -> None:
        if message.reply:
            endpoints = [StatsEndpoint(LOAD_METRICS, subject, load())]
            with contextlib.suppress(Exception):  # The next question comes in a second.
                await client.publish(
                    message.reply, _encode(ServiceStats(service, f"{id:x}", endpoints, started=started))
                )

    subscribed = await client.subscribe(f"$SRV.STATS.{service}", cb=answer)
    try:
        with contextlib.suppress(Exception):  # The connection is lost at this moment.
            await runtime.nats.settle(EVERY_S)
        yield
    finally:
        with contextlib.suppress(Exception):  # The connection was closed.
            await subscribed.unsubscribe()


async def ask(component: Component, found: Callable[[int, Load], None], asked: Callable[[], None]) -> None:
    """Ask all workers for their load, once a second, for ever.

    Args:
        found: called with a worker's id and its load.
        asked: called before each question.

    Raises:
        BrokerError: NATS cannot be reached.
    """
    client = await runtime_of(component).nats.client()
    service = component.service_name()
    inbox = client.new_inbox()

    async def arrived(message: Any) -> None:
        if not message.data:  # The server says that there is no such service.
            return
        try:
            for each in _decoder.decode(message.data).endpoints:
                if each.data is not None:
                    found(each.worker_id, each.data)
        except (msgspec.DecodeError, ValueError) as error:
            logger.warning("statistics of the service %s are skipped: %s", service, error)

    subscribed = await client.subscribe(inbox, cb=arrived)
    try:
        while True:
            asked()
            with contextlib.suppress(Exception):  # The connection is lost at this moment.
                await client.publish(f"$SRV.STATS.{service}", b"", reply=inbox)
            await asyncio.sleep(EVERY_S)
    finally:
        with contextlib.suppress(Exception):
            await subscribed.unsubscribe()

"""Publishing under one subject of a component: plain JSON, in order, from any thread."""

from __future__ import annotations

import asyncio
import logging
from asyncio import _get_running_loop as _running_loop  # A C function, also under uvloop; public except in name.
from collections import deque
from typing import Any

import msgspec

from triton_distributed.errors import RuntimeClosed, TritonError
from triton_distributed.quiet import Quiet
from triton_distributed.runtime.component import Component
from triton_distributed.system.loop_thread import tell

logger = logging.getLogger("triton_distributed.llm")

MOST_WAITING = 65_536
"""Events that wait to be published; of more the oldest are lost."""

_encode = msgspec.json.Encoder().encode
_complaints = Quiet(5.0)


def runtime_of(component: Component) -> Any:
    """The `DistributedRuntime` of a component."""
    return component._runtime


class Outlet:
    """Publishes events of a component, without waiting.

    The events are not those of `Component.publish`: they are plain JSON, which the original's programs read, too.

    Args:
        component: the component.
        event: the event's name.
        latest: an event replaces one that was not published yet.
    """

    def __init__(self, component: Component, event: str, *, latest: bool = False) -> None:
        self._runtime = runtime_of(component)
        self._subject = component.event_subject(event)
        self._waiting: deque[bytes] = deque(maxlen=1 if latest else MOST_WAITING)
        self._publishing: asyncio.Task[None] | None = None

    def send(self, event: msgspec.Struct) -> None:
        """Publish an event soon.

        Raises:
            RuntimeClosed: the runtime was closed.
        """
        runtime, data = self._runtime, _encode(event)
        if runtime.unusable:
            raise RuntimeClosed("publish")
        loop = runtime.event_loop()
        if _running_loop() is loop:
            self._push(data)
        elif not tell(loop, self._push, data):
            raise RuntimeClosed("publish")

    def _push(self, data: bytes) -> None:
        self._waiting.append(data)
        if self._publishing is None and not self._runtime.unusable:
            self._publishing = self._runtime.spawn(self._publish())

    async def _publish(self) -> None:
        try:
            while self._waiting:
                data = self._waiting.popleft()
                try:
                    await self._runtime.events.plane().publish(self._subject, data)
                except RuntimeClosed:
                    return
                except TritonError as error:
                    if _complaints.due(self._subject) is not None:
                        logger.warning("an event of %s is lost: %s", self._subject, error)
        finally:
            self._publishing = None

    async def flushed(self) -> None:
        """Wait until everything that was sent before is published."""
        while self._publishing is not None:
            await asyncio.wait([self._publishing])

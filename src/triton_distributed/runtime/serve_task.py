"""The task that `serve_endpoint` returns: it knows when its endpoint was registered, and whether it was awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any

from triton_distributed.names import EndpointName, Instance


class ServeTask(asyncio.Task[None]):
    """The task that serves an endpoint.

    Attributes:
        endpoint: its name.
        registered: done, with the instance, when discovery has accepted it; never done if that fails.
        awaited: whether the program has awaited the task, directly or through `gather` or `wait`, or has inspected it.
    """

    def __init__(
        self, work: Coroutine[Any, Any, None], endpoint: EndpointName, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(work, loop=loop)
        self.endpoint = endpoint
        self.registered: asyncio.Future[Instance] = loop.create_future()
        self.awaited = False

    def __await__(self) -> Generator[Any, None, None]:
        self.awaited = True
        return super().__await__()

    __iter__ = __await__

    def add_done_callback(self, *args: Any, **kwargs: Any) -> None:
        self.awaited = True
        super().add_done_callback(*args, **kwargs)

    def done(self) -> bool:
        self.awaited = True
        return super().done()

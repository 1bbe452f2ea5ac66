"""Tries the handlers of idle endpoints with a request of the program's own, over a real connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import msgspec

from triton_distributed.errors import Draining, Overloaded, Paused, RuntimeClosed
from triton_distributed.observe import Outcome
from triton_distributed.serving.endpoint import ServedEndpoint


class Trier(Protocol):
    """Calls one endpoint of this worker."""

    async def call(self, request: Any, timeout_s: float) -> None: ...

    def close(self) -> None: ...


class Canaries:
    """The canaries of a worker's endpoints. All of it runs on the event loop, except for `results`.

    Args:
        loop: the loop.
        period_s: seconds without a request that ended well, after which a canary is sent; also its time limit.
        trier: makes the calls to an endpoint.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, period_s: float, trier: Callable[[ServedEndpoint], Trier]
    ) -> None:
        self._loop, self._period_s, self._trier = loop, period_s, trier
        self._canaries: dict[ServedEndpoint, _Canary] = {}

    def look(self, endpoints: Iterable[ServedEndpoint]) -> None:
        """Send the canaries that are due. Called about once a second."""
        served = {each for each in endpoints if each.canary is not msgspec.UNSET}
        for each in self._canaries.keys() - served:
            self._canaries.pop(each).close()
        for each in served:
            canary = self._canaries.get(each)
            if canary is None:
                canary = self._canaries[each] = _Canary(each, self._loop, self._trier(each))
            canary.look(self._period_s)

    def results(self) -> dict[str, dict[str, Any]]:
        """The last result of each canary, by the endpoint's path: `ok`, `age_s` and, if it failed, `reason`.

        `ok` is None as long as there is no result. Any thread may call this.
        """
        return {canary.path: canary.result() for canary in list(self._canaries.values())}

    def close(self) -> None:
        """Cancel the canaries under way."""
        for each in self._canaries.values():
            each.close()
        self._canaries.clear()


class _Canary:
    """The canary of one endpoint."""

    def __init__(self, endpoint: ServedEndpoint, loop: asyncio.AbstractEventLoop, trier: Trier) -> None:
        self.path = endpoint.name.path
        self._endpoint, self._loop, self._trier = endpoint, loop, trier
        self._ended_well = 0  # Requests of the endpoint, at the last look.
        self._at: float | None = None  # When the last result came, on the loop's clock.
        self._reason: str | None = None  # Why the last one failed; empty if it did not, None without a result.
        self._task: asyncio.Task[None] | None = None
        self._well_at = loop.time()  # When a request last ended well, or when the endpoint was first looked at.

    def look(self, period_s: float) -> None:
        if self._task is not None:
            return
        now, ended_well = self._loop.time(), self._endpoint.stats.ended[Outcome.OK]
        if ended_well != self._ended_well:  # Other requests end well, so the handler works.
            self._ended_well, self._at, self._reason = ended_well, now, ""
            self._well_at = now
        gate = self._endpoint.gate
        wanted = self._endpoint.listed and not gate.paused and not gate.draining
        if wanted and (self._at is None or now - self._at >= period_s):
            self._task = self._loop.create_task(self._send(period_s))
            self._task.add_done_callback(self._ended)

    async def _send(self, timeout_s: float) -> None:
        try:
            await self._trier.call(self._endpoint.canary, timeout_s)
        except (Draining, Paused, RuntimeClosed):
            return  # It says nothing about the handler.
        except Exception as error:
            if isinstance(error, Overloaded) and self._loop.time() - self._well_at < timeout_s:
                return  # The worker is at capacity, and works. Without a request that ends well, its handlers may hang.
            self._reason = f"{type(error).__name__}: {error}"
        else:
            self._reason, self._well_at = "", self._loop.time()
        self._at = self._loop.time()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        self._ended_well = self._endpoint.stats.ended[Outcome.OK]

    def result(self) -> dict[str, Any]:
        at, reason = self._at, self._reason
        if at is None or reason is None:
            return {"ok": None}
        found = {"ok": not reason, "age_s": round(max(0.0, self._loop.time() - at), 3)}
        return {**found, "reason": reason} if reason else found

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._trier.close()

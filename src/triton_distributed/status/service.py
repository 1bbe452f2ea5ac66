"""The open status port of a runtime: its pages, and the pictures of the runtime that it keeps for a stuck loop."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import msgspec

from triton_distributed.observe.stacks import stack
from triton_distributed.serving.endpoint import ServedEndpoint
from triton_distributed.status.canary import Canaries, Trier
from triton_distributed.status.checks import CheckRuns
from triton_distributed.status.dashboard import dashboard
from triton_distributed.status.health import Health, Judged
from triton_distributed.status.history import Callers, History
from triton_distributed.status.http import TEXT, Request, Response, error_response, json_response
from triton_distributed.status.loop import Loop, Stuck
from triton_distributed.status.metrics import Metrics
from triton_distributed.status.port import StatusPort
from triton_distributed.status.routes import Routes
from triton_distributed.status.server import TICK_S, HttpServer

MOST_PAGES = 2
"""Metrics pages that are made at once. A collector of the program may hang, and then holds up only these."""

PAGE_S = 1.0
"""Seconds for which a scrape waits until another page is complete."""

PICTURE_SHARE = 1000
"""A picture for a stuck loop is taken each second, or so seldom that it takes the loop at most this part of its time:
a picture of a runtime with 10,000 streams takes some milliseconds."""

PROBLEMS_S = 0.25
"""Seconds for which a question of `trd` waits for the program's checks: `trd ls` has one second for the answer."""


class Observed(Judged, Protocol):
    """The part of a runtime that the status port shows."""

    clients: Callers
    metrics: Metrics

    def event_loop(self) -> asyncio.AbstractEventLoop: ...

    def statistics(self) -> msgspec.Struct: ...


class StatusService:
    """Answers requests to the status port of a runtime.

    Args:
        runtime: the runtime; it is used on its loop, except for plain attributes.
        port: what the program adds.
        thread: the id of the thread of the runtime's loop.
        trier: makes the calls of the canary to an endpoint.

    Attributes:
        url: where it listens.

    Raises:
        OSError: it cannot listen at `TRD_STATUS_HOST` and `TRD_STATUS_PORT`.
    """

    def __init__(
        self, runtime: Observed, port: StatusPort, thread: int, trier: Callable[[ServedEndpoint], Trier]
    ) -> None:
        self._runtime, self._port = runtime, port
        self._loop = Loop(runtime.event_loop(), thread)
        self._health = Health(runtime, self._loop)
        self._checks = CheckRuns(port.checks, self._loop)
        self._routes = Routes(self._loop)
        self._canaries = Canaries(runtime.event_loop(), runtime.config.canary_s, trier)
        self._history = History()
        self._making_page = threading.Semaphore(MOST_PAGES)
        self._picture: tuple[float, msgspec.Struct] | None = None  # When it was taken, and the picture.
        self._next_picture_at = 0.0
        self._problems: tuple[float, list[str]] | None = None  # When they were found, and what they are.
        self.pages: dict[str, Callable[[Request], Response]] = {
            "/": self._index,
            "/live": lambda _: _verdict(*self._health.live()),
            "/ready": lambda _: _verdict(*self._health.ready()),
            "/health": self._healthy,
            "/metrics": self._metrics,
            "/statistics": self._statistics,
            "/statistics/history": self._samples,
            "/stacks": _stacks,
        }
        self._server = HttpServer(runtime.config.status_host, runtime.config.status_port, self._answer, self._tick)
        self.url = self._server.url

    async def close(self) -> None:
        """Close the port; the rest as for `HttpServer.close`."""
        self._canaries.close()
        await self._server.close(self._loop.cancel_all)

    async def problems(self, max_age_s: float) -> list[str]:
        """The checks and canaries that have failed; see `StatusPort.problems`."""
        if self._problems is None or time.monotonic() - self._problems[0] >= max_age_s:
            checks = await self._checks.failures_soon(PROBLEMS_S)
            self._problems = time.monotonic(), list(_failed(checks, self._canaries.results()))
        return self._problems[1]

    # in the server's threads

    def _tick(self) -> bool:
        if self._loop.is_closed:
            return False
        if stuck_s := self._loop.stuck_s:
            self._history.add_stuck(stuck_s)
        else:
            self._loop.ask(self._look)
        return True

    def _answer(self, request: Request) -> Response:
        path, method = request.path.rstrip("/") or "/", request.method
        if (page := self.pages.get(path)) is not None:
            if method == "GET":
                return page(request)
            allowed = ["GET", "HEAD"]
        elif (route := self._port.routes.get((method, path))) is not None:
            return self._routes.answer(route, request)
        else:
            allowed = [each for each, known in list(self._port.routes) if known == path]
        if allowed:
            reason = f"{path} takes {' and '.join(allowed)} requests, not {method}"
            return error_response(405, reason, {"Allow": ", ".join(allowed)})
        return error_response(404, f"there is no page or route {path!r}: / lists them")

    def _index(self, request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return dashboard()
        routes = [f"{method} {path}" for method, path in list(self._port.routes)]
        return json_response({"pages": list(self.pages), "routes": routes}, headers={"Vary": "Accept"})

    def _healthy(self, _: Request) -> Response:
        is_live, live = self._health.live()
        ready = self._health.ready()[1]
        checks = self._checks.failures(ready["loop"]["turns"])
        canaries = self._canaries.results()
        reasons = [*ready["reasons"], *_failed(checks, canaries)]
        if not is_live:
            reasons.append(f"the process is not live: its event loop has been stuck for {live['stuck_s']:.1f} s")
        healthy = not reasons
        found = {
            "healthy": healthy,
            "live": is_live,
            **ready,
            "reasons": reasons,
            "checks": {name: {"ok": not why, **({"reason": why} if why else {})} for name, why in checks.items()},
            "canaries": canaries,
        }
        return _verdict(healthy, found)

    def _metrics(self, request: Request) -> Response:
        asked = request.headers
        if not self._making_page.acquire(timeout=PAGE_S):
            return error_response(503, f"{MOST_PAGES} metrics pages are being made: does a collector hang?")
        try:
            page = self._runtime.metrics.page(asked.get("accept", ""), asked.get("accept-encoding", ""))
        finally:
            self._making_page.release()
        encoding = {"Content-Encoding": page.content_encoding} if page.content_encoding else {}
        return Response(200, page.body, page.content_type, encoding)

    def _statistics(self, _: Request) -> Response:
        loop: dict[str, Any] = {"turns": True}
        try:
            self._loop.call(self._take_picture)
        except Stuck:
            loop = self._health.stuck()
        taken_at, picture = self._picture or (time.monotonic(), None)
        found = {
            "age_s": round(max(0.0, time.monotonic() - taken_at), 3) if picture is not None else None,
            "loop": loop,
            "statistics": None if picture is None else _with_text_ids(msgspec.to_builtins(picture)),
        }
        return json_response(found)

    def _samples(self, request: Request) -> Response:
        try:
            start = float(request.query.get("since", "0"))
        except ValueError:
            return error_response(400, "since= is a number of seconds since 1970")
        return json_response(self._history.since(start))

    # on the runtime's loop

    def _look(self, lag_s: float) -> None:
        runtime, now = self._runtime, time.monotonic()
        endpoints = runtime.worker.server.endpoints
        self._history.add(lag_s, endpoints, runtime.clients.counted())
        if not runtime.closing:
            self._canaries.look(endpoints)
        if now >= self._next_picture_at:
            self._take_picture()

    def _take_picture(self) -> None:
        began_at = time.monotonic()
        picture = self._runtime.statistics()
        now = time.monotonic()
        self._picture = now, picture
        self._next_picture_at = now + max(TICK_S / 2, PICTURE_SHARE * (now - began_at))


def _failed(checks: Mapping[str, str], canaries: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield from (f"health check {name}: {why}" for name, why in checks.items() if why)
    yield from (f"canary of {path}: {each['reason']}" for path, each in canaries.items() if each["ok"] is False)


def _verdict(good: bool, found: dict[str, Any]) -> Response:
    return json_response(found, 200 if good else 503)


def _with_text_ids(statistics: dict[str, Any]) -> dict[str, Any]:
    """Instance ids as text, as in protobuf's JSON: they have 63 bits, and many JSON readers keep only 53."""
    statistics["instance_id"] = str(statistics["instance_id"])
    for call in statistics["calls"]:
        for name in ("instances", "candidates"):
            call[name] = list(map(str, call[name]))
    return statistics


def _stacks(_: Request) -> Response:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = [f"{names.get(id, id)}\n{stack(frame)}" for id, frame in sys._current_frames().items()]
    return Response(200, ("\n\n".join(stacks) + "\n").encode(), TEXT)

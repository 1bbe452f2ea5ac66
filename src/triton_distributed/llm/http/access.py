"""What surrounds each request: its id, its line in the access log, and its metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Container

from prometheus_client import Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triton_distributed.integrations.http.request import CLIENT_LEFT, REQUEST_ID, read_headers
from triton_distributed.llm.http.facts import KEY, Facts
from triton_distributed.llm.http.metrics import FrontMetrics

logger = logging.getLogger("triton_distributed.llm.http.access")

OTHER = "other"
"""The label of all paths that are not known: a caller must not be able to make series without end."""


class TimedFacts(Facts):
    """Facts that also measure when tokens arrive."""

    __slots__ = ("_between", "_last", "_metrics")

    def __init__(self, metrics: FrontMetrics, now: float) -> None:
        super().__init__()
        self._metrics, self._last = metrics, now
        self._between: Histogram | None = None

    def arrived(self, tokens: int) -> None:
        """Tokens of the answer have arrived from the worker."""
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        if self._between is None:
            first, self._between = self._metrics.timed(self.model)
            first.observe(passed)
        else:
            self._between.observe(passed)


class Access:
    """Gives each request an id, and notes how it has ended.

    The id is that of the header `x-request-id`, or a random one. It is in the response, too, and it is the id of the
    calls to workers.

    Args:
        app: the app.
        metrics: where requests are counted.
        known: the paths that are labels of metrics.
        quiet: paths that the log leaves out: probes.
        log: whether each request gets a line in the log.
    """

    def __init__(
        self, app: ASGIApp, metrics: FrontMetrics, known: Container[str], quiet: Container[str], log: bool
    ) -> None:
        self._app, self._metrics, self._known, self._quiet, self._log = app, metrics, known, quiet, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        facts = scope[KEY] = TimedFacts(self._metrics, began)
        id = read_headers(scope["headers"])[0].encode()
        scope["headers"] = [*(each for each in scope["headers"] if each[0] != REQUEST_ID), (REQUEST_ID, id)]
        status, complete = CLIENT_LEFT, False

        async def answer(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                others = [each for each in message.get("headers", ()) if each[0].lower() != REQUEST_ID]
                message = {**message, "headers": [*others, (REQUEST_ID, id)]}
            elif not message.get("more_body"):
                complete = True
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, answer)
        except Exception:
            if status == CLIENT_LEFT:
                status = 500  # The server answers so.
            raise
        finally:
            self._metrics.in_flight.dec()
            if (not complete and status < 400) or facts.error == "client_left":
                status = CLIENT_LEFT
            self._note(scope, id.decode(), facts, status, time.perf_counter() - began)

    def _note(self, scope: Scope, id: str, facts: Facts, status: int, seconds: float) -> None:
        path, model, usage = scope["path"], facts.model, facts.usage
        route = path if path in self._known else OTHER
        ended = self._metrics.ended(route, model, status)
        ended.requests.inc()
        ended.seconds.observe(seconds)
        if usage is not None:
            ended.prompt.inc(usage.prompt_tokens)
            ended.cached.inc(usage.cached_tokens)
            ended.completion.inc(usage.completion_tokens)
        if self._log and path not in self._quiet:
            words = f" model={model}" if model else ""
            if usage is not None:
                words += f" tokens={usage.prompt_tokens}+{usage.completion_tokens}"
            if facts.error:
                words += f" error={facts.error}"
            logger.info("%s %s %r %d%s %.1f ms", id, scope["method"], path, status, words, seconds * 1000)

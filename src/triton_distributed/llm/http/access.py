"""What is noted of each request: its line in the access log, and its metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Container

from starlette.types import Message, Send

from triton_distributed.integrations.http.request import CLIENT_LEFT, REQUEST_ID
from triton_distributed.llm.http.facts import Facts
from triton_distributed.llm.http.head import Head
from triton_distributed.llm.http.metrics import Durations, FrontMetrics

logger = logging.getLogger("triton_distributed.llm.http.access")

OTHER = "other"
"""The label of all paths that are not known: a caller must not be able to make series without end."""


class Visit(Facts):
    """The facts of a request that the front end answers, with its head and its times.

    Attributes:
        head: of the request.
        began: when it came, on the clock `time.perf_counter`.
    """

    __slots__ = ("_between", "_last", "_metrics", "began", "head")

    def __init__(self, head: Head, metrics: FrontMetrics) -> None:
        super().__init__()
        self.head, self._metrics = head, metrics
        self.headers = ((REQUEST_ID, head.id.encode()),)
        self.began = self._last = time.perf_counter()
        self._between: Durations | None = None

    def arrived(self, tokens: int) -> None:
        """Tokens of the answer have arrived from the worker."""
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        if self._between is None:
            first, self._between = self._metrics.timed(self.model)
            first.add(passed)
        else:
            self._between.add(passed)

    def noting(self, send: Send) -> Send:
        """A `send` that adds the headers and notes the status, for apps that know nothing of facts."""
        status = CLIENT_LEFT

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                self.begun = True
                status = message["status"]
                if status >= 400:
                    self.status = status
                others = [each for each in message.get("headers", ()) if each[0].lower() != REQUEST_ID]
                message = {**message, "headers": [*others, *self.headers]}
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self.status = status

        return noted


class Access:
    """Notes how requests end.

    Args:
        metrics: where they are counted.
        known: the paths that are labels of metrics.
        quiet: paths that the log leaves out: probes.
        log: whether each request gets a line in the log.
    """

    def __init__(self, metrics: FrontMetrics, known: Container[str], quiet: Container[str], log: bool) -> None:
        self._metrics, self._known, self._quiet, self._log = metrics, known, quiet, log

    def begin(self, head: Head) -> Visit:
        """Note a request that has come. Return its facts."""
        self._metrics.in_flight += 1
        return Visit(head, self._metrics)

    def end(self, method: str, path: str, visit: Visit) -> None:
        """Note the end of the request."""
        self._metrics.in_flight -= 1
        model, usage = visit.model, visit.usage
        status = CLIENT_LEFT if visit.error == "client_left" else visit.status
        seconds = time.perf_counter() - visit.began
        self._metrics.ended(path if path in self._known else OTHER, model, status, seconds, usage)
        if self._log and path not in self._quiet:
            words = f" model={model}" if model else ""
            if usage is not None:
                words += f" tokens={usage.prompt_tokens}+{usage.completion_tokens}"
            if visit.error:
                words += f" error={visit.error}"
            text = "%s %s %r %d%s %.1f ms"
            logger.info(text, visit.head.id, method, path, status, words, seconds * 1000)

"""The OpenAI API with keys, limits, metrics and a log around it: what the front end does for each of its requests."""

from __future__ import annotations

import asyncio
from typing import Protocol

from triton_distributed.context import Context, current
from triton_distributed.integrations.http.request import CLIENT_LEFT
from triton_distributed.llm.http.access import Access, Visit
from triton_distributed.llm.http.exchange import Exchange
from triton_distributed.llm.http.limits import Limits, Refusal, ending


class Answering(Protocol):
    """What answers the requests of the OpenAI API."""

    async def answer(self, exchange: Exchange) -> None:
        """Answer a request."""


class Api:
    """See the module.

    Args:
        openai: what answers; None if there is no such path.
        limits: what is refused.
        access: notes each request.

    Attributes:
        draining: whether the server is about to end.
        running: requests of clients that run now.
    """

    def __init__(self, openai: Answering | None, limits: Limits, access: Access) -> None:
        self._openai, self._limits, self._access = openai, limits, access
        self.draining = False
        self.running = 0

    @property
    def known(self) -> bool:
        """Whether there is such a path."""
        return self._openai is not None

    async def answer(self, exchange: Exchange) -> None:
        """Answer a request, and note it."""
        exchange.facts = visit = self._access.begin(exchange.head)
        cut = False
        try:
            try:
                await self.admit(exchange, visit)
            except asyncio.CancelledError:
                if not self.draining:
                    raise
                cut = not visit.begun
            except Exception:
                if visit.status == CLIENT_LEFT:
                    visit.status = 500  # The server answers so.
                raise
            if cut:  # The time of the drain is over.
                await self.refuse(exchange, ending())
        finally:
            self._access.end(exchange.method, exchange.path, visit)

    async def admit(self, exchange: Exchange, visit: Visit) -> None:
        """Answer a request, if the limits allow it.

        Args:
            exchange: the request.
            visit: its facts.
        """
        head = visit.head
        refusal = self._limits.refusal(head, self.running)
        if refusal is None and self._openai is None:
            refusal = Refusal(404, "unknown_url", f"There is no path {exchange.path}.")
        if refusal is not None:
            await self.refuse(exchange, refusal)
            return
        assert self._openai is not None
        self.running += 1
        context = Context(head.id, None, head.travelling or None)
        token = current.set(context)  # The calls of the request have its id and its trace.
        try:
            await self._openai.answer(exchange)
        finally:
            current.reset(token)
            context.over = True
            self.running -= 1

    async def refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        """Refuse a request."""
        exchange.facts.error = refusal.code
        kind, body = refusal.body(is_api(exchange.path), exchange.head.id)
        await exchange.answer(refusal.status, body, refusal.headers, kind)


def is_api(path: str) -> bool:
    """Whether a path is one of the OpenAI API."""
    return path.startswith("/v1/") or path == "/v1"

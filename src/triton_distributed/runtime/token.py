"""Cancellation tokens, as programs written for the original use them."""

from __future__ import annotations

import asyncio


class CancellationToken:
    """Something that is cancelled once, together with its children."""

    def __init__(self) -> None:
        self._cancelled = False
        self._children: list[CancellationToken] = []
        self._waiters: list[asyncio.Future[None]] = []

    def cancel(self) -> None:
        """Cancel this token and every child of it."""
        if self._cancelled:
            return
        self._cancelled = True
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        children, self._children = self._children, []
        for child in children:
            child.cancel()

    def is_cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._cancelled

    def cancelled(self) -> asyncio.Future[None]:
        """A future that is done once the token is cancelled."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._cancelled:
            waiter.set_result(None)
        else:
            self._waiters = [each for each in self._waiters if not each.done()]
            self._waiters.append(waiter)
        return waiter

    def child_token(self) -> CancellationToken:
        """A token that is cancelled with this one, or alone."""
        child = CancellationToken()
        if self._cancelled:
            child.cancel()
        else:
            self._children = [each for each in self._children if not each._cancelled]
            self._children.append(child)
        return child

"""Cancellation tokens, as programs written for the original runtime use them."""

from __future__ import annotations

import asyncio
import weakref


class CancellationToken:
    """A token that is cancelled once, together with its children.

    Args:
        parent: a token whose cancellation also cancels this one.
    """

    def __init__(self, parent: CancellationToken | None = None) -> None:
        self._cancelled = False
        self._parent = parent
        # A program may take one child per request. Dropped children are collected; awaited ones are kept alive.
        self._children: weakref.WeakSet[CancellationToken] = weakref.WeakSet()
        self._awaited: set[CancellationToken] = set()
        self._waiters: set[asyncio.Future[None]] = set()

    def cancel(self) -> None:
        """Cancel this token and every child of it. May be called in any thread."""
        if self._cancelled:
            return
        self._cancelled = True
        for waiter in list(self._waiters):
            loop = waiter.get_loop()
            if asyncio._get_running_loop() is loop:
                _complete(waiter)
            elif not loop.is_closed():
                loop.call_soon_threadsafe(_complete, waiter)
        for child in list(self._children):
            child.cancel()

    def is_cancelled(self) -> bool:
        """Whether the token was cancelled."""
        return self._cancelled

    def cancelled(self) -> asyncio.Future[None]:
        """A future that is done once the token is cancelled."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._cancelled:
            waiter.set_result(None)
            return waiter
        self._waiters.add(waiter)
        self._hold()
        waiter.add_done_callback(self._released)
        return waiter

    def _hold(self) -> None:
        if self._parent is not None:
            self._parent._awaited.add(self)
            self._parent._hold()

    def _released(self, waiter: asyncio.Future[None]) -> None:
        self._waiters.discard(waiter)
        self._let_go()

    def _let_go(self) -> None:
        if not self._waiters and not self._awaited and self._parent is not None:
            self._parent._awaited.discard(self)
            self._parent._let_go()

    def child_token(self) -> CancellationToken:
        """A new token that is cancelled with this one, and may be cancelled alone."""
        child = CancellationToken(self)
        if self._cancelled:
            child.cancel()
        else:
            self._children.add(child)
        return child


def _complete(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)

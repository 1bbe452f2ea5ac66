"""A context that controls a call on another thread's event loop."""

from __future__ import annotations

import copy
from collections.abc import Callable

from triton_distributed.context import AwaitedRequest, Context, awaited_requests


class Relay:
    """Passes on to a call's own context what happens to the context of its caller.

    A context belongs to the thread in which it is cancelled: the loop of the handler that makes the call, or a thread
    of the program. The call belongs to the loop of synchronous calls. So the call gets a copy of the context, and this
    object is attached to the original.

    Args:
        origin: the context of the caller.
        post: calls a function on the loop of the call.

    Attributes:
        context: the call's own context.
    """

    __slots__ = ("_origin", "_post", "context")

    def __init__(self, origin: Context, post: Callable[[Callable[[], object]], None]) -> None:
        origin.id()  # A random id is chosen now, so that both have the same.
        self.context = copy.copy(origin)
        self.context._calls = self.context._waiters = None
        self._origin = origin
        self._post = post
        # Safe in any thread: `attach` and `kill` have no point between a check and its change where threads switch.
        origin.attach(self)

    def detach(self) -> None:
        """Pass on nothing more, because the call is over."""
        self._origin.detach(self)

    # Methods that the original calls on what is attached to it.

    def cancel(self) -> None:
        self._post(self.context.kill)

    def ask_to_stop(self) -> None:
        self._post(self.context.stop_generating)

    def waits_for(self) -> AwaitedRequest | None:
        return next(iter(awaited_requests(self.context)), None)

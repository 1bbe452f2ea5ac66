"""The conditions of a call: its options, checked, with what it inherits from the request whose handler makes it."""

from __future__ import annotations

from triton_distributed.context import Context
from triton_distributed.observe.observer import ObservedCall


class Conditions:
    """The conditions of one call.

    Args:
        context: the call is cancelled with this context; None for a call that ends by itself.
        timeout_s: seconds for the whole call; None for no limit.
        metadata: the request's metadata, encoded.
        idempotent: a second handler may run the request.
        resume: another instance may continue the stream.
        observed: tells the observers of the call; None without observers.
    """

    __slots__ = ("context", "idempotent", "metadata", "observed", "resume", "timeout_s")

    def __init__(
        self,
        context: Context | None = None,
        timeout_s: float | None = None,
        metadata: bytes = b"",
        idempotent: bool = False,
        resume: bool = False,
        observed: ObservedCall | None = None,
    ) -> None:
        self.context = context
        self.timeout_s = timeout_s
        self.metadata = metadata
        self.idempotent = idempotent
        self.resume = resume
        self.observed = observed

    def began(self, deadline: float | None) -> float | None:
        """When a call with this deadline began, on the loop's clock; None without a deadline."""
        return None if deadline is None or self.timeout_s is None else deadline - self.timeout_s


UNCONDITIONAL = Conditions()
"""The conditions of a call without options outside of handlers."""

"""What a call with `resume=True` remembers, so that another instance can continue after one was lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from triton_distributed.context import RESUME

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(dict[str, msgspec.Raw]).decode


REFILL_S = 10.0
"""Seconds after which a stream may be resumed once more than `TRD_RETRIES` allows: long streams outlive a rolling
restart, and a request that kills every worker that serves it is not given to one worker after another at once."""


class Resumption:
    """Where a stream stands.

    Args:
        most: resumptions that may follow each other at once.
        now: on the event loop's clock.

    Attributes:
        since: items received after the last token, the token's own not counted.
        skip: items of the present instance that the caller has already.
        advanced: an item that is new to the caller has come since the latest instance was asked.
    """

    __slots__ = ("_left", "_most", "_seen", "_token", "advanced", "since", "skip")

    def __init__(self, most: int, now: float) -> None:
        self._most = most
        self._left = float(most)
        self._seen = now
        self._token: Any = None
        self.since = self.skip = 0
        self.advanced = False

    def received(self, items: Sequence[Any], tokens: Sequence[Any] | None) -> Sequence[Any]:
        """Count received items, with their tokens if they have any; returns those that are new to the caller."""
        passed = min(self.skip, len(items))
        self.skip -= passed
        for token in tokens[passed:] if tokens is not None else ():
            self.since += 1
            if token is not None:
                self._token, self.since = token, 0
        if tokens is None:
            self.since += len(items) - passed
        if passed < len(items):
            self.advanced = True
        return items[passed:] if passed else items

    def allowed(self, now: float) -> bool:
        """Whether the stream may be resumed once more."""
        return self._saved(now) >= 1.0

    def _saved(self, now: float) -> float:
        return min(float(self._most), self._left + (now - self._seen) / REFILL_S)

    def resume(self, metadata: bytes, now: float) -> bytes:
        """Count one resumption.

        Args:
            metadata: of the request, encoded.
            now: on the event loop's clock.

        Returns:
            the metadata for the next instance: with the last token.
        """
        self._left, self._seen = self._saved(now) - 1.0, now
        self.skip, self.advanced = self.since, False
        if self._token is None:
            return metadata
        values = _decode(metadata) if metadata else {}
        values[RESUME] = msgspec.Raw(_encode(self._token))
        return _encode(values)

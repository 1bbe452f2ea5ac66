"""What a call with `resume=True` remembers, so that another instance can go on where one has died."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from triton_distributed.context import RESUME
from triton_distributed.errors import DecodeError

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
        lost: why and where the last stream broke, as (address, reason), until another instance was asked.
        progress: an item has come since the last instance was asked.
    """

    __slots__ = ("_left", "_most", "_seen", "_token", "lost", "progress", "since", "skip")

    def __init__(self, most: int, now: float) -> None:
        self._most = most
        self._left = float(most)
        self._seen = now
        self._token: Any = None
        self.since = self.skip = 0
        self.lost: tuple[str, str] | None = None
        self.progress = False

    def received(self, items: Sequence[Any], tokens: Sequence[Any] | None) -> Sequence[Any]:
        """Take received items in, with their tokens where there are any; returns those that are new to the caller."""
        passed = min(self.skip, len(items))
        self.skip -= passed
        for token in tokens[passed:] if tokens is not None else ():
            self.since += 1
            if token is not None:
                self._token, self.since = token, 0
        if tokens is None:
            self.since += len(items) - passed
        if passed < len(items):
            self.progress = True
        return items[passed:] if passed else items

    def allowed(self, now: float) -> bool:
        """Whether the stream may be resumed once more; counts it."""
        self._left = min(float(self._most), self._left + (now - self._seen) / REFILL_S)
        self._seen = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True

    def go_on(self, metadata: bytes) -> bytes:
        """Another instance is asked now: returns the request's metadata with the last token."""
        self.lost = None
        self.skip, self.progress = self.since, False
        if self._token is None:
            return metadata
        values = _decode(metadata) if metadata else {}
        values[RESUME] = msgspec.Raw(_encode(self._token))
        return _encode(values)


def unpaired(items: Any, batch: bool) -> tuple[list[Any], list[Any]]:
    """The items and the tokens of a message whose items are pairs.

    Raises:
        DecodeError: they are no pairs.
    """
    try:
        pairs = items if batch else (items,)
        return [item for _, item in pairs], [token for token, _ in pairs]
    except (TypeError, ValueError) as error:
        raise DecodeError(f"items with tokens are pairs: {error}") from error

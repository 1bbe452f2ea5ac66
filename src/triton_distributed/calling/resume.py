"""The state of a call with `resume=True`, so that another instance can continue after one was lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from triton_distributed.context import RESUME
from triton_distributed.payload.codec import encode

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(dict[str, msgspec.Raw]).decode


REFILL_S = 10.0
"""Seconds after which a stream may be resumed once more than `TRD_RETRIES` allows. This way, long streams survive a
rolling restart. A request that kills every worker it reaches cannot kill many workers in a short time."""


class Resumption:
    """The position of a stream.

    Args:
        most: the number of resumptions that may follow each other at once.
        now: the time on the event loop's clock.

    Attributes:
        since: the number of items received after the last token, without the token's own item.
        skip: the number of next items of the present instance that the caller already has.
        advanced: an item that is new to the caller has come since the latest instance got the request.
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
        """Count received items and store their last token, if any; return the items that are new to the caller."""
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
            metadata: the request's metadata, encoded.
            now: the time on the event loop's clock.

        Returns:
            the metadata for the next instance, with the last token.
        """
        self._left, self._seen = self._saved(now) - 1.0, now
        self.skip, self.advanced = self.since, False
        if self._token is None:
            return metadata
        values = _decode(metadata) if metadata else {}
        token = encode(self._token, "the resume token")
        if not isinstance(token, bytes):
            raise TypeError("a resume token cannot hold large arrays or buffers")
        values[RESUME] = msgspec.Raw(token)
        return _encode(values)

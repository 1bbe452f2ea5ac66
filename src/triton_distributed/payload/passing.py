"""Encoded items that pass from one call to another: a handler returns the stream of a call that it has made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from triton_distributed.errors import DecodeError

Batch = Callable[[Iterable[bytes]], Any]
"""Makes one value of encoded items."""

_raw_items = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode


class Passable:
    """A stream that can give its items as they came, without decoding them."""

    __slots__ = ()

    def pass_on(self, batch: Batch) -> None:
        """Give the items of each message as one batch from now on, where the stream can; others are decoded as ever."""
        raise NotImplementedError


def encoded_items(body: bytes) -> list[bytes]:
    """Return the items of an encoded list, each encoded.

    Raises:
        DecodeError: it is not a list, or malformed.
    """
    try:
        return list(map(bytes, _raw_items(body)))
    except msgspec.DecodeError as error:
        raise DecodeError(f"a malformed batch: {error}") from error

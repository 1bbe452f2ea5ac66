"""Decodes the messages in a call's inbox into the items that are new to the caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from triton_distributed.annotated import Annotated
from triton_distributed.calling.resume import Resumption
from triton_distributed.errors import DecodeError
from triton_distributed.payload.codec import decode
from triton_distributed.wire import frames as f
from triton_distributed.wire.stream import Received

SPECIAL = f.CHECKPOINT | f.ANNOTATED
"""Flags of messages that `plain_items` cannot read."""


def plain_items(message: Received) -> Sequence[Any]:
    """The values of a message without special flags.

    Raises:
        DecodeError: the message cannot be read.
    """
    _, kind, _, payload, buffers = message
    items = decode(payload, buffers)
    if kind != f.BATCH:
        return (items,)
    if type(items) is not list:
        raise DecodeError("the worker sent an invalid batch")
    return items


def new_items(message: Received, resumption: Resumption | None, annotated: bool) -> Sequence[Any]:
    """The items of any message that the caller does not have yet.

    Args:
        message: the message as it arrived.
        resumption: counts the items of a call that can be resumed, and knows which ones the caller has.
        annotated: True to return the handler's `Annotated` items as they are, False to return their values.

    Raises:
        DecodeError: the message cannot be read.
    """
    flags = message[2]
    items, tokens = plain_items(message), None
    if flags & f.CHECKPOINT:
        items, tokens = _unpaired(items)
    if resumption is not None:
        items = resumption.received(items, tokens)
    if not flags & f.ANNOTATED:
        return items
    try:
        return [Annotated(*each) if annotated else each[0] for each in items]
    except (TypeError, LookupError) as fault:
        raise DecodeError(f"the worker sent an invalid annotated item: {fault}") from fault


def _unpaired(pairs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The items and the resume tokens of a message whose items are pairs."""
    try:
        return [item for _, item in pairs], [token for token, _ in pairs]
    except (TypeError, ValueError) as error:
        raise DecodeError(f"items with tokens are pairs: {error}") from error

"""Decodes the messages in a call's inbox into the items that are new to the caller."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from triton_distributed.annotated import Annotated
from triton_distributed.calling.resume import Resumption
from triton_distributed.compiled import caused
from triton_distributed.errors import DecodeError, InvalidRequest
from triton_distributed.payload.codec import Message, decode, encode
from triton_distributed.payload.passing import Batch, encoded_items
from triton_distributed.payload.typed import typed_decoder
from triton_distributed.wire import frames as f
from triton_distributed.wire.stream import Received

_NIL: Final = b"\xc0"  # None, encoded
SPECIAL: Final = f.CHECKPOINT | f.ANNOTATED
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


class ItemDecoder:
    """Decodes items to the type that a contract declares.

    Args:
        hint: the type of one item.

    Raises:
        TypeError: values of this type cannot be decoded; the text says why.
    """

    __slots__ = ("_hint", "_many", "_one", "_pairs")

    def __init__(self, hint: Any) -> None:
        self._hint = hint
        self._one = typed_decoder(hint, "item")
        self._many = typed_decoder(list.__class_getitem__(hint), "items")
        self._pairs: ItemDecoder | None = None  # Few streams have resume tokens.

    @property
    def pairs(self) -> ItemDecoder:
        """The decoder of items that have resume tokens."""
        if self._pairs is None:
            self._pairs = ItemDecoder(tuple.__class_getitem__((Any, self._hint)))
        return self._pairs

    def items(self, message: Received) -> Sequence[Any]:
        """The items of a message without annotations.

        Raises:
            DecodeError: the message cannot be read, or an item does not fit the type.
        """
        _, kind, _, payload, buffers = message
        try:
            if kind != f.BATCH:
                return (self._one(payload, buffers),)
            return self._many(payload, buffers)  # type: ignore[no-any-return]
        except InvalidRequest as misfit:
            raise caused(_misfit(misfit), misfit.__cause__)

    def fitted(self, value: Any) -> Any:
        """A plain value as an item of the type.

        Raises:
            DecodeError: the value does not fit.
        """
        message = encode(value, "item")
        try:
            if isinstance(message, Message):
                return self._one(message.body, [bytearray(each) for each in message.buffers])
            return self._one(message)
        except InvalidRequest as misfit:
            raise caused(_misfit(misfit), misfit.__cause__)


class PassedOn(ItemDecoder):
    """Gives the small items of a message as one batch, still encoded; decodes what has flags, buffers or many bytes.

    Args:
        batch: makes the batch.
        keeps_none: None is a value, and not an item without data.
    """

    __slots__ = ("_batch", "_keeps_none")

    def __init__(self, batch: Batch, keeps_none: bool) -> None:
        self._batch, self._keeps_none = batch, keeps_none

    @property
    def pairs(self) -> ItemDecoder:
        return self

    def items(self, message: Received) -> Sequence[Any]:
        _, kind, flags, payload, buffers = message
        if flags & SPECIAL or buffers is not None or type(payload) is not bytes:
            return plain_items(message)
        if kind == f.BATCH:
            items = encoded_items(payload)
        elif len(payload) <= f.SMALL:
            items = [payload]
        else:
            return plain_items(message)
        passed = items if self._keeps_none else [each for each in items if each != _NIL]
        return _Batch(items, (self._batch(passed),) if passed else ())

    def fitted(self, value: Any) -> Any:
        return value


class _Batch(Sequence[Any]):
    """The batch of a message: it counts its items, and is iterated as one value."""

    __slots__ = ("_items", "_values")

    def __init__(self, items: list[bytes], values: tuple[Any, ...]) -> None:
        self._items, self._values = items, values

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]


def _misfit(misfit: InvalidRequest) -> DecodeError:
    return DecodeError(f"the worker sent an item that does not fit the contract: {misfit.reason}")


def new_items(
    message: Received, resumption: Resumption | None, annotated: bool, decoder: ItemDecoder | None = None
) -> Sequence[Any]:
    """The items of any message that the caller does not have yet.

    Args:
        message: the message as it arrived.
        resumption: counts the items of a call that can be resumed, and knows which ones the caller has.
        annotated: True to return the handler's `Annotated` items as they are, False to return their values.
        decoder: decodes the values to their declared type; None for plain values.

    Raises:
        DecodeError: the message cannot be read.
    """
    flags = message[2]
    tokens = None
    if decoder is None or flags & f.ANNOTATED:
        items = plain_items(message)
    else:
        items = (decoder.pairs if flags & f.CHECKPOINT else decoder).items(message)
    if flags & f.CHECKPOINT:
        items, tokens = _unpaired(items)
    if resumption is not None:
        items = resumption.received(items, tokens)
    if not flags & f.ANNOTATED:
        return items
    try:
        items = [Annotated(*each) if annotated else each[0] for each in items]
    except (TypeError, LookupError) as fault:
        raise caused(DecodeError(f"the worker sent an invalid annotated item: {fault}"), fault)
    return items if decoder is None else [decoder.fitted(each) for each in items]


def _unpaired(pairs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The items and the resume tokens of a message whose items are pairs."""
    try:
        return [item for _, item in pairs], [token for token, _ in pairs]
    except (TypeError, ValueError) as error:
        raise caused(DecodeError(f"items with tokens are pairs: {error}"), error)

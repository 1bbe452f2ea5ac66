"""Invariant: any bytes are a value or a DecodeError, for those who have a model's class and for those who have none.

What a model's class reads is made of values of few, cheap types, whatever the bytes name.
"""

from __future__ import annotations

import decimal
import enum
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pydantic

from triton_distributed.errors import DecodeError
from triton_distributed.payload.codec import decode, decode_models, encode
from triton_distributed.payload.outofband import MODEL


class Colour(enum.Enum):
    RED = "red"


class Inner(pydantic.BaseModel):
    path: Path | str
    colour: Colour | str
    keys: dict[uuid.UUID, tuple[int, ...]] = {}


class Model(pydantic.BaseModel):
    inner: Inner = pydantic.Field(serialization_alias="innerOut")
    price: decimal.Decimal | None
    any: Any = None

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        return 2


_INNER = Inner(path=Path("/a"), colour=Colour.RED, keys={uuid.UUID(int=1): (1, 2)})
SEEDS: list[bytes] = [
    bytes(encode(each))  # type: ignore[arg-type]
    for each in (
        Model(inner=_INNER, price=decimal.Decimal("1.5"), any={b"x"}),
        [_INNER, pydantic.RootModel[uuid.UUID](uuid.UUID(int=1)), {"a": _INNER}],
        *(msgspec.msgpack.Ext(MODEL, msgspec.msgpack.encode([code, ["a"], None, ["b"]])) for code in range(4)),
    )
]


def one_input(data: bytes) -> None:
    try:
        plain = decode(data)
    except DecodeError:
        plain = None
    try:
        value, models = decode_models(data)
    except DecodeError:
        assert plain is None
        return
    assert type(value) is type(plain)
    for written, read in models.values():
        assert isinstance(written, (dict, list))
        try:
            read()
        except DecodeError:
            pass

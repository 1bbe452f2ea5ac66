"""Whatever its class is like, a value of it arrives equal at a handler that is annotated with that class."""

from __future__ import annotations

from typing import Any

import pydantic
from hypothesis import assume, given

from tests.payload.generated import models, records
from tests.payload.test_codec import received
from triton_distributed.payload.codec import decode, encode
from triton_distributed.payload.typed import typed_decoder


def pydantic_makes_it_again(model: Any) -> bool:
    """Whether pydantic makes an equal model of a model's own values, in one process."""
    values = model.model_dump(round_trip=True, by_alias=False)
    for strict in (None, False):  # a strict model that holds a dataclass takes it only so
        try:
            return bool(type(model).model_validate(values, by_alias=False, by_name=True, strict=strict) == model)
        except pydantic.ValidationError:
            pass
    return False


@given(models())
def test_models(model: Any) -> None:
    assume(pydantic_makes_it_again(model))  # not e.g. an empty text for `re.Pattern | str`, of which it makes a pattern
    message = received(encode(model))
    got = typed_decoder(type(model))(*message)
    assert type(got) is type(model)
    assert got == model
    # Whoever has no class gets what the class writes, as if that had been sent.
    assert decode(*message) == decode(*received(encode(model.model_dump(by_alias=True))))


@given(records())
def test_dataclasses_structs_and_named_tuples(record: Any) -> None:
    got = typed_decoder(type(record))(*received(encode(record)))
    assert type(got) is type(record)
    assert got == record

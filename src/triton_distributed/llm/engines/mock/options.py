"""The options of the mock engine, from the text of a command line."""

from __future__ import annotations

import math

import msgspec

from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.engines.mock.timing import DYNAMO, Timing, linear

Text = str | int | float  # A value as text, or already as a number.


def milliseconds(name: str, value: Text) -> float:
    """Read a duration in ms, from 0 to a day.

    Raises:
        InvalidParameter: it is not one.
    """
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not 0 <= found <= 86_400_000:
        raise InvalidParameter(name, f"expected a number of milliseconds from 0 to 86400000, got {value!r}")
    return found


def timing(
    speed: str, ttft_ms: Text, prefill_token_ms: Text, itl_ms: Text, transfer_token_ms: Text = ""
) -> Timing | None:
    """The timing that the options ask for; None for none at all.

    Raises:
        InvalidParameter: an option is invalid, or does not fit another.
    """
    found = _timing(speed, {"ttft_ms": ttft_ms, "prefill_token_ms": prefill_token_ms, "itl_ms": itl_ms})
    if transfer_token_ms == "":
        return found
    token_ms = milliseconds("transfer_token_ms", transfer_token_ms)
    if found is None:
        raise InvalidParameter("transfer_token_ms", "with the speed instant nothing takes time")
    return msgspec.structs.replace(found, transfer=(token_ms, 0.0))


def _timing(speed: str, given: dict[str, Text]) -> Timing | None:
    read = {name: milliseconds(name, value) for name, value in given.items() if value != ""}
    if read and speed:
        raise InvalidParameter("speed", f"give either speed or {', '.join(read)}")
    if read:
        return linear(*(read.get(name, 0.0) for name in given))
    if speed in ("", "instant"):
        return None
    if speed == "dynamo":
        return DYNAMO
    raise InvalidParameter("speed", f"expected instant or dynamo, got {speed!r}")

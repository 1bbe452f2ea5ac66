"""How long a step of the mock engine takes. Pure."""

from __future__ import annotations

import msgspec


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """The durations of a step, in ms. A step with prefill and decoding takes both together.

    Attributes:
        prefill: a, b, c of a·t² + b·t + c, where t counts the tokens of the batch that are not cached.
        decode: a, b, c of a·p² + b·p + c, where p is the part of the KV cache that is used, from 0 to 1.
        least_decode: the least of decoding.
    """

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    least_decode: float = 0.0

    def step_ms(self, prefill_tokens: int, decoding: int, used: float) -> float:
        """The time of a step.

        Args:
            prefill_tokens: tokens of prompts that the step computes.
            decoding: sequences for which the step makes a further token.
            used: the part of the KV cache that is used, from 0 to 1.
        """
        found = 0.0
        if prefill_tokens:
            a, b, c = self.prefill
            found += (a * prefill_tokens + b) * prefill_tokens + c
        if decoding:
            a, b, c = self.decode
            found += max(self.least_decode, (a * used + b) * used + c)
        return found


DYNAMO = Timing(
    prefill=(4.209989e-07, 1.518344e-02, 16.50142), decode=(-25.74, 54.01, 5.74), least_decode=1.0
)  # The polynomials of the mocker of NVIDIA Dynamo 1.6.


def linear(ttft_ms: float, prefill_token_ms: float, itl_ms: float) -> Timing:
    """`ttft_ms` and `prefill_token_ms` for each token of a prefill, and `itl_ms` for a step of decoding."""
    return Timing(prefill=(0.0, prefill_token_ms, ttft_ms), decode=(0.0, 0.0, itl_ms))

"""How long a step of the mock engine takes. Pure."""

from __future__ import annotations

import msgspec

from triton_distributed.llm.engines.mock.cache import Cache
from triton_distributed.llm.engines.mock.scheduler import Step


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """The durations of a step, in ms. A step with prefill and decoding takes both together.

    Attributes:
        prefill: a, b, c of a·t² + b·t + c, where t counts the tokens of the batch that are not cached.
        decode: a, b, c of a·p² + b·p + c, where p is the part of the KV cache that all tokens of these sequences take
            if they share none, at most 1.
        least_decode: the least of decoding.
        transfer: a, b of a·t + b for handing over the blocks of a prompt, where t counts its tokens that the other
            worker does not hold. It is no part of a step.
    """

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    least_decode: float = 0.0
    transfer: tuple[float, float] = (0.0, 0.0)

    def step_ms(self, step: Step, cache: Cache) -> float:
        """The time of a step with this cache."""
        found = 0.0
        tokens = step.prefill_tokens
        if tokens:
            a, b, c = self.prefill
            found += (a * tokens + b) * tokens + c
        if step.decoding:
            a, b, c = self.decode
            p = min(1.0, step.context_tokens / (cache.total * cache.block_tokens))
            found += max(self.least_decode, (a * p + b) * p + c)
        return found

    def transfer_ms(self, tokens: int) -> float:
        """The time to hand over the blocks of so many tokens to another worker."""
        token_ms, whole_ms = self.transfer
        return token_ms * tokens + whole_ms


DYNAMO = Timing(
    prefill=(4.209989e-07, 1.518344e-02, 16.50142),
    decode=(-25.74, 54.01, 5.74),
    least_decode=1.0,
    transfer=(0.002048, 0.0),
)
"""The polynomials of the mocker of NVIDIA Dynamo 1.6. A transfer has 128 KiB a token, at the mocker's 64 GB/s."""


def linear(ttft_ms: float, prefill_token_ms: float, itl_ms: float) -> Timing:
    """`ttft_ms` and `prefill_token_ms` for each token of a prefill, and `itl_ms` for a step of decoding."""
    return Timing(prefill=(0.0, prefill_token_ms, ttft_ms), decode=(0.0, 0.0, itl_ms))

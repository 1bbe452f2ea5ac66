"""The policies `prefix_hash` and `session`: what is alike goes to one worker, unless that has too much to do.

Both need no cache events, and all front ends choose alike. The worker is the first one in the order of a hash of the
request's name and the worker (rendezvous hashing: Thaler and Ravishankar, 1996), so few requests move when workers come
and go. Workers with too much to do are passed over (bounded loads: Mirrokni, Thorup and Zadimoghaddam, 2018).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from triton_distributed.llm.routing.view import Candidate, Question

EXCESS_S = 1.0
"""Seconds of prefill that a worker may have to do more than the one with the least, and still be chosen."""

PREFIX_TOKENS = 1024
"""Tokens of a prompt that `prefix_hash` looks at. Fewer often hold nothing but a system prompt that all have."""

_WORKER = struct.Struct("<QQ")


class PrefixHash:
    """Prompts with the same first `PREFIX_TOKENS` tokens go to one worker; short ones to that with the least to do."""

    def __call__(self, question: Question, candidates: Sequence[Candidate]) -> Candidate:
        """Choose a candidate."""
        keys = question.keys
        if not keys:
            return min(candidates, key=_to_do)
        return _by_hash(keys[min(len(keys), max(1, PREFIX_TOKENS // question.block_tokens)) - 1], candidates)


class Session:
    """The requests of one session go to one worker; those without a session as `prefix_hash` says."""

    def __init__(self) -> None:
        self._without = PrefixHash()

    def __call__(self, question: Question, candidates: Sequence[Candidate]) -> Candidate:
        """Choose a candidate."""
        if not question.session:
            return self._without(question, candidates)
        return _by_hash(xxh3_64_intdigest(question.session.encode()), candidates)


def _by_hash(name: int, candidates: Sequence[Candidate]) -> Candidate:
    most = min(each.wait_s for each in candidates) + EXCESS_S
    pack = _WORKER.pack
    return max(
        (each for each in candidates if each.wait_s <= most),
        key=lambda each: xxh3_64_intdigest(pack(each.worker[0] & 0xFFFFFFFFFFFFFFFF, each.worker[1]), name),
    )


def _to_do(candidate: Candidate) -> tuple[float, int]:
    return candidate.wait_s, candidate.waiting + candidate.running

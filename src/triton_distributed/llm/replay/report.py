"""What a replay has measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

Role = Literal["both", "prefill", "decode"]
"""What a worker does: all of a request, only prompts for others, or answers and prompts that are not handed over."""


class Spread(msgspec.Struct, frozen=True):
    """A distribution, in the unit of its values. All are 0 if there is no value."""

    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    most: float = 0.0


def spread(values: Iterable[float], counts: Iterable[int] | None = None) -> Spread:
    """The distribution of values, each of which occurs once, or as often as `counts` says."""
    pairs = sorted(zip(values, counts, strict=True)) if counts is not None else [(each, 1) for each in sorted(values)]
    number = sum(count for _, count in pairs)
    if not number:
        return Spread()
    ranks = [min(number - 1, int(number * share)) for share in (0.5, 0.9, 0.99)]
    found: list[float] = []
    passed = 0
    for value, count in pairs:
        passed += count
        while len(found) < len(ranks) and passed > ranks[len(found)]:
            found.append(value)
    mean = sum(value * count for value, count in pairs) / number
    return Spread(mean, found[0], found[1], found[2], pairs[-1][0])


class WorkerShare(msgspec.Struct, frozen=True):
    """What one worker did.

    Attributes:
        role: its pool; `both` where there are no pools.
        requests: how many it got. One that is handed over counts at both workers.
        busy: the part of the time in which it computed, from 0 to 1.
        prefill_tokens: tokens of prompts that it computed.
        cached_tokens: tokens of prompts that it had in its cache.
        preemptions: how often a request lost its blocks.
    """

    role: Role
    requests: int
    busy: float
    prefill_tokens: int
    cached_tokens: int
    preemptions: int


class PoolShare(msgspec.Struct, frozen=True):
    """What the workers of one role did.

    Attributes:
        role: theirs.
        workers: how many there are.
        busy: the part of the time in which they computed, from 0 to 1.
        prompts: how many prompts they computed.
        hit_rate: the part of these prompts' tokens that they had in their caches, from 0 to 1.
        ttft_s: seconds to the first token of these requests.
        within, goodput: of these requests; see `Report`.
    """

    role: Role
    workers: int
    busy: float
    prompts: int
    hit_rate: float
    ttft_s: Spread
    within: int
    goodput: float


class Moment(msgspec.Struct, frozen=True):
    """The queues at one time.

    Attributes:
        at_s: seconds from the beginning.
        held: requests that the router held.
        waiting: requests that waited at workers for their first output.
        running: requests with a first output, and without a last one.
    """

    at_s: float
    held: int
    waiting: int
    running: int


class Served(msgspec.Struct, frozen=True):
    """What became of one request.

    Attributes:
        worker: the number of the worker that answered, from 0 on.
        prefill_worker: the number of the prefill worker that computed its prompt; -1 if `worker` did that.
        at_s: when it came.
        ttft_s: seconds to its first token.
        e2e_s: seconds to its last token.
        prompt_tokens, cached_tokens, answer_tokens: how many.
    """

    worker: int
    prefill_worker: int
    at_s: float
    ttft_s: float
    e2e_s: float
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int

    @property
    def itl_s(self) -> float:
        """Mean seconds between two tokens of its answer; 0 for an answer of one token."""
        return (self.e2e_s - self.ttft_s) / (self.answer_tokens - 1) if self.answer_tokens > 1 else 0.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a replay.

    Attributes:
        trace, policy: the names.
        speed: how many times faster than in the trace the requests came.
        duration_s: seconds from the first arrival to the last token.
        ttft_s: seconds to the first token.
        itl_s: seconds between two tokens, over all tokens.
        e2e_s: seconds to the last token.
        hit_rate: the part of all tokens of prompts that was in a cache, from 0 to 1.
        within: requests with a first token within `ttft_sla_s`, and a mean time between tokens within `itl_sla_s`.
        goodput: these per second of `duration_s`.
        ttft_sla_s, itl_sla_s: the limits, in seconds.
        workers: what each worker did.
        pools: what the workers of each role did; one entry where there are no pools.
        moments: the queues over time.
        requests: all of them, in the order of their arrival.
    """

    trace: str
    policy: str
    speed: float
    duration_s: float
    ttft_s: Spread
    itl_s: Spread
    e2e_s: Spread
    hit_rate: float
    within: int
    goodput: float
    ttft_sla_s: float
    itl_sla_s: float
    workers: list[WorkerShare]
    pools: list[PoolShare]
    moments: list[Moment]
    requests: list[Served]

    def summary(self) -> dict[str, object]:
        """The figures without the single requests and moments, as plain values."""
        found: dict[str, object] = msgspec.to_builtins(self)
        found["requests"] = len(self.requests)
        del found["moments"]
        return found

"""What a policy sees, and what was decided. Values only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

import msgspec

from triton_distributed.names import Instance

Worker = tuple[int, int]
"""An instance's id, and the data-parallel rank inside of it (0 for an engine without ranks)."""

Mode = Literal["exact", "approximate", "off"]
"""How a worker's cache is known: by its engine's events, by what was sent to it, or not at all."""


class Question(msgspec.Struct, eq=False, kw_only=True):
    """A request that needs a worker.

    Attributes:
        tokens: of its prompt; at least 1.
        keys: of the whole blocks of its prompt; see `block_keys`.
        block_tokens: tokens in one of these blocks.
        request: the request itself, for policies of the runtime and of users.
        excluded: workers that must not get it, since they failed or refused it.
        session: names a conversation or a user, whose requests a policy may keep together; empty for none.
        since: when it came, on the router's clock.
        explain: the decision has all candidates. Without it, that of `kv` has the chosen one only, which costs less.
    """

    tokens: int
    keys: Sequence[int] = ()
    block_tokens: int = 64
    request: object = None
    excluded: Collection[Worker] = ()
    session: str = ""
    since: float = 0.0
    explain: bool = True


class Candidate(msgspec.Struct, eq=False):
    """A worker that may get the request.

    Attributes:
        worker: the worker.
        instance: its record in discovery.
        cached_tokens: tokens of the prompt that need no computing there.
        promised_tokens: the same, if also those count that requests before this one will have computed there.
        prefill_s: seconds to compute the others, `promised_tokens` taken off.
        saved_s: seconds that these save of a prefill of the whole prompt.
        wait_s: seconds of prefill that the worker has to do before.
        waiting: requests there without a first output.
        running: requests there with one.
        waiting_tokens: prompt tokens that the waiting ones have to compute.
        active_tokens: prompt tokens of the waiting and the running ones.
        kv_used: the part of its KV cache that requests hold, from 0 to 1; 0 if it does not tell.
        mode: how its cache is known.
        cost: what the policy compared; lower is better. None for a policy that compares no cost.
        unique_tokens: tokens in the blocks of the prompts there and of this one, each block counted once; only for the
            policy `kv_linear`, else 0.
    """

    worker: Worker
    instance: Instance
    cached_tokens: int = 0
    promised_tokens: int = 0
    prefill_s: float = 0.0
    saved_s: float = 0.0
    wait_s: float = 0.0
    waiting: int = 0
    running: int = 0
    waiting_tokens: int = 0
    active_tokens: int = 0
    kv_used: float = 0.0
    mode: Mode = "off"
    cost: float | None = None
    unique_tokens: int = 0


class PolicyFailed(ValueError):
    """A user's policy raised an error, or returned something else than a candidate. Field: `question`."""

    def __init__(self, question: Question, text: str) -> None:
        super().__init__(text)
        self.question = question


RoutingPolicy = Callable[[Question, Sequence[Candidate]], Candidate]
"""A policy: chooses one of the candidates, of which there is at least one. It must not wait."""


class Decision(msgspec.Struct, eq=False, kw_only=True):
    """Which worker a request gets, and why.

    Attributes:
        chosen: one of `candidates`.
        candidates: all, as the policy saw them; see `Question.explain`.
        policy: its name.
        held_s: seconds that the request was held before, because its best worker had enough to do.
        prefill: the worker that computes the prompt, if it is another one than the chosen worker.
        prefills: all workers that compute prompts for others; empty if they were not looked at.
    """

    chosen: Candidate
    candidates: Sequence[Candidate]
    policy: str
    held_s: float = 0.0
    prefill: Candidate | None = None
    prefills: Sequence[Candidate] = ()

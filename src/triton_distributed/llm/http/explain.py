"""How a request's worker was chosen, for callers that ask, and what the headers of a request say of that. Pure."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.http.bodies import ChatBody, CompletionBody
from triton_distributed.llm.http.head import Head
from triton_distributed.llm.http.pieces import to_json
from triton_distributed.llm.http.several import Merged
from triton_distributed.llm.models.answer import Answer
from triton_distributed.llm.routing.view import Candidate, Decision

ROUTE = b"x-trd-route"

IN_HEADER = 8
"""Candidates in the response header, the chosen one first. Proxies refuse long headers: nginx those above 4 KiB."""


class Wishes(NamedTuple):
    """What the headers of a request say of its way.

    Attributes:
        session: names a conversation or a user; empty for none.
        explain: `header`: the response tells how its worker was chosen; `only`: it tells nothing else, and no worker is
            asked; empty for neither.
    """

    session: str = ""
    explain: Literal["", "header", "only"] = ""

    def session_of(self, body: ChatBody | CompletionBody) -> str:
        """The session of a request: the header's, else `prompt_cache_key` or `user`."""
        return self.session or (isinstance(body, ChatBody) and body.prompt_cache_key) or body.user or ""


_NONE = Wishes()


def read_wishes(head: Head) -> Wishes:
    """Read what the headers say.

    Raises:
        InvalidParameter: the value of `x-trd-explain` is unknown.
    """
    if not head.session and not head.explain:
        return _NONE
    explain: Literal["", "header", "only"] = ""
    asked = head.explain.decode("latin-1").lower()
    if asked == "only":
        explain = "only"
    elif asked in ("1", "true"):
        explain = "header"
    elif asked not in ("", "0", "false"):
        raise InvalidParameter("x-trd-explain", f"expected 1 or only, got {asked!r}", "invalid_value")
    return Wishes(head.session.decode("latin-1"), explain)


def told(decision: Decision, tokens: int, most: int | None = None) -> bytes:
    """A decision as JSON.

    Args:
        decision: the decision.
        tokens: of the prompt.
        most: candidates that it has; None for all.
    """
    chosen = decision.chosen
    others = sorted((each for each in decision.candidates if each is not chosen), key=_order)
    shown = [chosen, *others][:most]
    found = {
        "policy": decision.policy,
        "chosen": str(chosen.worker[0]),
        "rank": chosen.worker[1],
        "tokens": tokens,
        "held_s": round(decision.held_s, 4),
        "candidates": [_told(each) for each in shown],
    }
    if len(shown) <= len(others):
        found["omitted"] = 1 + len(others) - len(shown)
    if decision.prefills:
        there = decision.prefill
        found["prefill"] = None if there is None else str(there.worker[0])
        found["prefill_rank"] = 0 if there is None else there.worker[1]
        shown = sorted(decision.prefills, key=lambda each: (each is not there, _order(each)))[:most]
        found["prefill_candidates"] = [_told(each) for each in shown]
    return to_json(found)


def route_header(source: Answer | Merged) -> tuple[tuple[bytes, bytes], ...]:
    """The response header that tells how the worker was chosen; of several answers, that of the first one."""
    answer = source.answers[0] if isinstance(source, Merged) else source
    decision = answer.decision
    return () if decision is None else ((ROUTE, told(decision, answer.tokens, IN_HEADER)),)


def _told(candidate: Candidate) -> dict[str, Any]:
    return {
        "instance": str(candidate.worker[0]),
        "rank": candidate.worker[1],
        "mode": candidate.mode,
        "cached_tokens": candidate.cached_tokens,
        "promised_tokens": candidate.promised_tokens,
        "wait_s": round(candidate.wait_s, 4),
        "prefill_s": round(candidate.prefill_s, 4),
        "waiting": candidate.waiting,
        "running": candidate.running,
        "cost": None if candidate.cost is None else round(candidate.cost, 4),
    }


def _order(candidate: Candidate) -> tuple[float, float]:
    return candidate.wait_s if candidate.cost is None else candidate.cost, candidate.wait_s

"""Which worker gets a request, by what its cache holds and what it has to do. Pure: no I/O, no clock.

A policy of your own is a function of a `Question` and its `Candidate`s: docs/llm/routing.md.
"""

from triton_distributed.llm.routing.view import Candidate, Decision, Question, RoutingPolicy

__all__ = ["Candidate", "Decision", "Question", "RoutingPolicy"]

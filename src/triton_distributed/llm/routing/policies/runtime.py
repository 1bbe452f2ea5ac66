"""The runtime's own policies, which know nothing of caches: `round_robin`, `random`, `least_loaded`, `p2c`."""

from __future__ import annotations

from collections.abc import Sequence

from triton_distributed.llm.routing.view import Candidate, Question
from triton_distributed.names import Instance
from triton_distributed.routing.load import LoadBook
from triton_distributed.routing.policies import Policy


class OfRuntime:
    """A policy of the runtime. It chooses an instance; of several ranks of that, the one with the least to do is taken.

    Args:
        policy: the policy.
        load: the requests at each instance.
    """

    def __init__(self, policy: Policy, load: LoadBook) -> None:
        self._policy, self._load = policy, load
        self._instances: tuple[Instance, ...] = ()

    def __call__(self, question: Question, candidates: Sequence[Candidate]) -> Candidate:
        """Choose a candidate."""
        instances = tuple(dict.fromkeys(each.instance for each in candidates))
        if instances == self._instances:
            instances = self._instances  # The runtime's policies know by the object that no instance came or went.
        else:
            self._instances = instances
        chosen = self._policy(question.request, instances, self._load)
        return min((each for each in candidates if each.instance == chosen), key=_to_do)


def _to_do(candidate: Candidate) -> tuple[int, float]:
    return candidate.waiting + candidate.running, candidate.wait_s

"""The policy of an answer that goes on: another instance than those that were lost or have stalled."""

from __future__ import annotations

import random
from typing import Any

from triton_distributed.llm.contract.errors import EngineStalled
from triton_distributed.names import Instance
from triton_distributed.routing.load import LoadBook
from triton_distributed.routing.policies import MetadataPolicy, Policy, policy_named


class Elsewhere:
    """Chooses among the other instances; by default the one with the fewest streams of this process.

    Args:
        policy: the caller's own; None for the default.
        model: the model's name, for the error.
    """

    def __init__(self, policy: str | Policy | MetadataPolicy | None, model: str) -> None:
        self._policy = policy
        self._chooses: Policy | None = None
        self._model = model
        self._lost: set[int] = set()
        self._stalled: dict[int, float] = {}

    def add(self, instance_id: int | None, stalled_s: float) -> None:
        """Avoid an instance: a lost one as long as there are others, a stalled one in any case.

        Args:
            instance_id: the instance; None for no one.
            stalled_s: seconds without progress; 0 for a lost instance.
        """
        if instance_id is None:
            return
        if stalled_s:
            self._stalled[instance_id] = stalled_s
        else:
            self._lost.add(instance_id)

    def __call__(self, request: Any, instances: tuple[Instance, ...], load: LoadBook) -> Instance:
        moving = tuple(each for each in instances if each.id not in self._stalled)
        if not moving:
            raise EngineStalled(self._model, max(self._stalled.values()))
        if self._chooses is None:
            self._chooses = policy_named(self._policy or "least_loaded", random.Random())
        rest = tuple(each for each in moving if each.id not in self._lost)
        return self._chooses(request, rest or moving, load)

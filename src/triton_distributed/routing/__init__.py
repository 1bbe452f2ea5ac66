"""Which instance gets a request: pure policies, what each instance is doing, and which are out of rotation."""

from triton_distributed.routing.load import LoadBook
from triton_distributed.routing.policies import (
    POLICY_NAMES,
    Direct,
    LeastLoaded,
    Policy,
    PowerOfTwoChoices,
    Random,
    RoundRobin,
    checked,
    policy_named,
)
from triton_distributed.routing.rotation import Down, Rotation

__all__ = [
    "POLICY_NAMES",
    "Direct",
    "Down",
    "LeastLoaded",
    "LoadBook",
    "Policy",
    "PowerOfTwoChoices",
    "Random",
    "Rotation",
    "RoundRobin",
    "checked",
    "policy_named",
]

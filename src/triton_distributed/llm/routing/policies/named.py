"""The routing policies by name, and those of users."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from triton_distributed.errors import ConfigError
from triton_distributed.llm.routing.policies.hashed import PrefixHash, Session
from triton_distributed.llm.routing.policies.kv import kv
from triton_distributed.llm.routing.policies.linear import KvLinear
from triton_distributed.llm.routing.policies.runtime import OfRuntime
from triton_distributed.llm.routing.view import Candidate, PolicyFailed, Question, RoutingPolicy
from triton_distributed.routing.load import LoadBook
from triton_distributed.routing.policies import POLICY_NAMES as OF_RUNTIME
from triton_distributed.routing.policies import policy_named as runtime_policy

OWN: dict[str, Callable[[random.Random], RoutingPolicy]] = {
    "kv": lambda rng: kv,
    "kv_linear": KvLinear,
    "prefix_hash": lambda rng: PrefixHash(),
    "session": lambda rng: Session(),
}

POLICY_NAMES = (*OWN, *OF_RUNTIME)

_FORM = "a function (question, candidates) -> candidate"


class Named(NamedTuple):
    """A policy with its name.

    Attributes:
        name: for explanations and metrics.
        choose: the policy.
        holds: requests wait in the router until the worker of their choice has room.
    """

    name: str
    choose: RoutingPolicy
    holds: bool


def policy_named(choice: str | RoutingPolicy, rng: random.Random, load: LoadBook) -> Named:
    """The policy that a user asked for.

    Args:
        choice: one of `POLICY_NAMES`; or a user's own policy, a function of the question and the candidates that
            returns one of these. If it has an attribute `holds` that is true, its requests are held as those of `kv`.
        rng: the random source of policies by name.
        load: the requests at each instance, for the runtime's policies.

    Raises:
        ConfigError: the choice is neither.
    """
    if isinstance(choice, str):
        if choice in OWN:
            return Named(choice, OWN[choice](rng), choice == "kv")
        if choice in OF_RUNTIME:
            return Named(choice, OfRuntime(runtime_policy(choice, rng), load), False)
        raise ConfigError("policy", choice, f"one of {', '.join(POLICY_NAMES)}, or {_FORM}")
    if isinstance(choice, type) or not callable(choice):
        raise ConfigError("policy", choice, f"one of {', '.join(POLICY_NAMES)}, or {_FORM}")
    if inspect.iscoroutinefunction(choice) or inspect.iscoroutinefunction(getattr(choice, "__call__", None)):  # noqa: B004
        raise ConfigError("policy", choice, "a policy is a plain function, because a choice must not wait: use def")
    try:
        inspect.signature(choice).bind(None, None)
    except TypeError as error:
        raise ConfigError("policy", choice, f"{error}; a policy is {_FORM}") from None
    except ValueError:  # Some callables that are written in C have no signature.
        pass
    name = getattr(choice, "__qualname__", None) or type(choice).__qualname__
    return Named(name, _checked(choice, name), bool(getattr(choice, "holds", False)))


def looks_at_load(policy: RoutingPolicy) -> bool:
    """Whether a policy looks at the `LoadBook` that it was made with."""
    return isinstance(policy, OfRuntime)


def _checked(policy: RoutingPolicy, name: str) -> RoutingPolicy:
    """The policy. It raises `PolicyFailed` with its name if it raises, or returns something else than a candidate."""

    def choose(question: Question, candidates: Sequence[Candidate]) -> Candidate:
        try:
            chosen: object = policy(question, candidates)
        except Exception as error:  # The user's policy may raise anything.
            text = f"routing policy {name} raised {type(error).__name__}: {error}"
            raise PolicyFailed(question, text) from error
        for each in candidates:
            if each is chosen:
                return each
        raise PolicyFailed(question, f"routing policy {name} returned {chosen!r:.100} instead of a candidate")

    return choose

"""Policies, which choose an instance: `(request, instances, load) -> instance`.

`instances` is never empty. A policy is called once for each attempt, on the loop's thread, and must not wait.
"""

from __future__ import annotations

import inspect
import random
from bisect import bisect_right
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

from triton_distributed.errors import ConfigError, InstanceNotFound
from triton_distributed.names import Instance
from triton_distributed.routing.load import LoadBook

Policy = Callable[[Any, tuple[Instance, ...], LoadBook], Instance]

_by_id = attrgetter("id")


class RoundRobin:
    """Each instance in turn, in the order of their ids.

    It remembers the last chosen id, not a position: however instances come and go between calls, those that stay are
    chosen equally often, plus or minus one.

    Args:
        rng: chooses the first instance, so that many clients do not begin with the same one.
    """

    __slots__ = ("_at", "_given", "_last", "_order", "_rng")

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._given: tuple[Instance, ...] = ()
        self._order: tuple[Instance, ...] = ()
        self._at = 0
        self._last: int | None = None

    def __call__(self, request: Any, instances: tuple[Instance, ...], load: LoadBook) -> Instance:
        if instances is not self._given:
            self._reorder(instances)
        at = self._at
        chosen = self._order[at]
        at += 1
        self._at = at if at < len(self._order) else 0
        self._last = chosen.id
        return chosen

    def _reorder(self, instances: tuple[Instance, ...]) -> None:
        self._given = instances
        self._order = tuple(sorted(instances, key=_by_id))
        if self._last is None:
            self._at = int(self._rng.random() * len(instances))
        else:
            self._at = bisect_right(self._order, self._last, key=_by_id) % len(instances)


class Random:
    """A random instance, each equally likely.

    Args:
        rng: the random source.
    """

    __slots__ = ("_rng",)

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def __call__(self, request: Any, instances: tuple[Instance, ...], load: LoadBook) -> Instance:
        return instances[int(self._rng.random() * len(instances))]


class LeastLoaded:
    """The instance on which this process has the fewest streams open; among equals, the next in turn."""

    __slots__ = ("_start",)

    def __init__(self) -> None:
        self._start = 0

    def __call__(self, request: Any, instances: tuple[Instance, ...], load: LoadBook) -> Instance:
        count = len(instances)
        start = self._start % count
        best, fewest = start, load[instances[start].id]
        for step in range(1, count):
            if not fewest:
                break
            at = (start + step) % count
            streams = load[instances[at].id]
            if streams < fewest:
                best, fewest = at, streams
        self._start = best + 1
        return instances[best]


class PowerOfTwoChoices:
    """The less loaded of two instances drawn at random: nearly as even as `LeastLoaded`, at a cost that does not grow.

    Source: M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 1996.

    Args:
        rng: the random source.
    """

    __slots__ = ("_rng",)

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def __call__(self, request: Any, instances: tuple[Instance, ...], load: LoadBook) -> Instance:
        count = len(instances)
        if count == 1:
            return instances[0]
        one = int(self._rng.random() * count)
        other = int(self._rng.random() * (count - 1))
        if other >= one:
            other += 1
        first, second = instances[one], instances[other]
        return second if load[second.id] < load[first.id] else first


class Direct:
    """The instance with a given id, even while it is out of rotation: the caller wants no other.

    Args:
        instance_id: the instance's id.
        path: the endpoint's path, for the error.
        known: returns all instances of the endpoint by id, as discovery lists them now.
    """

    __slots__ = ("_id", "_known", "_path")

    def __init__(self, instance_id: int, path: str, known: Callable[[], Mapping[int, Instance]]) -> None:
        self._id = instance_id
        self._path = path
        self._known = known

    def __call__(self, request: Any, instances: tuple[Instance, ...], load: LoadBook) -> Instance:
        """Return that instance.

        Raises:
            InstanceNotFound: no instance has the id; the error lists those that exist.
        """
        known = self._known()
        found = known.get(self._id)
        if found is None:
            raise InstanceNotFound(self._path, self._id, list(known))
        return found


_BUILT_IN = (RoundRobin, Random, LeastLoaded, PowerOfTwoChoices, Direct)

_NAMED: dict[str, Callable[[random.Random], Policy]] = {
    "round_robin": RoundRobin,
    "random": Random,
    "least_loaded": lambda rng: LeastLoaded(),
    "p2c": PowerOfTwoChoices,
    "power_of_two": PowerOfTwoChoices,
}

POLICY_NAMES = tuple(_NAMED)


def policy_named(choice: str | Policy, rng: random.Random) -> Policy:
    """Return the policy that a user asked for.

    Args:
        choice: one of `POLICY_NAMES`, or a user's own policy, whose result is then checked at each call.
        rng: the random source of the built-in policies.

    Raises:
        ConfigError: the choice is neither.
    """
    if isinstance(choice, str):
        make = _NAMED.get(choice)
        if make is None:
            raise ConfigError("policy", choice, f"one of {', '.join(POLICY_NAMES)}, or a function of your own")
        return make(rng)
    if isinstance(choice, _BUILT_IN):
        return choice
    if isinstance(choice, type) or not callable(choice):
        raise ConfigError(
            "policy",
            choice,
            f"one of {', '.join(POLICY_NAMES)}, or a function (request, instances, load) -> instance",
        )
    if inspect.iscoroutinefunction(choice) or inspect.iscoroutinefunction(getattr(choice, "__call__", None)):  # noqa: B004
        raise ConfigError("policy", choice, "a policy is a plain function, because a choice must not wait: use def")
    return checked(choice)


def checked(policy: Policy) -> Policy:
    """Wrap a user's policy so that its errors name it.

    The wrapper raises `TypeError` if the policy returns something other than an instance, and `ValueError` if it raises
    or returns an instance that was not offered.
    """
    name = getattr(policy, "__qualname__", None) or type(policy).__qualname__

    def choose(request: Any, instances: tuple[Instance, ...], load: LoadBook) -> Instance:
        try:
            chosen: object = policy(request, instances, load)
        except Exception as error:
            raise ValueError(f"routing policy {name} raised {type(error).__name__}: {error}") from error
        if not isinstance(chosen, Instance):
            raise TypeError(f"routing policy {name} returned {chosen!r:.100}, which is not an instance")
        if chosen not in instances:
            ids = ", ".join(str(each.id) for each in instances[:5]) + (", …" if len(instances) > 5 else "")
            raise ValueError(f"routing policy {name} returned instance {chosen.id}, but the candidates were [{ids}]")
        return chosen

    return choose

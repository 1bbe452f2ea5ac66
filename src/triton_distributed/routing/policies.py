"""Policies, which choose an instance: `(request, instances, load) -> instance`.

`instances` is never empty. A policy is called once for each attempt, on the loop's thread, and must not wait. A user's
policy may have a fourth parameter, `metadata`: the call's metadata and travelling values, as a read-only mapping.
"""

from __future__ import annotations

import inspect
import random
from bisect import bisect_right
from collections.abc import Callable, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Any, cast

from triton_distributed.compiled import caused
from triton_distributed.errors import ConfigError, InstanceNotFound
from triton_distributed.names import Instance
from triton_distributed.routing.load import LoadBook

Policy = Callable[[Any, tuple[Instance, ...], LoadBook], Instance]
MetadataPolicy = Callable[[Any, tuple[Instance, ...], LoadBook, Mapping[str, Any]], Instance]

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


class WithMetadata:
    """A user's policy that takes the metadata of each call.

    Args:
        policy: `(request, instances, load, metadata) -> instance`.
    """

    __slots__ = ("_name", "_policy")

    def __init__(self, policy: Callable[..., Instance]) -> None:
        self._policy = policy
        self._name = _name_of(policy)

    def of_call(self, metadata: Mapping[str, Any]) -> Policy:
        """The policy of one call with this metadata."""
        policy = self._policy
        return checked(lambda request, instances, load: policy(request, instances, load, metadata=metadata), self._name)

    def __call__(self, request: Any, instances: tuple[Instance, ...], load: LoadBook) -> Instance:
        """Choose for a call without metadata."""
        return self.of_call(MappingProxyType({}))(request, instances, load)


_BUILT_IN = (RoundRobin, Random, LeastLoaded, PowerOfTwoChoices, Direct, WithMetadata)

_NAMED: dict[str, Callable[[random.Random], Policy]] = {
    "round_robin": RoundRobin,
    "random": Random,
    "least_loaded": lambda rng: LeastLoaded(),
    "p2c": PowerOfTwoChoices,
    "power_of_two": PowerOfTwoChoices,
}

POLICY_NAMES = tuple(_NAMED)


def policy_named(choice: str | Policy | MetadataPolicy, rng: random.Random) -> Policy:
    """Return the policy that a user asked for.

    Args:
        choice: one of `POLICY_NAMES`, or a user's own policy, whose result is then checked at each call. A
            policy of our own that is made for one call has a true attribute `trusted`, which saves the checks.
        rng: the random source of the built-in policies.

    Raises:
        ConfigError: the choice is neither, or it takes other parameters.
    """
    if isinstance(choice, str):
        make = _NAMED.get(choice)
        if make is None:
            raise ConfigError("policy", choice, f"one of {', '.join(POLICY_NAMES)}, or a function of your own")
        return make(rng)
    if isinstance(choice, _BUILT_IN):
        return choice
    if getattr(choice, "trusted", False):
        return cast(Policy, choice)
    if isinstance(choice, type) or not callable(choice):
        raise ConfigError("policy", choice, f"one of {', '.join(POLICY_NAMES)}, or {_FORM}")
    if inspect.iscoroutinefunction(choice) or inspect.iscoroutinefunction(getattr(choice, "__call__", None)):  # noqa: B004
        raise ConfigError("policy", choice, "a policy is a plain function, because a choice must not wait: use def")
    return WithMetadata(choice) if _takes_metadata(choice) else checked(cast(Policy, choice))


_FORM = "a function (request, instances, load) -> instance, with metadata as a fourth parameter if it needs that"


def _takes_metadata(policy: Callable[..., Instance]) -> bool:
    """Whether a user's policy has a parameter `metadata`.

    Raises:
        ConfigError: the policy cannot be called with the parameters of a policy.
    """
    code = getattr(policy, "__code__", None)
    if code is not None and code.co_argcount == 3 and not code.co_kwonlyargcount and "metadata" not in code.co_varnames:
        return False  # The usual form. A call that brings its own policy does not wait 10 µs for its signature.
    try:
        signature = inspect.signature(policy)
    except ValueError:  # Some callables that are written in C have no signature.
        return False
    metadata = {"metadata": None} if "metadata" in signature.parameters else {}
    try:
        signature.bind(None, None, None, **metadata)
    except TypeError as error:
        raise caused(ConfigError("policy", policy, f"it takes {signature} ({error}); a policy is {_FORM}"), None)
    return bool(metadata)


def _name_of(policy: Callable[..., Instance]) -> str:
    return getattr(policy, "__qualname__", None) or type(policy).__qualname__


def checked(policy: Policy, name: str = "") -> Policy:
    """Wrap a user's policy so that its errors name it.

    Args:
        policy: the policy.
        name: its name; by default that of the function or class.

    The wrapper raises `TypeError` if the policy returns something other than an instance, and `ValueError` if it raises
    or returns an instance that was not offered.
    """
    name = name or _name_of(policy)

    def choose(request: Any, instances: tuple[Instance, ...], load: LoadBook) -> Instance:
        try:
            chosen: object = policy(request, instances, load)
        except Exception as error:  # The user's policy may raise anything.
            raise caused(ValueError(f"routing policy {name} raised {type(error).__name__}: {error}"), error)
        if not isinstance(chosen, Instance):
            raise TypeError(f"routing policy {name} returned {chosen!r:.100}, which is not an instance")
        if chosen not in instances:
            ids = ", ".join(str(each.id) for each in instances[:5]) + (", …" if len(instances) > 5 else "")
            raise ValueError(f"routing policy {name} returned instance {chosen.id}, but the candidates were [{ids}]")
        return chosen

    return choose

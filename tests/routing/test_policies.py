"""The policies that choose an instance."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_distributed.errors import ConfigError, InstanceNotFound
from triton_distributed.names import EndpointName, Instance
from triton_distributed.routing.load import LoadBook
from triton_distributed.routing.policies import (
    POLICY_NAMES,
    Direct,
    LeastLoaded,
    Policy,
    PowerOfTwoChoices,
    Random,
    RoundRobin,
    WithMetadata,
    checked,
    policy_named,
)

ENDPOINT = EndpointName("n", "c", "e")


def instances(*ids: int) -> tuple[Instance, ...]:
    return tuple(Instance(ENDPOINT, each, ()) for each in ids)


def loaded(**counts: int) -> LoadBook:
    book = LoadBook()
    for name, count in counts.items():
        for _ in range(count):
            book.acquire(int(name.removeprefix("i")))
    return book


def picks(policy: Policy, offered: tuple[Instance, ...], count: int, load: LoadBook | None = None) -> list[int]:
    return [policy(None, offered, load or LoadBook()).id for _ in range(count)]


ids = st.lists(st.integers(1, 50), min_size=1, max_size=8, unique=True)
seeds = st.integers(0, 1000)


def test_round_robin_takes_turns() -> None:
    chosen = picks(RoundRobin(random.Random(1)), instances(30, 10, 20), 9)
    assert chosen[:3] == chosen[3:6] == chosen[6:]
    assert sorted(chosen[:3]) == [10, 20, 30]


def test_round_robin_begins_elsewhere_in_each_client() -> None:
    first = Counter(picks(RoundRobin(random.Random(seed)), instances(1, 2, 3, 4), 1)[0] for seed in range(200))
    assert set(first) == {1, 2, 3, 4}


def test_round_robin_while_one_flaps() -> None:
    policy = RoundRobin(random.Random(0))
    chosen: Counter[int] = Counter()
    for turn in range(300):
        chosen[policy(None, instances(1, 2, 3) if turn % 2 else instances(1, 2), LoadBook()).id] += 1
    assert abs(chosen[1] - chosen[2]) <= 1


@given(
    seeds, st.lists(ids, min_size=1, max_size=30), st.lists(st.integers(51, 60), min_size=1, max_size=3, unique=True)
)
def test_round_robin_treats_those_that_stay_alike(seed: int, changing: list[list[int]], staying: set[int]) -> None:
    policy = RoundRobin(random.Random(seed))
    chosen: Counter[int] = Counter()
    for others in changing:
        chosen[policy(None, instances(*staying, *others), LoadBook()).id] += 1
        counts = [chosen[each] for each in staying]
        assert max(counts) - min(counts) <= 1


@given(seeds, ids, st.integers(1, 60))
def test_round_robin_is_even_over_a_steady_table(seed: int, steady: list[int], calls: int) -> None:
    counts = Counter(picks(RoundRobin(random.Random(seed)), instances(*steady), calls))
    assert max(counts.values()) - min(counts[each] for each in steady) <= 1


def test_random_reaches_all() -> None:
    counts = Counter(picks(Random(random.Random(5)), instances(1, 2, 3), 3000))
    assert set(counts) == {1, 2, 3}
    assert min(counts.values()) > 800


@given(st.dictionaries(st.integers(1, 50), st.integers(0, 3), min_size=1, max_size=8), st.integers(1, 20))
def test_least_loaded_takes_one_with_the_fewest(counts: dict[int, int], calls: int) -> None:
    policy, book = LeastLoaded(), loaded(**{f"i{key}": count for key, count in counts.items()})
    for _ in range(calls):
        chosen = policy(None, instances(*counts), book)
        assert book[chosen.id] == min(book[each] for each in counts)
        book.acquire(chosen.id)


def test_least_loaded_takes_turns_among_equals() -> None:
    policy = LeastLoaded()
    assert sorted(picks(policy, instances(1, 2, 3), 3)) == [1, 2, 3]
    counts = Counter(picks(LeastLoaded(), instances(1, 2, 3, 4), 300, loaded(i1=1)))
    assert counts == {2: 100, 3: 100, 4: 100}


class Drawn(random.Random):
    """Remembers what was drawn."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.drawn: list[float] = []

    def random(self) -> float:
        self.drawn.append(super().random())
        return self.drawn[-1]


@given(seeds, st.lists(st.integers(0, 9), min_size=2, max_size=8))
def test_power_of_two_never_takes_the_more_loaded_of_its_two(seed: int, counts: list[int]) -> None:
    rng = Drawn(seed)
    offered = instances(*range(1, len(counts) + 1))
    book = loaded(**{f"i{index + 1}": count for index, count in enumerate(counts)})
    chosen = PowerOfTwoChoices(rng)(None, offered, book)
    one, other = int(rng.drawn[0] * len(counts)), int(rng.drawn[1] * (len(counts) - 1))
    other += other >= one
    assert one != other
    assert chosen in (offered[one], offered[other])
    assert book[chosen.id] == min(book[offered[one].id], book[offered[other].id])


def test_power_of_two_of_one_and_of_two() -> None:
    policy = PowerOfTwoChoices(random.Random(1))
    assert picks(policy, instances(7), 3) == [7, 7, 7]
    assert set(picks(policy, instances(1, 2), 100, loaded(i1=3))) == {2}
    assert set(picks(policy, instances(1, 2, 3), 100)) == {1, 2, 3}


def test_direct() -> None:
    known = {each.id: each for each in instances(1, 2)}
    assert picks(Direct(2, "n/c/e", lambda: known), (), 2) == [2, 2], "also while it is out of rotation"
    with pytest.raises(InstanceNotFound) as caught:
        Direct(3, "n/c/e", lambda: known)(None, instances(1, 2), LoadBook())
    assert caught.value.known == (1, 2)


@given(seeds, ids, st.sampled_from(POLICY_NAMES))
def test_every_named_policy_chooses_what_was_offered(seed: int, offered: list[int], name: str) -> None:
    policy = policy_named(name, random.Random(seed))
    given_instances = instances(*offered)
    for count in range(len(offered), 0, -1):
        assert policy(None, given_instances[:count], LoadBook()) in given_instances[:count]


def first(request: Any, offered: tuple[Instance, ...], load: LoadBook) -> Instance:
    return offered[0]


async def waiting(request: Any, offered: tuple[Instance, ...], load: LoadBook) -> Instance:
    return offered[0]


class Own:
    def __call__(self, request: Any, offered: tuple[Instance, ...], load: LoadBook) -> Instance:
        assert isinstance(request, int)
        return offered[request]


def test_policy_of_the_users_own() -> None:
    rng = random.Random(1)
    assert policy_named(first, rng)(None, instances(5, 6), LoadBook()).id == 5
    assert policy_named(Own(), rng)(1, instances(5, 6), LoadBook()).id == 6
    built_in = RoundRobin(rng)
    assert policy_named(built_in, rng) is built_in


@pytest.mark.parametrize("choice", ["fastest", "", None, 3, RoundRobin, Own, waiting])
def test_what_is_no_policy_is_told_the_names(choice: Any) -> None:
    with pytest.raises(ConfigError, match=r"round_robin, random, least_loaded, p2c, power_of_two|plain function"):
        policy_named(choice, random.Random(1))


def test_policy_that_goes_wrong_is_named() -> None:
    def returns_an_id(request: Any, offered: tuple[Instance, ...], load: LoadBook) -> Any:
        return offered[0].id

    def returns_another(request: Any, offered: tuple[Instance, ...], load: LoadBook) -> Any:
        return instances(99)[0]

    def fails(request: Any, offered: tuple[Instance, ...], load: LoadBook) -> Any:
        raise KeyError("model")

    offered = instances(1, 2, 3, 4, 5, 6)
    with pytest.raises(TypeError, match=r"returns_an_id returned 1, which is not an instance"):
        checked(returns_an_id)(None, offered, LoadBook())
    with pytest.raises(
        ValueError, match=r"returns_another returned instance 99, but the candidates were \[1, 2, 3, 4, 5, …\]"
    ):
        checked(returns_another)(None, offered, LoadBook())
    with pytest.raises(ValueError, match=r"fails raised KeyError: 'model'") as raised:
        checked(fails)(None, offered, LoadBook())
    assert isinstance(raised.value.__cause__, KeyError)
    with pytest.raises(ValueError, match="policy Own raised IndexError"):
        checked(Own())(9, offered, LoadBook())


def test_a_policy_with_metadata_is_found_by_its_signature() -> None:
    def fourth(request: Any, offered: tuple[Instance, ...], load: LoadBook, metadata: Any) -> Any:
        return offered[metadata["at"]]

    def by_name(request: Any, offered: tuple[Instance, ...], load: LoadBook, *, metadata: Any = None) -> Any:
        return offered[metadata["at"]]

    def bare(*arguments: Any) -> Any:
        assert len(arguments) == 3
        return arguments[1][0]

    for policy in (fourth, by_name):
        made = policy_named(policy, random.Random(1))
        assert isinstance(made, WithMetadata)
        assert made.of_call({"at": 1})(None, instances(5, 6), LoadBook()).id == 6
        with pytest.raises(ValueError, match=rf"{policy.__name__} raised KeyError: 'at'"):
            made.of_call({})(None, instances(5, 6), LoadBook())
        with pytest.raises(ValueError, match=rf"{policy.__name__} raised KeyError: 'at'"):
            made(None, instances(5, 6), LoadBook())
    assert policy_named(bare, random.Random(1))(None, instances(5, 6), LoadBook()).id == 5


@pytest.mark.parametrize(
    "policy",
    [lambda: None, lambda request, instances: None, lambda a, b, c, d: None, lambda metadata: None],
)
def test_a_policy_with_other_parameters_is_refused_when_it_is_set(policy: Any) -> None:
    with pytest.raises(ConfigError, match=r"it takes \(.*\) .*; a policy is a function \(request, instances, load\)"):
        policy_named(policy, random.Random(1))

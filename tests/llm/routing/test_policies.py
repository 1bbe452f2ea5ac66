"""The routing policies: by name, and of users."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest

from triton_distributed.errors import ConfigError
from triton_distributed.llm.routing.policies.named import POLICY_NAMES
from triton_distributed.llm.routing.router import Router
from triton_distributed.llm.routing.view import Candidate, PolicyFailed, Question, Worker
from triton_distributed.names import EndpointName, Instance

WORKERS = [(at, 0) for at in range(1, 9)]


def routes(choice: object, workers: Sequence[Worker] = WORKERS, seed: int = 1) -> Router:
    found = Router.named(choice, random.Random(seed))  # type: ignore[arg-type]
    for worker in workers:
        found.add(worker, Instance(EndpointName("n", "c", "e"), worker[0], ("tcp://127.0.0.1:1",)))
    return found


def asked(blocks: int, first: int = 0, session: str = "") -> Question:
    return Question(tokens=64 * blocks + 1, keys=range(first, first + blocks), session=session)


def chosen(router: Router, question: Question, now: float = 0.0) -> Worker:
    decision = router.weigh(question, now)
    assert decision is not None
    return decision.chosen.worker


def booked(router: Router, question: Question, worker: Worker | None = None) -> Worker:
    decision = router.weigh(question, 0.0, None if worker is None else [worker])
    assert decision is not None
    router.book(question, decision, 0.0)
    return decision.chosen.worker


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_each_policy_spreads_requests_that_have_nothing_in_common(name: str) -> None:
    router = routes(name)
    assert router.policy == name
    counts = Counter(booked(router, asked(300, first=1000 * at, session=f"s{at}")) for at in range(64))
    assert set(counts) == set(WORKERS)
    assert max(counts.values()) <= 16


@pytest.mark.parametrize("seed", range(30))
def test_kv_chooses_the_same_whether_an_explanation_is_asked_or_not(seed: int) -> None:
    """Random caches, bookings, speeds and held requests; workers that tie, are unknown or excluded."""
    rng = random.Random(seed)
    router, bookings, now = routes("kv"), [], 0.0
    for _ in range(60):
        now += rng.random() * 0.05
        worker = rng.choice(WORKERS)
        first = rng.choice((0, 1000, 2000))
        if rng.random() < 0.3:
            router.index.store(worker, range(first, first + rng.randrange(1, 40)))
        if rng.random() < 0.1:
            router.hold(asked(rng.randrange(1, 200), 5000))
            router.leaving(now)
        question = asked(rng.choice((0, 0, 5, 40)), first)
        question.excluded = rng.sample(WORKERS, rng.choice((0, 0, 2)))
        among = rng.choice((None, [*rng.sample(WORKERS, 4), (99, 0)], [(99, 0)]))
        shown = router.weigh(question, now, among)
        question.explain = False
        plain = router.weigh(question, now, among)
        if shown is None or plain is None:
            assert shown is plain is None
            continue
        assert msgspec.structs.asdict(plain.chosen) == msgspec.structs.asdict(shown.chosen)
        assert (len(plain.candidates), len(shown.candidates) > 1) == (1, among is None or len(among) > 1)
        bookings.append(router.book(question, plain, now))
        for each in rng.sample(bookings, rng.randrange(3)) if len(bookings) > 3 else ():
            rng.choice((each.release, lambda each=each, now=now: router.first_output(each, now)))()


def test_least_loaded_counts_the_requests_of_the_router() -> None:
    router = routes("least_loaded")
    for worker in WORKERS[:-1]:
        booked(router, asked(1), worker)
    assert {chosen(router, asked(1)) for _ in range(5)} == {WORKERS[-1]}
    assert router.load is not None
    assert router.load.open() == {worker[0]: 1 for worker in WORKERS[:-1]}


def test_a_policy_of_the_runtime_takes_the_rank_with_the_least_to_do() -> None:
    router = routes("round_robin", [(1, 0), (1, 1), (2, 0)])
    counts = Counter(booked(router, asked(10, first=100 * at)) for at in range(8))
    assert counts == {(1, 0): 2, (1, 1): 2, (2, 0): 4}


def test_kv_linear_has_the_cost_of_dynamo() -> None:
    router = routes("kv_linear", [(1, 0), (2, 0)])
    router.index.store((2, 0), range(100))
    booked(router, asked(40, first=5000), (2, 0))
    decision = router.weigh(asked(100), 0.0)
    assert decision is not None
    costs = {each.worker: each.cost for each in decision.candidates}
    # (what waits + the prompt - what is cached) + the blocks there and those of the prompt
    assert costs == {(1, 0): 6401 / 64 + 100, (2, 0): (2561 + 6401 - 6400) / 64 + 40 + 100}
    assert decision.chosen.worker == (2, 0)
    bookings = [router.book(asked(100), decision, 0.0) for _ in range(3)]
    router.first_output(bookings[0], 1.0)
    again = router.weigh(asked(120), 1.0, among=[(2, 0)])
    assert again is not None
    # A block that several requests share counts once, while it is computed and afterwards.
    assert again.chosen.unique_tokens == 64 * (40 + 120)
    for each in bookings:
        each.release()
    again = router.weigh(asked(100), 2.0, among=[(2, 0)])
    assert again is not None
    assert again.chosen.unique_tokens == 64 * (40 + 100)


def test_kv_prefers_the_worker_that_keeps_fewer_tokens() -> None:
    router = routes("kv", [(1, 0), (2, 0)])
    question = asked(900)
    decision = router.weigh(question, 0.0, among=[(1, 0)])
    assert decision is not None
    router.first_output(router.book(question, decision, 0.0), 1.0)  # It decodes: nothing has to wait for it.
    assert chosen(router, asked(20, first=5000), now=1.0) == (2, 0)
    assert chosen(router, asked(900), now=1.0) == (2, 0)
    router.index.store((1, 0), range(900))
    assert chosen(router, asked(900), now=1.0) == (1, 0)


def test_equal_prefixes_meet_and_move_only_when_they_must() -> None:
    router = routes("prefix_hash")
    prompts = [asked(30, first=1000 * at) for at in range(100)]
    before = [chosen(router, each) for each in prompts]
    longer = [Question(tokens=64 * 90, keys=[*range(1000 * at, 1000 * at + 16), *range(70)]) for at in range(100)]
    assert [chosen(router, each) for each in longer] == before
    assert [chosen(routes("prefix_hash", WORKERS[::-1], seed=2), each) for each in prompts] == before
    gone = before[0]
    router.remove(gone)
    after = [chosen(router, each) for each in prompts]
    assert [b for b, a in zip(before, after, strict=True) if a != b] == [b for b in before if b == gone]


def test_a_session_stays_until_its_worker_has_too_much_to_do() -> None:
    router = routes("session")
    home = {chosen(router, asked(30, first=1000 * at, session="ann")) for at in range(20)}
    assert len(home) == 1
    worker = home.pop()
    booked(router, asked(2000, first=50_000), worker)
    other = chosen(router, asked(30, session="ann"))
    assert other != worker
    assert chosen(router, asked(40, first=77, session="ann")) == other


def test_a_policy_of_a_user() -> None:
    def most_cached(question: Question, candidates: Sequence[Candidate]) -> Candidate:
        return max(candidates, key=lambda each: each.cached_tokens)

    router = routes(most_cached)
    router.index.store((5, 0), range(10))
    assert chosen(router, asked(20)) == (5, 0)
    assert "most_cached" in router.policy
    for at in range(50):
        router.hold(asked(1000, first=1000 * at))
    left = 0
    while leaves := router.leaving(0.0):
        router.book(*leaves, 0.0)
        left += 1
    assert left == 50  # It holds no request, unless it says so.

    most_cached.holds = True  # type: ignore[attr-defined]
    router = routes(most_cached)
    for at in range(50):
        router.hold(asked(1000, first=1000 * at))
    while leaves := router.leaving(0.0):
        router.book(*leaves, 0.0)
    assert 0 < router.held < 50


def test_a_policy_that_cannot_work_is_refused_with_its_reason() -> None:
    async def later(question: Question, candidates: Sequence[Candidate]) -> Candidate:
        return candidates[0]

    for choice, word in (
        ("kv_best", "kv_linear"),
        (7, "prefix_hash"),
        (Counter, "function"),
        (later, "plain function"),
        (lambda question: None, "candidates"),
    ):
        with pytest.raises(ConfigError, match=word):
            routes(choice)


def test_errors_of_a_users_policy_name_it() -> None:
    def wrong(question: Question, candidates: Sequence[Candidate]) -> object:
        return "worker 3"

    def fails(question: Question, candidates: Sequence[Candidate]) -> Candidate:
        raise KeyError("x")

    with pytest.raises(ValueError, match=r"wrong returned 'worker 3'"):
        routes(wrong).weigh(asked(1), 0.0)
    with pytest.raises(ValueError, match=r"fails raised KeyError"):
        routes(fails).weigh(asked(1), 0.0)


def test_a_request_that_a_policy_cannot_place_blocks_no_other() -> None:
    def picky(question: Question, candidates: Sequence[Candidate]) -> Candidate:
        return candidates[0] if question.session else candidates[99]

    picky.holds = True  # type: ignore[attr-defined]
    router = routes(picky)
    bad, good = asked(1), asked(1, session="s")
    router.hold(bad)
    router.hold(good)
    with pytest.raises(PolicyFailed, match="picky raised IndexError") as failed:
        router.leaving(0.0)
    assert failed.value.question is bad
    leaves = router.leaving(0.0)
    assert leaves is not None
    assert leaves[0] is good
    assert router.held == 0

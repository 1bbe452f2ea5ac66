"""The router: costs, bookings, what it holds and in which order it leaves."""

from __future__ import annotations

import random
from collections.abc import Sequence

from triton_distributed.llm.routing.bookings import Booking
from triton_distributed.llm.routing.policies.kv import kv
from triton_distributed.llm.routing.router import AHEAD_S, LOOK, Router
from triton_distributed.llm.routing.speed import FORGETTING, PULL, SCALE, PrefillSpeed
from triton_distributed.llm.routing.view import Candidate, Question, Worker
from triton_distributed.names import EndpointName, Instance

A, B = (1, 0), (2, 0)


def router(ahead_s: float = AHEAD_S) -> Router:
    found = Router(kv, "kv", ahead_s=ahead_s)
    for worker in (A, B):
        found.add(worker, Instance(EndpointName("n", "c", "e"), worker[0], ("tcp://127.0.0.1:1",)))
    return found


def question(blocks: int, since: float = 0.0, first: int = 0) -> Question:
    return Question(tokens=64 * blocks + 1, keys=range(first, first + blocks), since=since)


def test_the_holder_of_the_prefix_gets_the_request() -> None:
    routes = router()
    routes.index.store(B, range(100))
    decision = routes.weigh(question(100), 0.0)
    assert decision is not None
    assert decision.chosen.worker == B
    by_worker = {each.worker: each for each in decision.candidates}
    assert by_worker[B].cached_tokens == 6400
    assert by_worker[A].cached_tokens == 0
    dear, cheap = by_worker[A].cost, by_worker[B].cost
    assert dear is not None
    assert cheap is not None
    assert cheap < dear


def test_the_last_token_is_always_computed() -> None:
    routes = router()
    routes.index.store(B, range(100))
    asked = Question(tokens=6400, keys=range(100))
    decision = routes.weigh(asked, 0.0)
    assert decision is not None
    assert decision.chosen.cached_tokens == 6399
    assert decision.chosen.prefill_s > 0


def test_a_queue_outweighs_a_small_saving() -> None:
    routes = router()
    routes.index.store(B, range(2))
    for at in range(5):
        decision = routes.weigh(question(500, first=1000 * at), 0.0, among=[B])
        assert decision is not None
        routes.book(question(500, first=1000 * at), decision, 0.0)
    decision = routes.weigh(question(2), 0.0)
    assert decision is not None
    assert decision.chosen.worker == A


def test_blocks_that_a_booked_request_will_compute_count() -> None:
    routes = router()
    first = routes.weigh(question(200), 0.0)
    assert first is not None
    booking = routes.book(question(200), first, 0.0)
    second = routes.weigh(question(200), 0.0)
    assert second is not None
    assert second.chosen.worker == first.chosen.worker
    assert (second.chosen.cached_tokens, second.chosen.promised_tokens) == (0, 12_800)
    booking.release()
    again = routes.weigh(question(200), 0.0)
    assert again is not None
    assert again.chosen.promised_tokens == 0


def test_bookings_leave_nothing() -> None:
    routes = router()
    for at in range(20):
        asked = question(10, first=100 * at)
        decision = routes.weigh(asked, 0.0)
        assert decision is not None
        booking = routes.book(asked, decision, float(at))
        if at % 3 == 0:
            routes.first_output(booking, at + 0.5)
            routes.first_output(booking, at + 0.6)
        booking.release()
        booking.release()
    for known in routes.workers.values():
        work = known.work
        assert (work.waiting, work.running, work.wait_s, work.promised) == ({}, 0, 0.0, {})


def test_a_request_is_held_until_its_worker_has_room() -> None:
    routes = router(ahead_s=0.5)
    bookings = []
    for at in range(40):
        routes.hold(question(500, first=1000 * at))
    while leaves := routes.leaving(1.0):
        bookings.append(routes.book(*leaves, 1.0))
    left = routes.held
    assert 0 < left < 40
    assert abs(routes.held_s - left * bookings[-1].prefill_s / len(routes.workers)) < 1e-6
    assert all(known.work.wait_s >= 0.5 for known in routes.workers.values())
    bookings[0].release()
    leaves = routes.leaving(2.0)
    assert leaves is not None
    assert leaves[1].chosen.worker == bookings[0].worker
    assert leaves[1].held_s == 2.0


def test_a_short_request_passes_a_long_one_but_not_for_ever() -> None:
    routes = router()
    long, short = question(2000, since=0.0), question(1, since=0.0, first=5000)
    blocked = [full(routes, worker) for worker in (A, B)]
    routes.hold(long)
    routes.hold(short)
    assert routes.leaving(0.1) is None
    blocked[0].release()
    leaves = routes.leaving(0.2)
    assert leaves is not None
    assert leaves[0] is short
    routes.withdraw(long)
    # A request that has waited much longer than its prefill takes is not passed by newer ones.
    long = question(2000, since=0.2)
    blocked = [full(routes, worker) for worker in (A, B)]
    routes.hold(long)
    assert routes.leaving(0.3) is None
    newer = question(1, since=999.9, first=6000)
    routes.hold(newer)
    blocked[0].release()
    leaves = routes.leaving(1000.0)
    assert leaves is not None
    assert leaves[0] is long


def full(routes: Router, worker: Worker, blocks: int = 3000) -> Booking:
    """Give a worker so much to do that nothing more is sent there."""
    asked = question(blocks, first=10_000)
    decision = routes.weigh(asked, 0.0, among=[worker])
    assert decision is not None
    return routes.book(asked, decision, 0.0)


def test_held_requests_do_not_wait_for_a_worker_that_stalls() -> None:
    routes = router()
    routes.index.store(B, range(1500))
    full(routes, B, 700)
    routes.hold(question(1500))
    assert routes.leaving(0.1) is None
    assert routes.leaving(10.0) is None
    leaves = routes.leaving(120.0)
    assert leaves is not None
    assert leaves[1].chosen.worker == A


def test_a_request_does_not_go_where_it_is_excluded() -> None:
    routes = router()
    routes.index.store(B, range(100))
    asked = question(100)
    asked.excluded = {B}
    routes.hold(asked)
    leaves = routes.leaving(0.0)
    assert leaves is not None
    assert leaves[1].chosen.worker == A
    asked.excluded = {A, B}
    routes.hold(asked)
    assert routes.leaving(1.0) is None
    assert routes.held == 1
    routes.add((3, 0), Instance(EndpointName("n", "c", "e"), 3, ("tcp://127.0.0.1:1",)))
    leaves = routes.leaving(1.1)
    assert leaves is not None
    assert leaves[1].chosen.worker == (3, 0)


def test_held_requests_of_a_worker_that_goes_get_another() -> None:
    routes = router()
    routes.index.store(B, range(1500))
    full(routes, B, 700)
    routes.hold(question(1500))
    assert routes.leaving(0.1) is None
    routes.remove(B)
    leaves = routes.leaving(0.2)
    assert leaves is not None
    assert leaves[1].chosen.worker == A
    assert routes.held == 0


def test_a_withdrawn_request_does_not_leave() -> None:
    routes = router()
    asked = question(3)
    routes.hold(asked)
    routes.withdraw(asked)
    routes.withdraw(asked)
    assert routes.leaving(0.0) is None
    assert routes.held_s == 0.0


def test_the_work_for_a_change_is_bounded_however_many_are_held() -> None:
    weighed = 0

    def counted(question: Question, candidates: Sequence[Candidate]) -> Candidate:
        nonlocal weighed
        weighed += 1
        return kv(question, candidates)

    routes = Router(counted, "counted")
    for number in range(1, 9):
        routes.add((number, 0), Instance(EndpointName("n", "c", "e"), number, ("tcp://127.0.0.1:1",)))
    booked: list[Booking] = []
    for at in range(2000):  # All in one instant.
        routes.hold(question(100 + at % 100, first=1000 * at))
    while leaves := routes.leaving(0.0):
        booked.append(routes.book(*leaves, 0.0))
    assert routes.held > 1900
    weighed, left, now = 0, 0, 0.0
    for booking in booked[:32]:
        now += 0.05
        routes.first_output(booking, now)
        before = weighed
        while leaves := routes.leaving(now):
            booked.append(routes.book(*leaves, now))
            left += 1
        assert weighed - before <= 100
    assert left


def test_no_worker_gives_no_decision() -> None:
    routes = router()
    routes.remove(A)
    routes.remove(B)
    routes.remove(B)
    assert routes.weigh(question(3), 0.0) is None
    assert router().weigh(question(3), 0.0, among=[(9, 0)]) is None


def test_a_slow_worker_is_known_from_its_first_outputs() -> None:
    routes = router()
    now = 0.0
    for at in range(60):
        # Two prompts a worker, one after the other: the second one's time begins when the first one is done.
        for worker, pace in ((A, 1.0), (B, 3.0)):
            pair = []
            for part in range(2):
                asked = question(50 + 17 * at % 100, first=1000 * (2 * at + part), since=now)
                decision = routes.weigh(asked, now, among=[worker])
                assert decision is not None
                pair.append(routes.book(asked, decision, now))
            later = now
            for booking in pair:
                later += pace * (0.02 + 20e-6 * booking.tokens)
                routes.first_output(booking, later)
                booking.release()
        now += 10.0
    fast, slow = (routes.workers[worker].speed.seconds(6000) for worker in (A, B))
    assert 0.12 < fast < 0.16
    assert 2.7 < slow / fast < 3.3


def test_a_prefill_that_was_cancelled_teaches_nothing() -> None:
    routes = router()
    known = routes.workers[A]
    for at in range(40):
        now = 10.0 * at
        long, short = (full(routes, A, blocks) for blocks in (3000, 10))
        long.at = short.at = now
        long.release()  # After 5 s, of which the short one knows nothing.
        routes.first_output(short, now + 5.1)
        short.release()
    assert known.speed.measured == 0
    clear = full(routes, A, 10)
    clear.at = 1000.0
    routes.first_output(clear, 1000.1)
    routes.first_output(full(routes, A, 10), 2000.0)
    assert known.speed.measured == 1
    assert known.work.waiting_tokens == 0


def test_many_requests_with_one_prefix_do_not_all_wait_for_its_holder() -> None:
    routes = router()
    routes.index.store(A, range(500))
    held = [Question(tokens=64 * 600, keys=[*range(500), *range(1000 * at, 1000 * at + 100)]) for at in range(200)]
    for asked in held:
        routes.hold(asked)
    sent = []
    for now in (0.0, 0.25):
        while leaves := routes.leaving(now):
            routes.book(*leaves, now)
            sent.append(leaves[1].chosen.worker)
    assert sent.count(A) > 3
    assert sent.count(B) >= 1
    assert routes.workers[A].queued_s > 0.0
    for asked in held:
        routes.withdraw(asked)
    assert routes.held == 0
    assert [known.queued_s for known in routes.workers.values()] == [0.0, 0.0]


def test_a_new_worker_is_thought_to_be_like_the_known_ones() -> None:
    routes = router()
    for at in range(50):
        routes.workers[B].speed.note(1000 + 100 * at, 1.0 + 0.1 * at)
    routes.add((3, 0), Instance(EndpointName("n", "c", "e"), 3, ("tcp://127.0.0.1:1",)))
    new = routes.workers[(3, 0)].speed
    assert abs(new.seconds(4000) / routes.workers[B].speed.seconds(4000) - 1) < 0.01
    for at in range(5):
        new.note(2000 + 100 * at, 0.05)
    assert new.seconds(2200) < 0.1


def test_the_time_of_a_prefill_is_learned() -> None:
    speed = PrefillSpeed()

    def true(tokens: int) -> float:
        return 0.05 + 40e-6 * tokens + 2e-9 * tokens**2

    for at in range(300):
        tokens = 100 + 7919 * at % 20_000
        speed.note(tokens, true(tokens))
    for tokens in (100, 5_000, 20_000, 60_000):
        assert abs(speed.seconds(tokens) / true(tokens) - 1) < 0.05
    speed.note(0, 1.0)
    speed.note(5, -1.0)
    assert speed.seconds(0) == 0.0


def test_the_learned_coefficients_are_those_of_least_squares() -> None:
    """For each that is not 0, the normal equation holds; random times make each of them negative now and then."""
    rng, zeros = random.Random(1), set()
    for _ in range(100):
        speed, measured = PrefillSpeed(), []
        for _ in range(20):
            tokens = rng.choice((51, rng.randrange(1, 60_000)))
            measured.append((tokens * SCALE, rng.choice((1e-4 + tokens * 1e-5, rng.random(), 1 / tokens))))
            speed.note(tokens, measured[-1][1])
        found = a, b, c = speed._a, speed._b, speed._c
        zeros.add(tuple(each == 0 for each in found))
        assert min(found) >= 0
        weights = [FORGETTING**at for at in reversed(range(20))]
        for power, each in enumerate(found):
            pull = PULL * sum(weights) * (each - speed._prior[power])
            slopes = [w * t**power * (a + b * t + c * t * t - s) for w, (t, s) in zip(weights, measured, strict=True)]
            assert each == 0 or abs(sum(slopes) + pull) < 1e-6 * sum(map(abs, slopes))
    assert len(zeros) >= 4


def test_prompts_of_one_length_leave_a_sensible_curve() -> None:
    speed = PrefillSpeed()
    for _ in range(200):
        speed.note(8_000, 0.5)
    assert abs(speed.seconds(8_000) - 0.5) < 0.01
    curve = [speed.seconds(tokens) for tokens in (1, 500, 8_000, 60_000)]
    assert curve == sorted(curve)
    assert curve[0] > 0.0


def test_a_long_request_does_not_take_the_place_that_shorter_ones_wait_for() -> None:
    """At most `LOOK` shorter ones that wait for a busy worker are passed, unless a worker has nothing to do."""
    routes = router()
    routes.index.store(B, range(1500))
    full(routes, B)
    full(routes, A, 300)  # It has something to do, and room for more.
    for at in range(LOOK):
        routes.hold(Question(tokens=64 * 1500 + 1, keys=range(1500), since=at / 100))
    assert routes.leaving(0.1) is None
    long = question(2000, since=0.1, first=5000)
    routes.hold(long)
    assert routes.leaving(0.1) is None
    assert routes.leaving(0.5) is None
    for booking in [*routes.workers[A].work.waiting]:
        booking.release()
    leaves = routes.leaving(0.6)
    assert leaves is not None
    assert leaves[0] is long
    assert leaves[1].chosen.worker == A
    assert routes.held == LOOK


def test_requests_that_wait_for_a_busy_worker_are_not_weighed_at_each_change() -> None:
    weighed = 0

    def counted(question: Question, candidates: Sequence[Candidate]) -> Candidate:
        nonlocal weighed
        weighed += 1
        return kv(question, candidates)

    routes = Router(counted, "counted")
    for worker in (A, B):
        routes.add(worker, Instance(EndpointName("n", "c", "e"), worker[0], ("tcp://127.0.0.1:1",)))
    routes.index.store(B, range(1500))
    full(routes, B)
    full(routes, A, 300)
    for at in range(500):
        routes.hold(Question(tokens=64 * 1500 + 1, keys=range(1500), since=at / 1000))
    while weighed < 500:  # A part of those that have come in each call.
        assert routes.leaving(1.0) is None
    weighed = 0
    for at in range(20):
        routes.workers[A].work.freed = True
        assert routes.leaving(1.0 + at / 100) is None
    assert weighed == 0
    assert routes.leaving(1.5) is None
    assert 0 < weighed <= LOOK

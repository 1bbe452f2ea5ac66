"""The router: costs, bookings, what it holds and in which order it leaves."""

from __future__ import annotations

from triton_distributed.llm.routing.policies.kv import kv
from triton_distributed.llm.routing.router import Router
from triton_distributed.llm.routing.speed import PrefillSpeed
from triton_distributed.llm.routing.view import Question
from triton_distributed.names import EndpointName, Instance

A, B = (1, 0), (2, 0)


def router(**options: float) -> Router:
    found = Router(kv, "kv", **options)  # type: ignore[arg-type]
    for worker in (A, B):
        found.add(worker, Instance(EndpointName("n", "c", "e"), worker[0], ("tcp://127.0.0.1:1",)))
    return found


def question(blocks: int, since: float = 0.0, first: int = 0) -> Question:
    return Question(tokens=64 * blocks + 1, keys=range(first, first + blocks), since=since)


def test_the_holder_of_the_prefix_gets_the_request() -> None:
    routes = router()
    routes.index.store(B, range(100))
    decision = routes.weigh(question(100))
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
    decision = routes.weigh(asked)
    assert decision is not None
    assert decision.chosen.cached_tokens == 6399
    assert decision.chosen.prefill_s > 0


def test_a_queue_outweighs_a_small_saving() -> None:
    routes = router()
    routes.index.store(B, range(2))
    for at in range(5):
        decision = routes.weigh(question(500, first=1000 * at), among=[B])
        assert decision is not None
        routes.book(question(500, first=1000 * at), decision, 0.0)
    decision = routes.weigh(question(2))
    assert decision is not None
    assert decision.chosen.worker == A


def test_blocks_that_a_booked_request_will_compute_count() -> None:
    routes = router()
    first = routes.weigh(question(200))
    assert first is not None
    booking = routes.book(question(200), first, 0.0)
    second = routes.weigh(question(200))
    assert second is not None
    assert second.chosen.worker == first.chosen.worker
    assert (second.chosen.cached_tokens, second.chosen.promised_tokens) == (0, 12_800)
    booking.release()
    again = routes.weigh(question(200))
    assert again is not None
    assert again.chosen.promised_tokens == 0


def test_bookings_leave_nothing() -> None:
    routes = router()
    for at in range(20):
        asked = question(10, first=100 * at)
        decision = routes.weigh(asked)
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
    assert all(known.work.wait_s >= 0.5 for known in routes.workers.values())
    bookings[0].release()
    leaves = routes.leaving(2.0)
    assert leaves is not None
    assert leaves[1].chosen.worker == bookings[0].worker
    assert leaves[1].held_s == 2.0


def test_a_short_request_passes_a_long_one_but_not_for_ever() -> None:
    long, short = question(2000, since=0.0), question(1, since=0.0, first=5000)
    routes = router()
    routes.hold(long)
    routes.hold(short)
    for known in routes.workers.values():
        known.work.wait_s = 10.0
    assert routes.leaving(0.0) is None
    blocked = [known.work for known in routes.workers.values()]
    order = []
    routes._held.update({long: 1.0, short: 0.02})
    for work in blocked:
        work.wait_s = 0.0
    leaves = routes.leaving(0.1)
    assert leaves is not None
    order.append(leaves[0])
    assert order == [short]
    # Newer short requests do not pass a request that has waited much longer than its prefill takes.
    newer = question(1, since=999.0, first=6000)
    routes.hold(newer)
    routes._held[newer] = 0.02
    leaves = routes.leaving(1000.0)
    assert leaves is not None
    assert leaves[0] is long


def test_a_withdrawn_request_does_not_leave() -> None:
    routes = router()
    asked = question(3)
    routes.hold(asked)
    routes.withdraw(asked)
    routes.withdraw(asked)
    assert routes.leaving(0.0) is None


def test_no_worker_gives_no_decision() -> None:
    routes = router()
    routes.remove(A)
    routes.remove(B)
    routes.remove(B)
    assert routes.weigh(question(3)) is None
    assert router().weigh(question(3), among=[(9, 0)]) is None


def test_the_time_of_a_prefill_is_learned() -> None:
    speed = PrefillSpeed()

    def true(tokens: int) -> float:
        return 0.05 + 40e-6 * tokens + 2e-9 * tokens**2

    for at in range(300):
        tokens = 100 + 7919 * at % 20_000
        speed.note(tokens, true(tokens))
    for tokens in (100, 5_000, 20_000):
        assert abs(speed.seconds(tokens) / true(tokens) - 1) < 0.05
    speed.note(0, 1.0)
    speed.note(5, -1.0)
    assert speed.seconds(0) == 0.0

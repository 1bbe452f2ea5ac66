"""A trace in virtual time: mock engines, with the router, the policies and the pools of production.

The same input gives the same report.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence as Keys
from heapq import heappop, heappush
from itertools import islice
from typing import NamedTuple

from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.engines.mock.cache import Cache
from triton_distributed.llm.engines.mock.kv_events import BlockRemoved, BlockStored, Key
from triton_distributed.llm.engines.mock.scheduler import Scheduler, Sequence, Step
from triton_distributed.llm.engines.mock.timing import DYNAMO, Timing
from triton_distributed.llm.replay.report import Moment, PoolShare, Report, Role, Served, WorkerShare, spread
from triton_distributed.llm.replay.trace import Trace, TraceRequest
from triton_distributed.llm.routing.bookings import Booking
from triton_distributed.llm.routing.keys import indexed_tokens
from triton_distributed.llm.routing.router import Router
from triton_distributed.llm.routing.split import split, taker, transfer_speed
from triton_distributed.llm.routing.view import Question, RoutingPolicy, Worker
from triton_distributed.names import EndpointName, Instance

MOMENTS = 400
"""How often the queues are noted while requests come."""

_ENDPOINT = EndpointName("replay", "model", "generate")


def simulate(
    trace: Trace,
    policy: str | RoutingPolicy = "kv",
    *,
    workers: int = 8,
    prefill: int = 0,
    speed: float = 1.0,
    timing: Timing = DYNAMO,
    blocks: int = 16_384,
    block_tokens: int = 64,
    slots: int = 256,
    batch_tokens: int = 8192,
    ttft_sla_s: float = 2.0,
    itl_sla_s: float = 0.2,
    seed: int = 0,
) -> Report:
    """Replay a trace over mock engines.

    Args:
        trace: the requests.
        policy: a name, or a function as `RoutingPolicy` describes it.
        workers: how many there are.
        prefill: how many of them only compute prompts, for the others to go on with. See `routing.split`.
        speed: how many times faster than in the trace the requests come.
        timing: how long the steps of an engine take.
        blocks, block_tokens, slots, batch_tokens: of each engine; see `MockEngine`.
        ttft_sla_s, itl_sla_s: the limits for goodput, in seconds.
        seed: of policies that choose at random.

    Raises:
        InvalidParameter: a value is invalid, or a request of the trace does not fit in an engine's cache.
        ConfigError: there is no such policy.
    """
    least_one = {
        "workers": workers,
        "blocks": blocks,
        "block_tokens": block_tokens,
        "slots": slots,
        "batch_tokens": batch_tokens,
    }
    for name, value in least_one.items():
        if value < 1:
            raise InvalidParameter(name, f"expected at least 1, got {value}")
    if not 0 <= prefill < workers:
        raise InvalidParameter("prefill", f"expected less than the {workers} workers, and at least 0, got {prefill}")
    if not 0 < speed < math.inf:
        raise InvalidParameter("speed", f"expected a number above 0, got {speed:g}")
    joined = indexed_tokens(block_tokens)
    if trace.block_tokens % joined:
        several = f", which the index joins to {joined}," if joined > block_tokens else ""
        reason = f"blocks of {block_tokens} tokens{several} do not divide the trace's {trace.block_tokens}"
        raise InvalidParameter("block_tokens", reason)
    longest = max(each.prompt_tokens + each.answer_tokens for each in trace.requests)
    if longest > blocks * block_tokens:
        raise InvalidParameter("blocks", f"a request's {longest} tokens do not fit in the {blocks} blocks of an engine")
    rng = random.Random(seed)
    router = Router.named(policy, rng)
    prefills = Router.named(policy, rng) if prefill else None
    engines = []
    for number in range(workers):
        scheduler = Scheduler(Cache(blocks, block_tokens, record=True), slots, batch_tokens)
        if prefills is None:
            engines.append(_Engine(number, "both", router, scheduler, timing))
        elif number < prefill:
            engines.append(_Engine(number, "prefill", prefills, scheduler, timing))
        else:
            engines.append(_Engine(number, "decode", router, scheduler, timing))
    run = _Run(trace, router, prefills, engines, speed, joined)
    run.to_the_end()
    served = run.served()
    duration = max((each.at_s + each.e2e_s for each in served), default=0.0) - served[0].at_s
    shares = [each.share(duration) for each in engines]

    def in_time(of: list[Served]) -> int:
        return sum(1 for each in of if each.ttft_s <= ttft_sla_s and each.itl_s <= itl_sla_s)

    within = in_time(served)
    pools = []
    for role in dict.fromkeys(each.role for each in engines):
        its = [each for each in shares if each.role == role]
        of = [each for each in served if (each.prefill_worker >= 0) == (role == "prefill")]
        pools.append(
            PoolShare(
                role,
                len(its),
                sum(each.busy for each in its) / len(its),
                len(of),
                sum(each.cached_tokens for each in of) / max(1, sum(each.prompt_tokens for each in of)),
                spread(each.ttft_s for each in of),
                in_time(of),
                in_time(of) / duration if duration else 0.0,
            )
        )
    return Report(
        trace=trace.name,
        policy=router.policy,
        speed=speed,
        duration_s=duration,
        ttft_s=spread(each.ttft_s for each in served),
        itl_s=spread(run.gaps, run.gaps.values()),
        e2e_s=spread(each.e2e_s for each in served),
        hit_rate=sum(each.cached_tokens for each in served) / sum(each.prompt_tokens for each in served),
        within=within,
        goodput=within / duration if duration else 0.0,
        ttft_sla_s=ttft_sla_s,
        itl_sla_s=itl_sla_s,
        workers=shares,
        pools=pools,
        moments=run.moments,
        requests=served,
    )


class _Request:
    """A request on its way."""

    __slots__ = (
        "booking",
        "cached_tokens",
        "end_s",
        "engine",
        "first_s",
        "keys",
        "of",
        "prefiller",
        "question",
        "sent_s",
        "sent_tokens",
        "token_s",
    )

    def __init__(self, of: TraceRequest, keys: Keys[Key]) -> None:
        self.of, self.keys = of, keys
        self.question: Question | None = None  # While a prefill worker computes its prompt.
        self.booking: Booking | None = None
        self.cached_tokens = 0  # Those of its prompt, where that was computed.
        self.sent_tokens, self.sent_s = 0, -1.0  # Those of its prompt that were handed over, and since when.
        self.engine = self.prefiller = -1  # The numbers of the engine that answers, and of the prefill worker.
        self.first_s = self.end_s = -1.0
        self.token_s = -1.0  # When its last token came, while it is preempted, however often before the next one.


class _Engine:
    """An engine of the simulation, its router, and what it did."""

    def __init__(self, number: int, role: Role, router: Router, scheduler: Scheduler, timing: Timing) -> None:
        self.number, self.role = number, role
        self.worker: Worker = (number + 1, 0)
        self.instance = Instance(_ENDPOINT, number + 1, (f"memory://{number}",))
        self.router, self.scheduler, self.timing = router, scheduler, timing
        self.step: Step | None = None  # The one that it computes now.
        self.requests = self.prefill_tokens = 0
        self.busy_s = 0.0
        router.add(self.worker, self.instance).mode = "exact"

    def share(self, duration_s: float) -> WorkerShare:
        """What it did."""
        scheduler = self.scheduler
        return WorkerShare(
            self.role,
            self.requests,
            self.busy_s / duration_s if duration_s else 0.0,
            self.prefill_tokens,
            scheduler.cached_tokens,
            scheduler.preemptions,
        )


class _HandOver(NamedTuple):
    """The blocks of a computed prompt on their way.

    Attributes:
        request: whose prompt it is.
        source: the prefill worker.
        kept: the sequence that keeps the blocks there.
        target: the worker that goes on.
    """

    request: _Request
    source: _Engine
    kept: Sequence
    target: _Engine


class _Run:
    """The events of a replay, one after the other."""

    def __init__(
        self,
        trace: Trace,
        router: Router,
        prefills: Router | None,
        engines: list[_Engine],
        speed: float,
        joined: int,
    ) -> None:
        self.gaps: dict[float, int] = {}  # Seconds between two tokens, and how often.
        self.moments: list[Moment] = []
        self._trace, self._engines, self._speed = trace, engines, speed
        self._router, self._prefills = router, prefills
        self._routers = (router,) if prefills is None else (router, prefills)
        self._transfer = transfer_speed()
        self._block_tokens = engines[0].scheduler.cache.block_tokens
        self._joined = joined  # Tokens in a block of the index.
        self._requests: list[_Request] = []
        self._of: dict[Sequence, _Request] = {}
        # When a step ends, a number, where, and how long it took; or when a hand-over ends.
        self._ends: list[tuple[float, int, _Engine, float] | tuple[float, int, _HandOver, float]] = []
        self._number = 0  # Of the last one of these.
        self._waiting = self._running = (
            0  # Requests without and with a first token, of those that have left the router.
        )
        self._answer_key = 1 << 62  # Blocks of answers have keys that no prompt has.

    def to_the_end(self) -> None:
        """Let all requests come and end."""
        coming = self._trace.requests
        last_s = coming[-1].at_s / self._speed
        every_s, noted_s = max(last_s / MOMENTS, 1e-3), 0.0
        at, ends = 0, self._ends
        while at < len(coming) or ends:
            arrival_s = coming[at].at_s / self._speed if at < len(coming) else math.inf
            if ends and ends[0][0] <= arrival_s:
                now, _, ended, took_s = heappop(ends)
                if isinstance(ended, _HandOver):
                    self._handed_over(ended, now)
                    self._leave(now, ended.source, ended.target)
                else:
                    self._step_ended(ended, now, took_s)
                    self._leave(now, ended)
            else:
                now = arrival_s
                self._arrive(coming[at], now)
                at += 1
                self._leave(now)
            if now >= noted_s:
                self._note(now)
                noted_s = now + every_s
        assert not any(each.held for each in self._routers), "workers that do nothing have room"

    def served(self) -> list[Served]:
        """What became of the requests, in the order of their arrival."""
        return [
            Served(
                each.engine,
                each.prefiller,
                each.of.at_s / self._speed,
                each.first_s - each.of.at_s / self._speed,
                each.end_s - each.of.at_s / self._speed,
                each.of.prompt_tokens,
                each.cached_tokens,
                each.of.answer_tokens,
            )
            for each in self._requests
        ]

    def _arrive(self, of: TraceRequest, now: float) -> None:
        size = self._block_tokens
        keys = self._trace.keys(of, size)
        parts = self._joined // size
        question = Question(
            tokens=of.prompt_tokens, keys=keys[parts - 1 :: parts], block_tokens=self._joined, since=now
        )
        answer = (of.prompt_tokens + of.answer_tokens) // size - len(keys)
        keys = [*keys, *range(self._answer_key, self._answer_key + answer)]
        self._answer_key += answer
        request = question.request = _Request(of, keys)
        self._requests.append(request)
        router = self._router
        if self._prefills is not None:
            here, there = self._router.weigh(question, now), self._prefills.weigh(question, now)
            assert here is not None
            assert there is not None
            held_s = self._router.held_s, self._prefills.held_s
            if split(question, here.chosen, there.chosen, here.candidates, self._transfer, held_s) is not None:
                router = self._prefills
        router.hold(question)

    def _leave(self, now: float, *changed: _Engine) -> None:
        """Send as many requests as the routers give, and begin the steps of engines that compute nothing."""
        idle = {each.number: each for each in changed if each.step is None}
        for router in self._routers:
            while (found := router.leaving(now)) is not None:
                question, decision = found
                request = question.request
                assert isinstance(request, _Request)
                engine = self._engines[decision.chosen.worker[0] - 1]
                request.booking = router.book(question, decision, now)
                request.engine = engine.number
                handed_over = router is self._prefills
                if handed_over:
                    request.prefiller, request.question = engine.number, question
                answer_tokens = 1 if handed_over else request.of.answer_tokens
                sequence = Sequence(question.tokens, answer_tokens, request.keys, keeps=handed_over)
                request.keys = ()
                self._waiting += 1
                self._send(request, sequence, engine)
                if engine.step is None:
                    idle[engine.number] = engine
        for engine in idle.values():
            self._begin_step(engine, now)

    def _send(self, request: _Request, sequence: Sequence, engine: _Engine) -> None:
        self._of[sequence] = request
        engine.requests += 1
        engine.scheduler.add(sequence)

    def _begin_step(self, engine: _Engine, now: float) -> None:
        scheduler = engine.scheduler
        if not (scheduler.waiting or scheduler.running):
            return
        preemptions = scheduler.preemptions
        step = scheduler.step()
        if step.empty:  # Until a hand-over ends.
            return
        engine.step = step
        for sequence in islice(scheduler.waiting, scheduler.preemptions - preemptions):
            request = self._of[sequence]
            if request.token_s < 0:
                request.token_s = now
        self._apply_events(engine)
        took_s = engine.timing.step_ms(step, scheduler.cache) / 1000
        self._number += 1
        heappush(self._ends, (now + took_s, self._number, engine, took_s))

    def _step_ended(self, engine: _Engine, now: float, took_s: float) -> None:
        step, router = engine.step, engine.router
        assert step is not None
        engine.step = None
        engine.busy_s += took_s
        engine.prefill_tokens += step.prefill_tokens
        gaps, decoding = self.gaps, step.decoding
        for sequence in step.prefilled:
            request = self._of[sequence]
            assert request.booking is not None
            if sequence.keeps:
                request.cached_tokens = sequence.cached_tokens
                router.first_output(request.booking, now, sequence.cached_tokens)
                continue  # The first token that counts comes from the worker that goes on.
            if sequence.fetched:
                decoding -= 1  # It computes one token like those that decode.
                self._transfer.note(request.sent_tokens, now - request.sent_s)
            if request.first_s < 0:
                request.first_s, request.token_s = now, -1.0
                self._waiting -= 1
                self._running += 1
                if not sequence.fetched:
                    request.cached_tokens = sequence.cached_tokens
                    router.first_output(request.booking, now, sequence.cached_tokens)
            else:
                gap_s, request.token_s = now - request.token_s, -1.0
                gaps[gap_s] = gaps.get(gap_s, 0) + 1
        if decoding:
            gaps[took_s] = gaps.get(took_s, 0) + decoding
        for sequence in engine.scheduler.complete(step):
            request = self._of.pop(sequence)
            assert request.booking is not None
            request.booking.release()
            request.booking = None
            if sequence.keeps:
                self._hand_over(request, engine, sequence, now)
                continue
            request.end_s = now
            self._running -= 1
            sequence.keys = ()

    def _hand_over(self, request: _Request, source: _Engine, kept: Sequence, now: float) -> None:
        """Choose the worker that goes on with a computed prompt, and send it the blocks."""
        router, question = self._router, request.question
        assert question is not None
        request.question = None
        decision = router.weigh(question, now)
        assert decision is not None
        chosen = taker(question, decision.candidates, self._transfer)
        assert chosen is not None
        target = self._engines[chosen.worker[0] - 1]
        tokens = question.tokens - chosen.cached_tokens
        request.booking = router.book_computed(chosen.worker, question.tokens, now)
        request.engine, request.sent_tokens, request.sent_s = target.number, tokens, now
        due = now + source.timing.transfer_ms(tokens) / 1000
        self._number += 1
        heappush(self._ends, (due, self._number, _HandOver(request, source, kept, target), 0.0))

    def _handed_over(self, done: _HandOver, now: float) -> None:
        done.source.scheduler.remove(done.kept)
        self._apply_events(done.source)
        of = done.request.of
        rest = Sequence(of.prompt_tokens, of.answer_tokens, done.kept.keys, fetched=True)
        done.kept.keys = ()
        self._send(done.request, rest, done.target)

    def _apply_events(self, engine: _Engine) -> None:
        """Tell the router's index what has changed in an engine's cache."""
        index, parts = engine.router.index, self._joined // self._block_tokens
        for event in engine.scheduler.cache.take_events():
            if isinstance(event, BlockStored):
                index.store(engine.worker, _joined(event.block_hashes, parts))
            elif isinstance(event, BlockRemoved):
                index.discard(engine.worker, _joined(event.block_hashes, parts))

    def _note(self, now: float) -> None:
        held = sum(each.held for each in self._routers)
        self.moments.append(Moment(now, held, self._waiting, self._running))


def _joined(keys: list[Key], parts: int) -> list[int]:
    """The keys of whole blocks of the index: those of the last of `parts` blocks of the engine."""
    return [key for key in keys if isinstance(key, int) and (key + 1) % parts == 0]

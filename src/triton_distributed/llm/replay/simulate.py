"""A trace in virtual time: mock engines, with the router and policies of production.

The same input gives the same report.
"""

from __future__ import annotations

import math
import random
from heapq import heappop, heappush
from itertools import islice

from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.engines.mock.cache import Cache
from triton_distributed.llm.engines.mock.kv_events import BlockRemoved, BlockStored, Key
from triton_distributed.llm.engines.mock.scheduler import Scheduler, Sequence, Step
from triton_distributed.llm.engines.mock.timing import DYNAMO, Timing
from triton_distributed.llm.replay.report import Moment, Report, Served, WorkerShare, spread
from triton_distributed.llm.replay.trace import Trace, TraceRequest
from triton_distributed.llm.routing.bookings import Booking
from triton_distributed.llm.routing.keys import indexed_tokens
from triton_distributed.llm.routing.router import Router
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
    router = Router.named(policy, random.Random(seed))
    engines = [_Engine(number, blocks, block_tokens, slots, batch_tokens, timing) for number in range(workers)]
    run = _Run(trace, router, engines, speed, joined)
    run.to_the_end()
    served = run.served()
    duration = max((each.at_s + each.e2e_s for each in served), default=0.0) - served[0].at_s
    within = sum(1 for each in served if each.ttft_s <= ttft_sla_s and each.itl_s <= itl_sla_s)
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
        workers=[each.share(duration) for each in engines],
        moments=run.moments,
        requests=served,
    )


class _Request:
    """A request on its way."""

    __slots__ = ("booking", "end_s", "engine", "first_s", "of", "sequence", "token_s")

    def __init__(self, of: TraceRequest, sequence: Sequence) -> None:
        self.of, self.sequence = of, sequence
        self.booking: Booking | None = None
        self.engine = -1
        self.first_s = self.end_s = -1.0
        self.token_s = 0.0  # When its last token came, while it is preempted.


class _Engine:
    """An engine of the simulation, and what it did."""

    def __init__(
        self, number: int, blocks: int, block_tokens: int, slots: int, batch_tokens: int, timing: Timing
    ) -> None:
        self.number = number
        self.worker: Worker = (number + 1, 0)
        self.instance = Instance(_ENDPOINT, number + 1, (f"memory://{number}",))
        self.scheduler = Scheduler(Cache(blocks, block_tokens, record=True), slots, batch_tokens)
        self.timing = timing
        self.step: Step | None = None  # The one that it computes now.
        self.requests = self.prefill_tokens = 0
        self.busy_s = 0.0

    def share(self, duration_s: float) -> WorkerShare:
        """What it did."""
        scheduler = self.scheduler
        return WorkerShare(
            self.requests,
            self.busy_s / duration_s if duration_s else 0.0,
            self.prefill_tokens,
            scheduler.cached_tokens,
            scheduler.preemptions,
        )


class _Run:
    """The events of a replay, one after the other."""

    def __init__(self, trace: Trace, router: Router, engines: list[_Engine], speed: float, joined: int) -> None:
        self.gaps: dict[float, int] = {}  # Seconds between two tokens, and how often.
        self.moments: list[Moment] = []
        self._trace, self._router, self._engines, self._speed = trace, router, engines, speed
        self._block_tokens = engines[0].scheduler.cache.block_tokens
        self._joined = joined  # Tokens in a block of the index.
        self._requests: list[_Request] = []
        self._of: dict[Sequence, _Request] = {}
        self._ends: list[tuple[float, int, _Engine, float]] = []  # Of steps: when, a number, where, how long it took.
        self._steps = 0
        self._running = 0
        self._answer_key = 1 << 62  # Blocks of answers have keys that no prompt has.
        for engine in engines:
            router.add(engine.worker, engine.instance).mode = "exact"

    def to_the_end(self) -> None:
        """Let all requests come and end."""
        coming = self._trace.requests
        last_s = coming[-1].at_s / self._speed
        every_s, noted_s = max(last_s / MOMENTS, 1e-3), 0.0
        at, ends = 0, self._ends
        while at < len(coming) or ends:
            arrival_s = coming[at].at_s / self._speed if at < len(coming) else math.inf
            if ends and ends[0][0] <= arrival_s:
                now, _, engine, took_s = heappop(ends)
                self._step_ended(engine, now, took_s)
                self._leave(now, engine)
            else:
                now = arrival_s
                self._arrive(coming[at], now)
                at += 1
                self._leave(now)
            if now >= noted_s:
                self._note(now)
                noted_s = now + every_s
        assert not self._router.held, "workers that do nothing have room"

    def served(self) -> list[Served]:
        """What became of the requests, in the order of their arrival."""
        return [
            Served(
                each.engine,
                each.of.at_s / self._speed,
                each.first_s - each.of.at_s / self._speed,
                each.end_s - each.of.at_s / self._speed,
                each.of.prompt_tokens,
                each.sequence.cached_tokens,
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
        request = question.request = _Request(of, Sequence(of.prompt_tokens, of.answer_tokens, keys))
        self._requests.append(request)
        self._router.hold(question)

    def _leave(self, now: float, ended: _Engine | None = None) -> None:
        """Send as many requests as the router gives, and begin the steps of engines that compute nothing."""
        router = self._router
        idle = {} if ended is None else {ended.number: ended}
        while (found := router.leaving(now)) is not None:
            question, decision = found
            request = question.request
            assert isinstance(request, _Request)
            engine = self._engines[decision.chosen.worker[0] - 1]
            request.booking = router.book(question, decision, now)
            request.engine = engine.number
            self._of[request.sequence] = request
            engine.requests += 1
            engine.scheduler.add(request.sequence)
            if engine.step is None:
                idle[engine.number] = engine
        for engine in idle.values():
            self._begin_step(engine, now)

    def _begin_step(self, engine: _Engine, now: float) -> None:
        scheduler = engine.scheduler
        if not (scheduler.waiting or scheduler.running):
            return
        preemptions = scheduler.preemptions
        step = engine.step = scheduler.step()
        for sequence in islice(scheduler.waiting, scheduler.preemptions - preemptions):
            self._of[sequence].token_s = now
        self._apply_events(engine)
        took_s = engine.timing.step_ms(step, scheduler.cache) / 1000
        self._steps += 1
        heappush(self._ends, (now + took_s, self._steps, engine, took_s))

    def _step_ended(self, engine: _Engine, now: float, took_s: float) -> None:
        step, router = engine.step, self._router
        assert step is not None
        engine.step = None
        engine.busy_s += took_s
        engine.prefill_tokens += step.prefill_tokens
        gaps = self.gaps
        if step.decoding:
            gaps[took_s] = gaps.get(took_s, 0) + step.decoding
        for sequence in step.prefilled:
            request = self._of[sequence]
            if request.first_s < 0:
                request.first_s = now
                self._running += 1
                assert request.booking is not None
                router.first_output(request.booking, now, sequence.cached_tokens)
            else:
                gap_s = now - request.token_s
                gaps[gap_s] = gaps.get(gap_s, 0) + 1
        for sequence in engine.scheduler.complete(step):
            request = self._of.pop(sequence)
            request.end_s = now
            self._running -= 1
            assert request.booking is not None
            request.booking.release()
            request.booking = None
            sequence.keys = ()

    def _apply_events(self, engine: _Engine) -> None:
        """Tell the router's index what has changed in an engine's cache."""
        index, parts = self._router.index, self._joined // self._block_tokens
        for event in engine.scheduler.cache.take_events():
            if isinstance(event, BlockStored):
                index.store(engine.worker, _joined(event.block_hashes, parts))
            elif isinstance(event, BlockRemoved):
                index.discard(engine.worker, _joined(event.block_hashes, parts))

    def _note(self, now: float) -> None:
        held = self._router.held
        self.moments.append(Moment(now, held, len(self._of) - self._running, self._running))


def _joined(keys: list[Key], parts: int) -> list[int]:
    """The keys of whole blocks of the index: those of the last of `parts` blocks of the engine."""
    return [key for key in keys if isinstance(key, int) and (key + 1) % parts == 0]

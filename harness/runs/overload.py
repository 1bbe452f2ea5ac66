"""Makes twice, then ten times the calls that the workers can handle, and counts how each call ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from harness.fleet import CLIENTS, WORKERS, Fleet, service
from harness.member import Member
from harness.report import Found, percentile
from harness.waiting import known
from triton_distributed.errors import DeadlineExceeded, Overloaded
from triton_distributed.names import EndpointName, Instance
from triton_distributed.routing import budget
from triton_distributed.runtime import Client

LIMITED = "chaos.worker.limited"
IDS = 10**9  # The number of request ids of each client process.
MOST_WORDS = 5

SERVICE_S, MAX_INFLIGHT, MAX_QUEUE = 0.02, 8, 64
LIMITS = (SERVICE_S, MAX_INFLIGHT, MAX_QUEUE)
BUSY_LIMITS = (0.005, 1, 16)  # For handlers that compute. A process runs only one of them at a time.
TIMEOUT_S = 0.1
CALM = 0.5  # The load before and after the flood, as a part of the capacity.
GOOD = 0.9  # The promised goodput, as a part of the capacity.
SATURATE_S, CALM_S, HIGH_S = 4.0, 3.0, 4.0
HIGH = 10


async def limited(member: Member, service_s: str, max_inflight: str, max_queue: str) -> None:
    """The part of a worker: an endpoint with a limit."""
    seconds = float(service_s)

    async def handler(request: Any) -> Any:
        if request["busy"]:  # It computes all the time and blocks this process meanwhile.
            end = time.thread_time() + seconds
            while time.thread_time() < end:
                pass
        else:
            await asyncio.sleep(seconds)
        return request["id"]

    member.serve(LIMITED, handler, max_inflight=int(max_inflight), max_queue=int(max_queue))


async def flood(member: Member, number: str) -> None:
    """The part of a client: more calls than the workers can handle."""
    client = await member.runtime.endpoint(LIMITED).client()
    first = (int(number) + 1) * IDS

    async def saturate(callers: int, seconds: float, busy: bool) -> float:
        return await Flood(client, first, busy).saturate(callers, seconds)

    async def phases(phases: list[tuple[float, float]], timeout_s: float, busy: bool) -> list[dict[str, Any]]:
        return await Flood(client, first, busy).phases(phases, timeout_s)

    member.questions |= {"connect": lambda ids: known([client], ids), "saturate": saturate, "flood": phases}


class Flood:
    """Calls of one client process to the endpoint with a limit.

    Args:
        first_id: the id of the first request.
        busy: the handlers compute; otherwise they wait.
    """

    def __init__(self, client: Client, first_id: int, busy: bool) -> None:
        self._client, self._busy = client, busy
        self._number = first_id

    def _request(self) -> dict[str, Any]:
        self._number += 1
        return {"id": self._number, "busy": self._busy}

    async def saturate(self, callers: int, seconds: float) -> float:
        """Return the answers a second. The first quarter of the time is not counted."""
        begin = time.monotonic() + seconds / 4
        end = begin + seconds
        counted = 0

        async def call(place: int) -> None:
            # Each caller uses one worker. With random choice, some workers would be idle while others are overloaded.
            def policy(request: Any, instances: tuple[Instance, ...], load: Any) -> Instance:
                return instances[place % len(instances)]

            nonlocal counted
            while (now := time.monotonic()) < end:
                try:
                    await self._client.call(self._request(), policy=policy)
                except Overloaded as error:
                    await asyncio.sleep(error.retry_after_s)
                    continue
                counted += begin <= now and time.monotonic() < end

        await asyncio.gather(*(call(place) for place in range(callers)))
        return max(1, counted) / seconds  # On a busy machine a short run may see no answer.

    async def phases(self, phases: list[tuple[float, float]], timeout_s: float) -> list[dict[str, Any]]:
        """Run phases, each with its calls a second and its seconds. No call waits for another."""
        taken = []
        begin = time.monotonic()
        for rate, seconds in phases:
            phase = Phase(begin, seconds, timeout_s)
            taken.append(phase)
            await phase.run(self._client, self._request, rate)
            begin += seconds
        return [await each.report() for each in taken]


class Phase:
    """Calls at one rate.

    Args:
        begin: the beginning of the phase, on the monotonic clock.
        seconds: the length of the phase.
        timeout_s: the timeout of each call.
    """

    def __init__(self, begin: float, seconds: float, timeout_s: float) -> None:
        self._begin, self._end, self._timeout_s = begin, begin + seconds, timeout_s
        self._rows: list[tuple[float, float | None]] = []  # When a call was due, and its time if it was answered.
        self._good = self._expired = self._refused = self._tried = 0
        self._hints: list[float] = []
        self._took: list[float] = []
        self._late: list[float] = []
        self._words: list[str] = []
        self._failed = 0
        self._running: set[asyncio.Task[None]] = set()

    async def run(self, client: Client, request: Callable[[], dict[str, Any]], rate: float) -> None:
        number = 0
        while (due := self._begin + number / rate) < self._end:
            if (wait_s := due - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            elif number % 20 == 0:
                await asyncio.sleep(0)  # The phase is late, but answers must be read.
            self._late.append(time.monotonic() - due)
            task = asyncio.ensure_future(self._one(client, request(), due))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            number += 1

    async def _one(self, client: Client, request: dict[str, Any], due: float) -> None:
        begin, took = time.monotonic(), None
        try:
            found = await client.call(request, timeout=self._timeout_s)
            took = time.monotonic() - begin
            if found != request["id"]:
                self._fail(f"request {request} got {found!r:.80}")
            self._took.append(took)
            self._good += took <= self._timeout_s and begin + took < self._end
        except Overloaded as error:
            self._refused += 1
            self._tried += error.attempts
            if error.retry_after_s:
                self._hints.append(error.retry_after_s)
        except DeadlineExceeded:
            self._expired += 1
            self._took.append(time.monotonic() - begin)
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")
        self._rows.append((due, took))

    def _fail(self, words: str) -> None:
        self._failed += 1
        if len(self._words) < MOST_WORDS:
            self._words.append(words)

    async def report(self) -> dict[str, Any]:
        """Wait for the last call, and return the report."""
        if self._running:
            await asyncio.wait(self._running)
        answered = len(self._took)
        return {
            "calls": len(self._rows),
            "good": self._good,
            "admitted": answered,
            "expired": self._expired,
            "refused": self._refused,
            "failed": self._failed,
            "words": self._words,
            "tried": self._tried,
            "hints": len(self._hints),
            "hint_p50_s": percentile(self._hints, 0.5),
            "p50_s": percentile(self._took, 0.5),
            "p99_s": percentile(self._took, 0.99),
            "late_p99_s": percentile(self._late, 0.99),
            "windows": self._windows(),
        }

    def _windows(self) -> list[tuple[float, int, int, float]]:
        """Return for every 50 ms: its beginning, the calls due in it, those not answered, and the median of times."""
        found: dict[int, list[float | None]] = {}
        for due, took in self._rows:
            found.setdefault(int((due - self._begin) / 0.05), []).append(took)
        windows = []
        for number, each in sorted(found.items()):
            answered = [took for took in each if took is not None]
            windows.append(
                (self._begin + number * 0.05, len(each), len(each) - len(answered), percentile(answered, 0.5))
            )
        return windows


async def _sent(fleet: Fleet) -> int:
    """Return the number of requests that have reached the workers."""
    path = EndpointName.parse(LIMITED).path
    return sum(sum(each[path].values()) for each in (await fleet.ask(WORKERS, "counts")).values())


def _sum(phases: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the reports of all client processes on one phase. Each time is that of the worst process."""
    counted = ("calls", "good", "admitted", "expired", "refused", "failed", "tried", "hints")
    return {
        **{name: sum(each[name] for each in phases) for name in counted},
        **{name: max(each[name] for each in phases) for name in ("hint_p50_s", "p50_s", "p99_s", "late_p99_s")},
        "words": [words for each in phases for words in each["words"]],
        "windows": [each["windows"] for each in phases],
    }


async def _flood(fleet: Fleet, phases: list[tuple[float, float]], busy: bool) -> tuple[list[dict[str, Any]], int]:
    """Return each phase's report, and the number of all requests sent."""
    before = await _sent(fleet)
    rates = [(rate / len(CLIENTS), seconds) for rate, seconds in phases]
    reports = (await fleet.ask(CLIENTS, "flood", phases=rates, timeout_s=TIMEOUT_S, busy=busy)).values()
    return [_sum(list(of_phase)) for of_phase in zip(*reports, strict=True)], await _sent(fleet) - before


async def _capacity(fleet: Fleet, seconds: float, busy: bool, callers: int) -> float:
    """Return the answers a second of callers that each wait for an answer before they call again."""
    each = callers // len(CLIENTS)
    return float(sum((await fleet.ask(CLIENTS, "saturate", callers=each, seconds=seconds, busy=busy)).values()))


async def overload(settings: dict[str, str], seconds: float, scale: float = 1.0) -> Found:
    """Load with twice the capacity, ten times, and half of it; then briefly the same with handlers that compute.

    Args:
        settings: the settings of every process.
        seconds: the length of the phase with twice the capacity.
        scale: a factor for all other times.
    """
    async with _service(settings, LIMITS) as fleet:
        found = await _overload(fleet, seconds, scale)
    async with _service(settings, BUSY_LIMITS) as fleet:
        found.figures |= await _busy_overload(fleet, seconds / 2, scale)
    return found


def _service(settings: dict[str, str], limits: tuple[float, int, int]) -> AbstractAsyncContextManager[Fleet]:
    part = ":".join(["harness.runs.overload:limited", *map(str, limits)])
    return service(settings, part, "harness.runs.overload:flood")


async def _overload(fleet: Fleet, seconds: float, scale: float) -> Found:
    computed = len(WORKERS) * MAX_INFLIGHT / SERVICE_S
    measured = await _capacity(fleet, SATURATE_S * scale, False, 4 * len(WORKERS) * MAX_INFLIGHT)
    (twice,), sent = await _flood(fleet, [(2 * computed, seconds)], False)
    calm_s = CALM_S * scale
    (calm, high, after), _ = await _flood(
        fleet, [(CALM * computed, calm_s), (HIGH * computed, HIGH_S * scale), (CALM * computed, calm_s)], False
    )
    goodput = twice["good"] / seconds
    recovered = _recovery_s(calm, after)
    retries = sent - twice["calls"]
    allowed = budget.RATIO * twice["calls"] + len(CLIENTS) * (budget.LEAST + budget.PER_SECOND * seconds)
    found = Found(words=[*twice["words"], *high["words"], *after["words"]])
    found.figures = {
        "capacity_computed_per_s": computed,
        "capacity_measured_per_s": measured,
        "offered_per_s": twice["calls"] / seconds,
        "goodput_per_s": goodput,
        "goodput_of_computed": goodput / computed,
        "goodput_of_measured": goodput / measured,
        **{f"twice_{name}": twice[name] for name in ("calls", "admitted", "expired", "refused", "failed", "hints")},
        "expired_share": twice["expired"] / max(1, twice["admitted"]),
        "timeout_ms": TIMEOUT_S * 1000,
        "p50_ms": twice["p50_s"] * 1000,
        "p99_ms": twice["p99_s"] * 1000,
        "hint_p50_ms": twice["hint_p50_s"] * 1000,
        "retries": retries,
        "retries_allowed": allowed,
        "pacing_late_p99_ms": twice["late_p99_s"] * 1000,
        "high_offered_per_s": high["calls"] / (HIGH_S * scale),
        "high_goodput_of_computed": high["good"] / (HIGH_S * scale) / computed,
        "high_expired_share": high["expired"] / max(1, high["admitted"]),
        "high_pacing_late_p99_ms": high["late_p99_s"] * 1000,
        "calm_p50_ms": calm["p50_s"] * 1000,
        "recovery_ms": None if recovered is None else recovered * 1000,
    }
    failed = twice["failed"] + high["failed"] + after["failed"]
    found.promise("calls are answered, refused, or out of time, and nothing else", not failed, f"{failed} others")
    capacity = min(computed, measured)
    found.promise(
        f"at twice the capacity, answers in time are at least {GOOD:.0%} of it",
        goodput >= GOOD * capacity,
        f"{goodput / capacity:.1%}",
    )
    late = twice["expired"] / max(1, twice["admitted"])
    found.promise("99 % of what is let in is answered in time", late <= 0.01, f"{late:.2%} late")
    found.promise("what is sent again stays within the budget", retries <= allowed, f"{retries:,} of {allowed:,.0f}")
    found.promise(
        "when the load falls, times are the usual ones again",
        recovered is not None,
        "never" if recovered is None else f"after {recovered * 1000:.0f} ms",
    )
    return found


async def _busy_overload(fleet: Fleet, seconds: float, scale: float) -> dict[str, float]:
    """Load with twice the capacity of handlers that compute. They share the cores with clients: nothing is promised."""
    measured = await _capacity(fleet, SATURATE_S * scale, True, 4 * len(WORKERS))
    (twice,), _ = await _flood(fleet, [(2 * measured, seconds)], True)
    return {
        "busy_capacity_per_s": measured,
        "busy_goodput_of_measured": twice["good"] / seconds / measured,
        "busy_expired_share": twice["expired"] / max(1, twice["admitted"]),
        "busy_refused": twice["refused"],
    }


def _recovery_s(calm: dict[str, Any], after: dict[str, Any]) -> float | None:
    """Return the seconds from the load's fall until, for two windows in a row, no call fails and times are usual."""
    usual = 1.5 * calm["p50_s"]
    longest = 0.0
    for windows in after["windows"]:
        begin = windows[0][0]
        good = [not unanswered and median <= usual for _, _, unanswered, median in windows]
        first = next((n for n in range(len(good) - 1) if good[n] and good[n + 1]), None)
        if first is None:
            return None
        longest = max(longest, windows[first][0] - begin)
    return longest

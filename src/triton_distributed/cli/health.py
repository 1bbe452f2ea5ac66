"""The state of each instance: what discovery says of it, and what its worker answers. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from triton_distributed.names import INSPECT, EndpointName, Instance
from triton_distributed.runtime.reports import ServedReport, WorkerReport

STUCK = "its event loop is stuck: clients call other instances while there are any"
PAUSED = "its program has paused it: it is not listed, and refuses requests"
DRAINING = "it shuts down: it refuses requests, and running ones finish"
STARTING = "discovery has not accepted it yet"
REASONS = {"paused": PAUSED, "draining": DRAINING, "starting": STARTING}


def stuck_words(instance: Instance) -> str:
    """Why a worker does not answer whose watchdog has reported it, and where the code that blocks its loop is shown."""
    url = instance.status_url
    return f"its event loop is stuck; its log has the stack{url and f', as has {url}/stacks'}"


class Answer(NamedTuple):
    """What one worker answered.

    Attributes:
        instance_id: the worker.
        items: the items of its answer; empty if it did not answer.
        reason: why it did not answer; empty if it did.
        timed_out: it did not answer in time, but it may do later.
        reached: whether anything came back; it is set too if the worker does not understand the question.
    """

    instance_id: int
    items: list[Any]
    reason: str
    timed_out: bool = False
    reached: bool = True


class Row(NamedTuple):
    """One instance.

    Attributes:
        instance: what discovery lists, or would list of a paused instance.
        state: `serving`; `unhealthy`: the same, but a health check or canary of its worker has failed; `full`: it
            refuses further requests; `paused`, `draining`, `starting`; `stuck`: its event loop is; `unreachable`: its
            worker did not answer.
        reason: why clients leave it out, or what has failed; empty while all is well.
        served: what its worker says of it; None if it did not answer.
        worker: what its worker says of itself; None if it did not answer.
    """

    instance: Instance
    state: str
    reason: str = ""
    served: ServedReport | None = None
    worker: WorkerReport | None = None

    @property
    def name(self) -> str:
        """The endpoint's name."""
        return str(self.instance.endpoint)

    def age_s(self, now: float) -> float | None:
        """Seconds since the endpoint is served; None if that is not known.

        Args:
            now: seconds since the epoch. It counts only if the worker does not answer, because clocks differ.
        """
        if self.served is not None:
            return self.served.age_s
        return max(0.0, now - self.instance.since) if self.instance.since else None


def rows(instances: Iterable[Instance], answers: Mapping[int, Answer]) -> list[Row]:
    """Make the rows of instances, and of those that their workers serve without being listed.

    Args:
        instances: what discovery lists.
        answers: the answers about `worker`, by instance id.
    """
    found: list[Row] = []
    hidden: dict[tuple[EndpointName, int], Row] = {}
    listed = {(each.endpoint, each.id) for each in instances}
    reports: dict[int, WorkerReport | None] = {}
    for instance in instances:
        answer = answers[instance.id]
        if instance.id not in reports:
            reports[instance.id] = answer_of(answer)
        report = reports[instance.id]
        if instance.endpoint != INSPECT:
            found.append(_silent(instance, answer) if report is None else _of(instance, report))
        if report is not None:
            for each in report.endpoints:
                key = each.endpoint, each.instance_id
                if each.state in REASONS and key not in listed:
                    absent = Instance(
                        each.endpoint,
                        each.instance_id,
                        each.addresses,
                        instance.host,
                        status_url=instance.status_url,
                        pid=report.pid,
                    )
                    hidden[key] = Row(absent, each.state, REASONS[each.state], each, report)
    return sorted([*found, *hidden.values()], key=lambda each: (each.name, each.instance.id))


def answer_of(answer: Answer) -> WorkerReport | None:
    """The report in an answer; None if this version cannot read the answer."""
    try:
        return msgspec.convert(answer.items[0], WorkerReport) if answer.items else None
    except msgspec.ValidationError:
        return None


def _silent(instance: Instance, answer: Answer) -> Row:
    if instance.busy:
        return Row(instance, "stuck", STUCK)
    if answer.reached:
        return Row(instance, "serving", "its worker runs another version, which does not report its load")
    return Row(instance, "unreachable", answer.reason)


def _of(instance: Instance, report: WorkerReport) -> Row:
    served = next((each for each in report.endpoints if each.endpoint == instance.endpoint), None)
    if served is None:
        return Row(instance, "unreachable", "the worker at its address does not serve this endpoint", None, report)
    state, reason = served.state, REASONS.get(served.state, "")
    if instance.busy:
        state, reason = "stuck", STUCK
    elif state == "serving" and _is_full(served):
        state, reason = "full", f"at capacity, {load(served)}: it refuses further requests"
    elif state == "serving" and report.running >= report.max_requests:
        words = f"{report.running} running of {report.max_requests} in its worker (TRD_MAX_REQUESTS)"
        state, reason = "full", f"at capacity, {words}: it refuses further requests"
    if report.problems:
        state = "unhealthy" if state == "serving" else state
        reason = "; ".join([*filter(None, [reason]), *report.problems])
    return Row(instance, state, reason, served, report)


def _is_full(served: ServedReport) -> bool:
    limit = served.max_inflight
    return limit is not None and served.running >= limit and served.waiting >= served.max_queue


def load(served: ServedReport) -> str:
    """The load of an endpoint in a few words."""
    running = f"{served.running} running" + ("" if served.max_inflight is None else f" of {served.max_inflight}")
    return running + (f", {served.waiting} waiting of {served.max_queue}" if served.max_queue else "")

"""The state of an instance, from its record and its worker's answer."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.timing import PATIENCE_S
from triton_distributed.cli.checks.services import discovery
from triton_distributed.cli.cluster import cluster
from triton_distributed.cli.health import DRAINING, PAUSED, STUCK, Answer, Row, rows
from triton_distributed.cli.instances import close_names
from triton_distributed.cli.rendering import span
from triton_distributed.cli.top_table import reasons
from triton_distributed.cli.top_workers import workers
from triton_distributed.config import Config
from triton_distributed.names import INSPECT, EndpointName, Instance
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.runtime.reports import ServedReport, WorkerReport

NAME, OTHER = EndpointName("a", "b", "c"), EndpointName("a", "b", "d")


def instance(endpoint: EndpointName = NAME, busy: bool = False) -> Instance:
    return Instance(endpoint, 7, ("tcp://h:1",), busy=busy, since=100.0)


def served(endpoint: EndpointName = NAME, state: str = "serving", running: int = 0, waiting: int = 0) -> ServedReport:
    return ServedReport(endpoint, 7, state, ("tcp://h:1",), 5.0, running, waiting, 2, 1)


def answer(*endpoints: ServedReport, running: int = 0, problems: tuple[str, ...] = ()) -> Answer:
    report = WorkerReport("1", False, "3", 9, "h", endpoints, running, 5, problems)
    return Answer(7, [msgspec.to_builtins(report)], "")


def row(instance: Instance, answer: Answer) -> Row:
    (found,) = rows([instance], {7: answer})
    return found


@pytest.mark.parametrize(
    ("known", "said", "state", "reason"),
    [
        (instance(), answer(served()), "serving", ""),
        (instance(), answer(served(running=2)), "serving", ""),
        (instance(), answer(served(running=2, waiting=1)), "full", "at capacity, 2 running of 2, 1 waiting of 1: "),
        (
            instance(),
            answer(served(), running=5),
            "full",
            "at capacity, 5 running of 5 in its worker (TRD_MAX_REQUESTS)",
        ),
        (instance(), answer(served(), problems=("canary",)), "unhealthy", "canary"),
        (instance(), answer(served(running=2, waiting=1), problems=("canary",)), "full", "at capacity"),
        (instance(), answer(served(state="paused")), "paused", PAUSED),
        (instance(), answer(served(state="draining")), "draining", DRAINING),
        (instance(busy=True), answer(served()), "stuck", STUCK),
        (instance(busy=True), Answer(7, [], "no answer", reached=False), "stuck", STUCK),
        (instance(), Answer(7, [], "no answer", reached=False), "unreachable", "no answer"),
        (instance(), answer(served(OTHER)), "unreachable", "the worker at its address does not serve this endpoint"),
        (instance(), Answer(7, [], "no such question"), "serving", "its worker runs another version"),
        (instance(), Answer(7, [{"version": 1}], ""), "serving", "its worker runs another version"),
    ],
)
def test_states(known: Instance, said: Answer, state: str, reason: str) -> None:
    found = row(known, said)
    assert found.state == state
    assert found.reason.startswith(reason)
    assert bool(found.reason) == bool(reason)


async def test_failed_checks_show_in_the_terminal(trd_dir: Path) -> None:
    config, hangs = Config.from_env(), threading.Event()
    async with DistributedRuntime(config=replace(config, status_port=0)) as runtime:
        await runtime.endpoint("a.b.c").serve_endpoint(print).registered
        port = runtime.status_port
        port.health_check(lambda: "too hot", name="gpu")
        port.health_check(lambda: hangs.wait(60) and None, name="slow", timeout_s=60)
        async with cluster(config, PATIENCE_S) as asked, workers(asked, PATIENCE_S, lambda: None) as top:
            (found,) = await asked.rows(await asked.instances())
            assert (found.state, found.reason) == ("unhealthy", "health check gpu: too hot")
            findings, _ = await discovery(config)
            words = f"instance {runtime.instance_id} is not healthy: health check gpu: too hot"
            assert [each.text for each in findings if each.level == "warning"] == [words]
            for _ in range(2):
                await top.look()
            (live,) = top.rows()
            assert (live.state, live.reason, live.well) == ("unhealthy", "", False)
            assert reasons([live]) == [f"instance {runtime.instance_id}: health check gpu: too hot"]
            hangs.set()
            port.checks.clear()
            (found,) = await asked.rows(await asked.instances())
            assert (found.state, found.reason) == ("serving", "")


def test_what_a_worker_has_paused_is_shown_once_and_its_reserved_endpoint_is_not() -> None:
    said = answer(served(state="paused"), served(OTHER))
    found = rows([instance(OTHER), instance(INSPECT)], {7: said})
    assert [(each.name, each.state) for each in found] == [("a.b.c", "paused"), ("a.b.d", "serving")]
    assert rows([instance(INSPECT)], {7: Answer(7, [], "no answer", reached=False)}) == []


def test_the_worker_knows_the_age_better_than_our_clock() -> None:
    assert row(instance(), answer(served())).age_s(now=1000.0) == 5.0
    silent = row(instance(), Answer(7, [], "x", reached=False))
    assert (silent.age_s(now=160.0), silent.age_s(now=0.0)) == (60.0, 0.0)
    assert Row(Instance(NAME, 7, ()), "unreachable").age_s(now=1.0) is None


def test_close_names() -> None:
    known = ["demo.backend.generate", "demo.backend.embed"]
    assert close_names("demo.backend.genrate", known) == "; did you mean demo.backend.generate?"
    assert close_names("other", known) == close_names("x", []) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (119, "119 s"), (600, "10 min"), (2e4, "6 h"), (1e6, "12 d")]
)
def test_spans(seconds: float, text: Any) -> None:
    assert span(seconds) == text

"""A worker reports its load to the clients that asked: at once, then at most every 100 ms, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from tests.wire.joined import End, greeted
from triton_distributed.serving.load_reports import ASKED_S, MOST_PER_S, MOST_WAITING, REPORT_S, LoadReports
from triton_distributed.testing import run_in_virtual_time
from triton_distributed.wire import frames as f

KEY, OTHER = 7, 8


class Gate:
    def __init__(self) -> None:
        self.running: list[int] = []
        self.queue: list[int] = []


class Endpoint:
    def __init__(self) -> None:
        self.gate = Gate()


def reports(client: End) -> list[tuple[int, int, int]]:
    """The reports that wait to be written to a client, taken."""
    frames = client.written()
    assert {kind for kind, *_ in frames} <= {f.LOAD}
    return [each for *_, payload in frames for each in f.LOAD_ENTRY.iter_unpack(payload)]


def virtual(test: Callable[[dict[int, Any], LoadReports], Awaitable[None]]) -> Callable[[], None]:
    """Run a test in virtual time, with two served endpoints."""

    def run() -> None:
        async def program() -> None:
            endpoints: dict[int, Any] = {KEY: Endpoint(), OTHER: Endpoint()}
            made = LoadReports(asyncio.get_running_loop(), endpoints)
            try:
                await test(endpoints, made)
            finally:
                made.close()
            assert made._timer is None

        run_in_virtual_time(program())

    return run


@virtual
async def test_the_first_report_comes_at_once(endpoints: dict[int, Any], load: LoadReports) -> None:
    client = greeted()
    endpoints[KEY].gate.running, endpoints[KEY].gate.queue = [1, 2], [3]
    load.asked(client, [KEY, 99])
    assert reports(client) == [(KEY, 2, 1)]
    load.asked(client, [KEY, OTHER])  # only the new one: asking often brings no more
    assert reports(client) == [(OTHER, 0, 0)]


@virtual
async def test_a_changing_load_is_reported_every_100_ms(endpoints: dict[int, Any], load: LoadReports) -> None:
    client = greeted()
    load.asked(client, [KEY, OTHER])
    reports(client)
    seen = []
    for step in range(100):  # 10 ms each
        endpoints[KEY].gate.running = [1] * step
        await asyncio.sleep(REPORT_S / 10)
        seen += reports(client)
    assert [key for key, *_ in seen].count(KEY) in (9, 10)
    assert [key for key, *_ in seen].count(OTHER) <= 1  # it does not change


@virtual
async def test_a_steady_load_is_repeated_every_second(endpoints: dict[int, Any], load: LoadReports) -> None:
    client = greeted()
    load.asked(client, [KEY])
    await asyncio.sleep(10.05)
    assert reports(client) == [(KEY, 0, 0)] * 11


@virtual
async def test_interest_ends_by_itself(endpoints: dict[int, Any], load: LoadReports) -> None:
    client = greeted()
    load.asked(client, [KEY])
    await asyncio.sleep(ASKED_S - 1)
    load.asked(client, [KEY])
    await asyncio.sleep(ASKED_S - 1)
    assert len(reports(client)) > ASKED_S
    await asyncio.sleep(2)
    reports(client)
    await asyncio.sleep(10)
    assert reports(client) == []
    assert not load._clients
    assert load._timer is None
    load.asked(client, [KEY])
    assert reports(client) == [(KEY, 0, 0)]


@virtual
async def test_what_is_not_served_is_not_reported(endpoints: dict[int, Any], load: LoadReports) -> None:
    client = greeted()
    load.asked(client, [99])
    assert not load._clients
    load.asked(client, [KEY])
    del endpoints[KEY]
    reports(client)
    await asyncio.sleep(1)
    assert reports(client) == []
    assert not load._clients


@virtual
async def test_a_lost_client_is_forgotten(endpoints: dict[int, Any], load: LoadReports) -> None:
    client = greeted()
    load.asked(client, [KEY])
    client.over()
    await asyncio.sleep(2 * REPORT_S)
    assert not load._clients
    assert load._timer is None


@virtual
async def test_a_client_that_does_not_read_gets_the_newest_later(endpoints: dict[int, Any], load: LoadReports) -> None:
    client = greeted()
    load.asked(client, [KEY])
    reports(client)
    client.out += [f.frame(f.LOAD, 0)] * (MOST_WAITING + 1)
    for step in range(20):
        endpoints[KEY].gate.running = [1] * step
        await asyncio.sleep(REPORT_S)
    assert len(client.out) == MOST_WAITING + 1
    client.out.clear()
    await asyncio.sleep(2 * REPORT_S)
    assert reports(client) == [(KEY, 19, 0)]


@virtual
async def test_many_clients_get_fewer_reports(endpoints: dict[int, Any], load: LoadReports) -> None:
    clients = [greeted() for _ in range(1000)]
    for client in clients:
        load.asked(client, [KEY])
        reports(client)
    sent = 0
    for step in range(100):
        endpoints[KEY].gate.running = [1] * step
        await asyncio.sleep(REPORT_S)
        sent += sum(len(reports(client)) for client in clients)
    assert 0.5 * MOST_PER_S <= sent / (100 * REPORT_S) <= 1.1 * MOST_PER_S


@virtual
async def test_after_its_end_it_sends_nothing(endpoints: dict[int, Any], load: LoadReports) -> None:
    client = greeted()
    load.close()
    load.asked(client, [KEY])
    assert client.written() == []

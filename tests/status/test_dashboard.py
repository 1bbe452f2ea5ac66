"""The dashboard of the status port: one page without outside assets, which plots what the history says."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster
from tests.status.browser import CHROMIUM, MISSING, Page
from tests.status.web import fetch
from tests.timing import PATIENCE_S
from triton_distributed.observe.stats import TimedStats
from triton_distributed.status.dashboard import dashboard
from triton_distributed.status.history import MOST_SERIES, History

browser = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)


async def echo(request: Any) -> Any:
    return request


async def test_a_browser_gets_the_page_and_a_script_the_list(watched: Cluster) -> None:
    url = watched.runtime().status_port.url
    page = await fetch(url, Accept="text/html,application/xhtml+xml,*/*;q=0.8")
    assert page.status == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.body == dashboard().body
    listed = await fetch(url, Accept="*/*")
    assert "/statistics/history" in listed.json()["pages"]
    assert page.headers["vary"] == listed.headers["vary"] == "Accept"


def test_the_page_has_no_outside_assets_and_its_policy_allows_only_its_own() -> None:
    text, policy = dashboard().body.decode(), dashboard().headers["Content-Security-Policy"]
    assert re.findall(r"https?://[^\"' ]+", text) == [
        "http://www.w3.org/2000/svg"
    ]  # A name of XML: nothing is fetched.
    assert not re.search(r"\b(src|@import|url\()", text.split("<script>")[0])
    assert "innerHTML" not in text  # Names of endpoints are text, whatever they contain.
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'" in policy


class Served:
    """What the history reads of an endpoint, and of a client."""

    def __init__(self, path: str = "a/components/b/c") -> None:
        self.stats = TimedStats()
        self.name = type("Name", (), {"path": path})
        self.gate = type("Gate", (), {"queue": [], "running": {}})

    def ended(self, seconds: float, count: int = 10) -> None:
        self.stats.ended[0] += count
        self.stats.duration.add([seconds] * count)


def quantiles(history: History, group: str) -> list[tuple[Any, Any]]:
    (columns,) = history.since(0)[group].values()
    return list(zip(columns["p50_s"], columns["p99_s"], strict=True))


def test_quantiles_are_of_the_requests_between_two_samples() -> None:
    history, served = History(), Served()
    endpoints: Any = [served]
    again: Any = [Served()]
    served.ended(0.004)
    history.add(0.0, endpoints, [])
    served.ended(0.04)
    history.add(0.0, endpoints, [])
    history.add(0.0, endpoints, [])
    history.add_stuck(3.0)
    history.add(0.0, again, [])  # The endpoint was served again.
    (first, second, *others) = quantiles(history, "endpoints")
    assert 0.002 < first[0] < first[1] <= 0.005
    assert 0.02 < second[0] < second[1] <= 0.05
    assert others == [(None, None)] * 3


def test_clients_of_one_endpoint_are_one_series() -> None:
    history, one, other = History(), Served(), Served()
    clients: Any = [one, other]
    history.add(0.0, [], clients)
    one.ended(0.004, 60)
    other.ended(0.04, 40)
    history.add(0.0, [], clients)
    history.add(0.0, [], clients[:1])
    _, (p50, p99), third = quantiles(history, "calls")
    assert p50 <= 0.005
    assert p99 > 0.02
    assert third == (None, None)
    (columns,) = history.since(0)["calls"].values()
    assert columns["calls"] == [0, 100, 60]


def test_a_sample_looks_at_no_more_endpoints_than_it_keeps() -> None:
    """It is taken on the loop each second, and a process may have called thousands."""

    def clients() -> Iterator[Any]:
        for number in range(MOST_SERIES):
            yield Served(str(number))
            yield Served(str(number))
        yield Served("left out")
        raise AssertionError("it looks at more")

    history = History()
    history.add(0.0, [], clients())
    assert list(history.since(0)["calls"]) == [str(each) for each in range(MOST_SERIES)]


STATE = "document.getElementById('state').textContent"
ALARM = "document.getElementById('alarm').textContent"
ROWS = "[...document.querySelectorAll('#endpoints-table tr')].map(row => [...row.cells].map(cell => cell.textContent))"
LINES = "Object.fromEntries([...document.querySelectorAll('#plots svg')].map(svg => [svg.ariaLabel, svg.innerHTML]))"


@browser
async def test_a_browser_shows_what_the_history_says_and_when_the_process_has_ended(
    watched: Cluster, tmp_path: Path
) -> None:
    go_on = asyncio.Event()

    async def held(request: Any) -> Any:
        await go_on.wait()
        return request

    worker = await watched.worker(held, "t.c.<b>e", max_inflight=3, max_queue=8)
    client = await watched.client("t.c.<b>e")
    calls = [asyncio.ensure_future(client.call(each)) for each in range(4)]
    url = worker.status_port.url

    def look() -> tuple[Any, Any, Any]:
        page.until(f"{STATE} === 'serving' && past.endpoints['t/components/c/<b>e'].running.slice(-2).join() === '3,3'")
        page.until("document.querySelectorAll('#plots path.s0').length")
        return page.get("document.getElementById('who').textContent"), page.get(ROWS), page.get(LINES)

    with await asyncio.to_thread(Page, url, tmp_path) as page:
        who, (header, row), plots = await asyncio.to_thread(look)
        assert who == f"t.c · instance {worker.instance_id}"
        assert header[:7] == ["Endpoint", "State", "Requests/s", "Errors/s", "Refused/s", "In flight", "Queue"]
        assert row == ["t.c.<b>e", "serving", "0", "0", "0", "3 / 3", "1 / 8", "–", "–"]
        assert plots.keys() == {"Requests", "Duration", "Errors", "In flight", "Queue", "Event loop lag"}
        (line,) = re.findall(r'<path class="s0" d="(.+?)"', plots["In flight"])
        assert line.endswith(" 57.4")  # 3 of 5 between the lowest line, 130, and the highest, 9.
        go_on.set()
        assert await asyncio.gather(*calls) == [0, 1, 2, 3]
        await worker.close()
        await asyncio.to_thread(page.until, f"{STATE} === 'no answer'")
        assert (await asyncio.to_thread(page.get, ALARM)).startswith("No answer since ")
        assert (await asyncio.to_thread(page.get, ROWS))[1][0] == "t.c.<b>e"  # The last figures stay.


@browser
async def test_a_browser_shows_where_the_loop_is_stuck(watched: Cluster, tmp_path: Path) -> None:
    go_on = threading.Event()

    async def blocks(request: Any) -> Any:
        go_on.wait(PATIENCE_S)
        return request

    worker = await watched.worker(blocks)
    client = await watched.client()
    found: list[Any] = []

    def look() -> None:
        try:
            page.until(f"{STATE} === 'event loop stuck' && past.loop_lag_s.at(-1) > 0.5")  # It also plots it.
            found.extend((page.get(ALARM), page.get(ROWS)[1][:2]))
        finally:
            go_on.set()

    with await asyncio.to_thread(Page, worker.status_port.url, tmp_path) as page:
        await asyncio.to_thread(page.until, f"{STATE} === 'serving'")
        thread = threading.Thread(target=look)
        thread.start()
        assert await client.call(1) == 1
        await asyncio.to_thread(thread.join)
        alarm, row = found
        assert alarm.startswith("The event loop has been stuck for ")
        assert f" at {__file__}:" in alarm
        assert " in blocks: this process serves no request meanwhile. The tables are from " in alarm
        assert row == ["t.c.e", "stuck"]
        await asyncio.to_thread(page.until, f"{STATE} === 'serving'")

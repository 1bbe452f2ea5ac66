"""`trd top`: what it measures, what it shows, and how it behaves in a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.cli.command import Trd
from tests.cli.terminal import ENTER, LEAVE, Terminal
from tests.runtime.cluster import until
from tests.timing import PATIENCE_S
from triton_distributed.cli import top
from triton_distributed.cli.cluster import cluster
from triton_distributed.cli.failure import Failure
from triton_distributed.cli.top_table import COLUMNS, SORTS, Cell, View, entries, lines, number, reasons
from triton_distributed.cli.top_terminal import keys
from triton_distributed.cli.top_workers import Row, Workers, workers
from triton_distributed.config import Config
from triton_distributed.errors import Overloaded
from triton_distributed.observe import BOUNDS_S, LAG_BOUNDS_S
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.runtime.rates import Counters, EndpointRates, WorkerRates, rates, total

# Rates


async def counted() -> Counters:
    """The counters of a worker that has served two requests."""
    async with DistributedRuntime(config=Config(discovery="memory")) as runtime:

        async def echo(request: int) -> int:
            return request

        runtime.endpoint("demo.b.g").serve_endpoint(echo, max_inflight=4, max_queue=8)
        client = await runtime.endpoint("demo.b.g").client()
        await client.wait_for_instances()
        assert [await client.call(each) for each in range(2)] == [0, 1]
        await until(lambda: runtime.statistics().endpoints[0].outcomes["ok"] == 2)
        now = runtime.statistics()
        return Counters(now.instance_id, now.endpoints, now.received_bytes, now.sent_bytes, now.loop)


def later(before: Counters, *, lag: int = 0, received: int = 0, **outcomes: int) -> Counters:
    """The same counters after more requests: each took between 20 and 50 ms, and a timer was late."""
    (endpoint,) = before.endpoints
    counts = list(endpoint.duration.counts)
    counts[BOUNDS_S.index(0.05)] += sum(outcomes.values()) - outcomes.get("refused", 0)
    lags = list(before.loop.lag)
    lags[lag] += 1
    endpoint = msgspec.structs.replace(
        endpoint,
        outcomes={name: count + outcomes.get(name, 0) for name, count in endpoint.outcomes.items()},
        duration=msgspec.structs.replace(endpoint.duration, counts=tuple(counts)),
        first_item=msgspec.structs.replace(endpoint.first_item, counts=tuple(counts)),
    )
    return msgspec.structs.replace(
        before,
        endpoints=(endpoint,),
        loop=msgspec.structs.replace(before.loop, lag=tuple(lags)),
        received_bytes=before.received_bytes + received,
    )


async def test_rates_are_differences() -> None:
    before = await counted()
    found = rates(before, later(before, ok=6, error=1, cancelled=1, refused=4, received=100), 2.0)
    each = found.endpoints["demo/components/b/g"]
    assert (each.requests_per_s, each.errors_per_s, each.refused_per_s) == (4.0, 0.5, 2.0)
    assert (each.max_inflight, each.max_queue, each.running) == (4, 8, 0)
    assert 0.02 < (each.duration_s(0.5) or 0) < (each.duration_s(0.99) or 0) <= 0.05
    assert each.first_item_s(0.5) == each.duration_s(0.5)
    assert (found.received_per_s, found.sent_per_s, found.lag_s) == (50.0, 0.0, LAG_BOUNDS_S[0])
    twice = total([each, each])
    assert (twice.requests_per_s, twice.max_inflight, twice.durations[BOUNDS_S.index(0.05)]) == (8.0, 8, 16)
    assert twice.duration_s(0.5) == each.duration_s(0.5)

    late = rates(before, later(before, lag=len(LAG_BOUNDS_S)), 1.0)
    assert late.lag_s == LAG_BOUNDS_S[-1]
    assert late.endpoints["demo/components/b/g"].duration_s(0.5) is None
    # An endpoint that was served again counts from 0.
    fewer = rates(later(before, ok=5), before, 1.0)
    assert fewer.endpoints["demo/components/b/g"].requests_per_s == 2.0
    assert fewer.received_per_s == 0.0


# The table


def row(endpoint: str, id: int, per_s: float = 0.0, state: str = "serving", reason: str = "", **other: Any) -> Row:
    if reason:
        return Row(endpoint, id, state, reason, None, None)
    values: dict[str, Any] = {"running": 0, "waiting": 0, "max_inflight": 2, "max_queue": 4, **other}
    nothing = (0,) * (len(BOUNDS_S) + 1)
    each = EndpointRates(per_s, 0.0, 0.0, 0.0, durations=nothing, first_items=nothing, **values)
    return Row(endpoint, id, state, reason, each, WorkerRates({}, 10.0, 5.0, 0.001))


ROWS = [
    row("a.b.c", 1, 5),
    row("a.b.c", 2, 9, waiting=4),
    row("a.b.d", 1, 20),
    row("a.b.d", 3, state="silent", reason="why"),
]


def names(view: View) -> list[str]:
    return [each.name for each in entries(ROWS, view)]


def test_instances_are_below_their_endpoints_in_the_order_of_the_column() -> None:
    assert names(View()) == ["a.b.c", "1", "2", "a.b.d", "1", "3"]
    assert names(View("requests")) == ["a.b.d", "1", "3", "a.b.c", "2", "1"]
    assert names(View("requests", reverse=True)) == ["a.b.c", "1", "2", "a.b.d", "3", "1"]
    assert names(View(folded=True)) == ["a.b.c", "a.b.d"]
    assert [each.state for each in entries(ROWS, View(folded=True))] == ["2 up", "1 of 2"]
    assert reasons(ROWS) == ["instance 3: why"]
    assert len(reasons([row("a.b.c", each, reason="why") for each in range(99)])) == 7


def texts(width: int, rows: list[Row] = ROWS) -> list[str]:
    return ["  ".join(cell.text for cell in line).rstrip() for line in lines(entries(rows, View()), View(), width)]


def test_columns_that_do_not_fit_are_left_out() -> None:
    wide = texts(200)
    assert wide[0].split() == ["ENDPOINT", "STATE", *" ".join(each.title for each in COLUMNS).split()]
    assert wide[3].split()[:8] == ["2", "serving", "9", "0", "0", "0/2", "4/4", "-"]
    assert wide[6].split() == ["3", "silent", *"-" * len(COLUMNS)]
    for width in range(20, 140):
        assert max(map(len, texts(width))) <= max(width, 22)
    assert texts(48)[0].split() == ["ENDPOINT", "STATE", "REQ/S", "ERR/S", "QUEUE"]
    long = [row("a.b." + "x" * 80, 1)]
    assert texts(60, long)[1].startswith("a.b.xxx")
    assert "…" in texts(60, long)[1]


def styles(found: Row) -> dict[str, str]:
    table = lines(entries([found], View()), View(), 200)
    return {header.text.strip(): cell.style for header, cell in zip(table[0], table[2], strict=True)}


def test_what_is_wrong_is_red() -> None:
    assert "red bold" not in styles(row("a.b.c", 1, 5, running=2, waiting=3)).values()
    assert styles(row("a.b.c", 1, waiting=4))["QUEUE"] == "red bold"
    assert styles(row("a.b.c", 1, state="full"))["STATE"] == "red bold"
    assert styles(row("a.b.c", 1, state="gone", reason="why"))["STATE"] == "red bold"
    slow = row("a.b.c", 1)
    assert styles(slow._replace(worker=WorkerRates({}, 0, 0, 0.5)))["LAG"] == "red bold"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (2.46, "2.5"), (9.96, "10"), (1234.0, "1,234"), (56_700.0, "56.7k"), (99_960.0, "100k"), (8.94e6, "8.9M"),
     (1e18, "1000.0P")],
)  # fmt: skip
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_keys() -> None:
    assert keys("\x1b[Cr\x1bOD\x1b[5~q") == (["right", "r", "left", "page up", "q"], "")
    assert keys("r\x1b[") == (["r"], "\x1b[")
    assert keys("\x1b[1;5C") == ([""], "")
    view = View()
    for _ in SORTS:
        view = view.pressed("right")
    assert view == View()
    assert View().pressed("left").sort == SORTS[-1]
    assert View(first=3).pressed("page down").pressed("up").first == 12
    assert View(first=3).pressed("page up").first == 0
    assert View(first=3).pressed("x") == View(first=3)
    assert View().pressed("e").pressed("r") == View(reverse=True, folded=True)


def test_a_picture_fits_the_screen_and_scrolls_to_its_end() -> None:
    rows = [row("a.b.c", each) for each in range(50)] + [row("a.b.c", 99, reason="why " * 99)]
    for width, height in ((80, 24), (20, 5), (200, 3), (1, 1)):
        shown, view = top.picture(rows, View(first=1000), "title " * 99, width, height)
        assert len(shown) == height
        assert view.first <= 52
        assert all(len(cell.text) <= width for line in shown for cell in line) or width < 20
    shown, _ = top.picture(rows, View(first=1000), "title", 80, 24)
    assert any(cell.text.strip() == "99" for line in shown for cell in line)
    assert "more lines" not in shown[-1][0].text
    shown, _ = top.picture(rows, View(), "title", 80, 24)
    assert shown[-1][0].text.endswith("(38 more lines)")
    assert Cell("no endpoint is served", "dim") in [line[0] for line in top.picture([], View(), "", 80, 24)[0] if line]


# Workers


async def one(found: Workers, true: Callable[[Row], object]) -> Row:
    """The only row, when it is as it must become."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            await asyncio.sleep(0)
            await found.look()
            rows = found.rows()
            if len(rows) == 1 and true(rows[0]):
                return rows[0]


async def test_an_overload_a_pause_and_the_end_of_a_worker(trd_dir: Path) -> None:
    free = asyncio.Event()

    async def wait(request: int) -> int:
        await free.wait()
        return request

    config = Config.from_env()
    async with cluster(config, PATIENCE_S) as asked, workers(asked, PATIENCE_S, lambda: None) as found:
        async with DistributedRuntime(config=config) as runtime:
            endpoint = runtime.endpoint("demo.b.g")
            endpoint.serve_endpoint(wait, max_inflight=1, max_queue=1)
            client = await runtime.endpoint("demo.b.g").client()
            await client.wait_for_instances()
            idle = await one(found, lambda row: row.rates)
            assert (idle.endpoint, idle.state, idle.reason) == ("demo.b.g", "serving", "")
            calls = [asyncio.ensure_future(client.call(each)) for each in range(4)]
            full = await one(found, lambda row: row.state == "full")
            assert full.rates is not None
            assert (full.rates.running, full.rates.waiting, full.well) == (1, 1, False)
            free.set()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert sorted(isinstance(each, Overloaded) for each in outcomes) == [False, False, True, True]
            served = await one(found, lambda row: row.state == "serving" and row.rates and row.rates.requests_per_s)
            assert served.worker is not None
            assert served.worker.received_per_s > 0
            await endpoint.pause()  # Discovery lists the reserved endpoint meanwhile, which is not shown.
            paused = await one(found, lambda row: row.state != "serving")
            assert (paused.endpoint, paused.state, paused.reason) == ("demo.b.g", "paused", "")
            await endpoint.resume()
            await one(found, lambda row: row.state == "serving")
        gone = await one(found, lambda row: row.state == "gone")
        assert gone.reason.startswith("discovery has not listed it for ")
        assert not gone.well


async def test_a_worker_of_another_version_is_named(trd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.from_env()
    monkeypatch.setattr("triton_distributed.runtime.answering.counters_of", lambda *_: {"version": 2})
    async with DistributedRuntime(config=config) as runtime:
        runtime.endpoint("demo.b.g").serve_endpoint(lambda request: request)
        async with cluster(config, PATIENCE_S) as asked, workers(asked, PATIENCE_S, lambda: None) as found:
            row = await one(found, lambda row: row.state != "new")
            assert row.state == "unreadable"
            assert row.reason.startswith("its version of this package differs: ")


# The command


def test_lines_for_scripts(trd: Trd) -> None:
    said = trd.run("top", "--once", "--interval", "0.1")
    assert (said.status, said.err) == (0, "no endpoint is served\n")
    worker = trd.serve("worker:echo", "demo.b.g")
    said = trd.run(
        "top", "--once", "--interval", "1", "--sort", "p99", "demo.b"
    )  # what a worker answers later is left out
    assert (said.status, said.err) == (0, "")
    assert said.lines[0].startswith("trd top  1 worker  0 requests/s  every 1 s  file://")
    assert said.lines[2].split()[:2] == ["demo.b.g", "1"]
    assert said.lines[3].split()[:6] == [str(worker.id), "serving", "0", "0", "0", "0"]
    assert len(said.lines) == 4
    running = trd.start("top", "--json", "--interval", "0.1")
    first, second = json.loads(running.line()), json.loads(running.line())
    assert first["time"] < second["time"]
    (instance,) = second["instances"]
    assert (instance["endpoint"], instance["instance"], instance["state"]) == ("demo.b.g", str(worker.id), "serving")
    assert (instance["requests_per_s"], instance["running"], instance["p99_s"]) == (0.0, 0, None)
    running.signal(signal.SIGINT)
    assert running.end().status == 130


@pytest.mark.parametrize("options", [["--sort", "names"], ["--interval", "0"]])
def test_bad_options(trd: Trd, options: list[str]) -> None:
    said = trd.run("top", *options)
    assert (said.status, said.out) == (2, "")
    assert options[0] in said.err


def test_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Failure, match=r"the live table needs rich: pip install 'triton-distributed\[cli\]'"):
        top.run(arguments())


def arguments() -> Any:
    from triton_distributed.cli.arguments import Parser

    parser = Parser()
    top.configure(parser)
    return parser.parse_args([])


@pytest.fixture
def terminal(trd: Trd) -> Iterator[Callable[..., Terminal]]:
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **size: int) -> Terminal:
            found = Terminal(*arguments, **size)
            stack.callback(found.close)
            return found

        yield start


def starts(screen: list[str], *words: str) -> str:
    """The line of the screen that starts with some words; empty without one."""
    return next((line for line in screen if line.split()[: len(words)] == list(words)), "")


@pytest.mark.leaves("socket files", reason="a killed process leaves its own")
def test_a_kill_and_a_stall_in_a_terminal(trd: Trd, terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    os.mkfifo(fifo := tmp_path / "fifo")
    watched = {"TRD_WATCHDOG_S": "0.05"}
    stalls = trd.serve("worker:blocked", "demo.b.stalls", env=watched)
    dies = trd.serve("worker:echo", "demo.b.dies")
    window = terminal("top", "--interval", "0.1")
    window.until(lambda screen: starts(screen, str(stalls.id), "serving") and starts(screen, str(dies.id), "serving"))

    dies.kill()
    screen = window.until(lambda screen: starts(screen, str(dies.id), "gone"))
    assert starts(screen, "instance", f"{dies.id}:", "discovery", "has", "not", "listed", "it")

    call = trd.start("call", "demo.b.stalls", json.dumps(str(fifo)))
    screen = window.until(lambda screen: starts(screen, str(stalls.id), "stuck"))
    assert "its event loop is stuck; its log has the line" in starts(screen, "instance", f"{stalls.id}:", "no")
    fifo.write_text("")
    assert call.end().out == '"done"\n'
    window.until(lambda screen: starts(screen, str(stalls.id), "serving"))

    window.press("e")
    screen = window.until(lambda screen: not starts(screen, str(stalls.id)))
    assert starts(screen, "demo.b.stalls", "1", "up")
    window.resize(50, 8)
    screen = window.until(lambda screen: len(screen) == 8)
    assert screen[2].split() == ["ENDPOINT", "STATE", "REQ/S", "ERR/S", "QUEUE"]
    window.press("q")
    assert window.end() == (0, "")
    assert window.output.startswith(ENTER)
    assert window.output.rstrip().endswith(LEAVE)
    assert window.modes() == window.before
    assert "the event loop is stuck at" in stalls.stop().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_restores_the_terminal(terminal: Callable[..., Terminal], number: signal.Signals, status: int) -> None:
    window = terminal("top", columns=20, lines=5)
    window.until(lambda screen: "no endpoint is serv" in "\n".join(screen))
    assert window.modes() != window.before
    window.process.send_signal(number)
    assert window.end() == (status, "")
    assert window.output.rstrip().endswith(LEAVE)
    assert window.modes() == window.before

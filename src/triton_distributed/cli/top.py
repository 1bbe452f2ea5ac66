"""`trd top`: rates, queues and times of all workers, live."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from textwrap import wrap
from typing import Any

from triton_distributed.cli.arguments import seconds
from triton_distributed.cli.cluster import cluster
from triton_distributed.cli.completion import completes, endpoint_names
from triton_distributed.cli.failure import Failure
from triton_distributed.cli.rendering import json_line, json_option, names_match
from triton_distributed.cli.settings import settings
from triton_distributed.cli.top_table import REASONS, SORTS, Cell, View, as_json, entries, lines, reasons, summary
from triton_distributed.cli.top_workers import Row, Workers, workers
from triton_distributed.config import Config

EPILOG = """\
PATTERN is a shell pattern (*, ?, [..]) for an endpoint's name or for a dotted
beginning of it: `demo`, `demo.back*`, `*.generate`.

Keys: left and right choose the column to sort by, r reverses the order, e hides
the instances, up, down and the page keys scroll, q quits. LAG and BYTES/S are
those of the whole worker.

If standard output is no terminal, each table is printed below the last one.
With --json each interval is one line: time, interval_s and instances, each with
endpoint, instance (text: ids have 63 bits), state, reason if there are no
figures, else rates per second and times in seconds.
"""

SILENT_S = 0.5
"""Seconds without an answer after which a worker is shown as silent, or the interval, if that is shorter."""

PATIENCE_S = 2.0
"""Seconds after which a question is given up and the worker is asked again."""

FIRST_S = 0.25
"""Seconds of the first interval of the live table, so that it soon has figures."""

TERMINATED = 128 + signal.SIGTERM
"""Exit status after SIGTERM, as shells report it."""

NOTHING = "no endpoint is served"
HELP = "←→ sort  r reverse  e instances  ↑↓ scroll  q quit"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    pattern = parser.add_argument(
        "pattern", metavar="PATTERN", nargs="?", help="only endpoints that match (default: all)"
    )
    completes(pattern, endpoint_names)
    parser.add_argument("--sort", metavar="COLUMN", choices=SORTS, default=SORTS[0], help=", ".join(SORTS))
    parser.add_argument(
        "--interval", metavar="S", type=seconds, default=1.0, help="seconds between two tables (default: 1)"
    )
    parser.add_argument("--once", action="store_true", help="print the figures of one interval and end")
    json_option(parser, "one interval")


def run(arguments: argparse.Namespace) -> int:
    """Show the table until it is left."""
    config = settings(connect_timeout_s=PATIENCE_S)
    if sys.stdout.isatty() and not arguments.once and not arguments.json:
        if importlib.util.find_spec("rich") is None:
            hint = "pip install 'triton-distributed[cli]'"
            raise Failure(f"the live table needs rich: {hint}, or use --once")
        terminal = importlib.import_module("triton_distributed.cli.top_terminal")
        if terminal.can_draw():
            return asyncio.run(_live(arguments, config, terminal.Terminal))
    asyncio.run(_print(arguments, config))
    return 0


async def _looks(found: Workers, interval_s: float, first_s: float) -> AsyncIterator[None]:
    """Look at the workers once in each interval, and yield after each look. The first interval is `first_s` seconds."""
    loop = asyncio.get_running_loop()
    due, step_s = loop.time(), first_s
    while True:
        await found.look()
        yield
        due, step_s = max(due + step_s, loop.time()), interval_s
        await asyncio.sleep(due - loop.time())


@asynccontextmanager
async def _workers(
    arguments: argparse.Namespace, config: Config, changed: Callable[[], None]
) -> AsyncIterator[tuple[Workers, str]]:
    async with (
        cluster(config, PATIENCE_S) as asked,
        workers(asked, min(SILENT_S, arguments.interval), changed) as found,
    ):
        yield found, asked.runtime.discovery.where


def _matching(found: Workers, pattern: str | None) -> list[Row]:
    return [each for each in found.rows() if names_match(each.endpoint, pattern)]


async def _print(arguments: argparse.Namespace, config: Config) -> None:
    """Print the figures of each interval: the first ones are there after two looks."""
    looks, view = 0, View(arguments.sort)
    async with _workers(arguments, config, lambda: None) as (found, where):
        async for _ in _looks(found, arguments.interval, arguments.interval):
            looks += 1
            if looks == 1:
                continue
            rows = _matching(found, arguments.pattern)
            if arguments.json:
                time = datetime.now(UTC).isoformat(timespec="milliseconds")
                picture = {"time": time, "interval_s": arguments.interval, "instances": as_json(rows)}
                sys.stdout.buffer.write(json_line(picture))
            elif not rows:
                print(NOTHING, file=sys.stderr)
            else:
                print(summary(rows, where, arguments.interval))
                for line in lines(entries(rows, view), view, sys.maxsize):
                    print("  ".join(cell.text for cell in line).rstrip())
                for each in reasons(rows):
                    print(each)
                if not arguments.once:
                    print()
            sys.stdout.flush()
            if arguments.once:
                return


async def _live(arguments: argparse.Namespace, config: Config, make: Callable[..., Any]) -> int:
    loop, changed = asyncio.get_running_loop(), asyncio.Event()
    view, status = View(arguments.sort), None

    def end(with_status: int = 0) -> None:
        nonlocal status
        status = with_status
        changed.set()

    def pressed(key: str) -> None:
        nonlocal view
        if key in ("q", "Q", "\x04"):  # Ctrl-D
            end()
        view = view.pressed(key)
        changed.set()

    async def look(found: Workers) -> None:
        async for _ in _looks(found, arguments.interval, min(FIRST_S, arguments.interval)):
            changed.set()

    async with _workers(arguments, config, changed.set) as (found, where):
        looking = asyncio.create_task(look(found))
        looking.add_done_callback(lambda _: changed.set())
        loop.add_signal_handler(signal.SIGTERM, end, TERMINATED)
        try:
            with _log_elsewhere(), make(pressed, changed.set, end) as terminal:
                while status is None and not looking.done():
                    rows = _matching(found, arguments.pattern)
                    title = summary(rows, where, arguments.interval)
                    shown, view = picture(rows, view, title, terminal.width, terminal.height)
                    terminal.draw(shown)
                    await changed.wait()
                    changed.clear()
        finally:
            loop.remove_signal_handler(signal.SIGTERM)
            looking.cancel()
            with suppress(asyncio.CancelledError):
                await looking
    return status or 0


@contextmanager
def _log_elsewhere() -> Iterator[None]:
    """Drop the log for as long as it would be written over the table."""
    if not sys.stderr.isatty():
        yield
        return
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def picture(rows: list[Row], view: View, title: str, width: int, height: int) -> tuple[list[list[Cell]], View]:
    """What a terminal shows, and the view, which scrolls no further than the last line."""
    said = [line for each in reasons(rows) for line in wrap(each, max(width, 20), subsequent_indent="  ")][:REASONS]
    header, *table = lines(entries(rows, view), view, width)
    space = max(1, height - len(said) - 4)  # Title, header, keys and an empty line.
    view = view._replace(first=max(0, min(view.first, len(table) - space)))
    below = len(table) - view.first - space
    keys = HELP + (f"  ({below} more lines)" if below > 0 else "")
    if not rows:
        table = [[Cell(NOTHING, "dim")]]
    shown = [[Cell(title[:width], "bold")], [], header, *table[view.first : view.first + space]]
    shown += [[Cell(each[:width], "red")] for each in said]
    shown += [[] for _ in range(height - len(shown) - 1)]
    return [*shown[: height - 1], [Cell(keys[:width], "dim")]], view

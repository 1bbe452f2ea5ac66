"""`trd bench ns.comp.ep '{"…"}'`: call an endpoint under load, and show the distribution of the times."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import math
import random
import sys
from collections.abc import AsyncIterator
from typing import Any

from triton_distributed.cli.arguments import at_least, endpoint, pair, pairs, seconds
from triton_distributed.cli.call import read_request, wait_for_instance
from triton_distributed.cli.completion import completes, endpoint_names
from triton_distributed.cli.failure import FAILED, dotted, one_line
from triton_distributed.cli.load import Load, Quantiles, Summary, bars, duration, summary
from triton_distributed.cli.rendering import json_option, table, write_json
from triton_distributed.cli.settings import settings
from triton_distributed.config import Config
from triton_distributed.names import EndpointName
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.system.event_loop import new_event_loop

EPILOG = """\
With --rate (the default), requests begin at random moments, on average that
many a second, whether or not earlier ones have ended. A time counts from the
moment at which a request was due, so a stall of the worker shows in all the
requests that it delays. With --concurrency, each of N callers sends its next
request when its last one has ended.

The exit status is 1 if a request failed.
"""

RATE = 100.0
"""Requests per second by default."""

LATE_S = 0.01
"""Seconds by which the load itself may be late before that is reported: then this process is too slow for the rate."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    name = parser.add_argument("endpoint", metavar="NS.COMP.EP", type=endpoint, help="the endpoint to call")
    completes(name, endpoint_names)
    parser.add_argument("request", metavar="REQUEST", help="JSON; - reads it from standard input")
    parser.add_argument("--text", action="store_true", help="REQUEST is plain text, not JSON")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--rate", metavar="R", type=rate, default=RATE, help=f"requests a second (default: {RATE:g})")
    how.add_argument("--concurrency", metavar="N", type=at_least(1), help="callers, instead of a rate")
    parser.add_argument("--duration", metavar="S", type=seconds, default=10.0, help="seconds of load (default: 10)")
    parser.add_argument(
        "--warmup",
        metavar="S",
        type=seconds_or_none,
        default=1.0,
        help="seconds of load before that, not counted; 0 for none (default: 1)",
    )
    parser.add_argument(
        "--timeout", metavar="S", type=seconds, default=30.0, help="seconds for each request (default: 30)"
    )
    parser.add_argument(
        "--wait", metavar="S", type=seconds, default=5.0, help="seconds to wait for an instance (default: 5)"
    )
    parser.add_argument(
        "--metadata", metavar="KEY=VALUE", type=pair, action="append", help="send this with each request; repeatable"
    )
    json_option(parser, "one summary")


def rate(text: str) -> float:
    """Parse a number of requests per second."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of requests a second above 0")
    return number


def seconds_or_none(text: str) -> float:
    """Parse a number of seconds; 0 is one, too."""
    return 0.0 if text in ("0", "0.0") else seconds(text)


def run(arguments: argparse.Namespace) -> int:
    """Make the load and print what it found."""
    config = settings()
    request = read_request(arguments.request, arguments.text, config.max_message_bytes)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        load = runner.run(_run(arguments, request, config))
    found = summary(load.samples)
    if arguments.json:
        write_json(_plain(found))
    else:
        for line in lines(found, [each.whole_s for each in load.samples if each.outcome == "ok"]):
            print(line)
    return 0 if set(found.outcomes) <= {"ok"} else FAILED


async def _run(arguments: argparse.Namespace, request: Any, config: Config) -> Load:
    name: EndpointName = arguments.endpoint
    options = {"annotated": False, "timeout": arguments.timeout, "metadata": pairs(arguments.metadata)}
    async with DistributedRuntime(config=config) as runtime:
        client = await runtime.namespace(name.namespace).component(name.component).endpoint(name.endpoint).client()
        await wait_for_instance(client, name, arguments.wait, None, runtime)

        def call() -> Any:
            return client.generate(request, **options)

        async def load(seconds: float) -> Load:
            found = Load(call)
            if arguments.concurrency is None:
                await found.at_rate(arguments.rate, seconds, random.Random(0))
            else:
                await found.at_once(arguments.concurrency, seconds)
            return found

        if arguments.warmup:
            await load(arguments.warmup)
        async with _progress(arguments.duration):
            return await load(arguments.duration)


@contextlib.asynccontextmanager
async def _progress(seconds: float) -> AsyncIterator[None]:
    """Show a bar on standard error, if that is a terminal and rich is installed."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        shown = progress.add_task("load", total=seconds)

        async def advance() -> None:
            while True:
                await asyncio.sleep(0.1)
                progress.advance(shown, 0.1)

        task = asyncio.create_task(advance())
        try:
            yield
        finally:
            task.cancel()


def lines(found: Summary, times: list[float]) -> list[str]:
    """Show a summary: a table, the rates, and a histogram of the times to the end."""
    rows = [
        (name, *map(duration, each))
        for name, each in (("first item", found.first), ("whole answer", found.whole))
        if each is not None
    ]
    shown = table(("", "p50", "p90", "p99", "max"), rows) if rows else []
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in found.outcomes.items()) or "none"
    per_s = 1 / found.seconds if found.seconds else 0.0
    shown += [
        "",
        f"{found.requests:,} requests: {counts}; {found.requests * per_s:,.0f} requests/s, "
        f"{found.items * per_s:,.0f} items/s",
        *(f"{kind}: {one_line(dotted(words))}" for kind, words in found.errors.items()),
        *bars(times),
    ]
    if found.late is not None and found.late.p99 > LATE_S:
        words = "this process or this machine was too busy for it"
        shown.append(f"the load itself was late, by {duration(found.late.p99)} at p99: {words}")
    return shown


def _plain(found: Summary) -> dict[str, Any]:
    """A summary as plain values for JSON, in seconds."""

    def of(each: Quantiles | None) -> dict[str, float] | None:
        return None if each is None else each._asdict()

    return {**found._asdict(), "first": of(found.first), "whole": of(found.whole), "late": of(found.late)}

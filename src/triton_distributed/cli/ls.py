"""`trd ls`: list every served endpoint with its instances, their state and their load."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import Any

import msgspec

from triton_distributed.cli import watch
from triton_distributed.cli.arguments import seconds
from triton_distributed.cli.cluster import cluster
from triton_distributed.cli.completion import completes, endpoint_names
from triton_distributed.cli.health import Row
from triton_distributed.cli.instances import close_names, nothing_is_served
from triton_distributed.cli.rendering import json_option, names_match, span, table, write_json
from triton_distributed.cli.settings import settings
from triton_distributed.config import Config
from triton_distributed.names import INSPECT, Instance

EPILOG = """\
PATTERN is a shell pattern (*, ?, [..]) for an endpoint's name or for a dotted
beginning of it: `demo`, `demo.back*`, `*.generate`.

STATE is `serving`; `unhealthy`: it serves, but a health check or a canary of it
has failed; `full`: it refuses further requests; `paused`, `draining` or
`starting`; `stuck`: its event loop does not turn; `unreachable`: it did not
answer in time. Standard error shows the reason, e.g. why clients leave an
instance out.

RUNNING and WAITING count requests, with the limit where there is one. AGE is the
time since the worker began to serve the endpoint.
"""

HEADER = ("ENDPOINT", "INSTANCE", "STATE", "RUNNING", "WAITING", "AGE", "VERSION", "ADDRESS", "METADATA")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    pattern = parser.add_argument(
        "pattern", metavar="PATTERN", nargs="?", help="only endpoints that match (default: all)"
    )
    completes(pattern, endpoint_names)
    parser.add_argument("--watch", action="store_true", help="then follow the changes, as `trd watch` does")
    json_option(parser, "one instance")
    parser.add_argument(
        "--timeout", metavar="S", type=seconds, default=1.0, help="seconds to wait for each instance (default: 1)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    config = settings(connect_timeout_s=arguments.timeout)
    if arguments.watch:
        return watch.follow(arguments.pattern, config, arguments.timeout, watch.INTERVAL_S, arguments.json)
    found = asyncio.run(_look(arguments.pattern, config, arguments.timeout))
    if arguments.json:
        for row in found:
            write_json(as_json(row))
    elif found:
        for line in table(HEADER, list(map(_cells, found))):
            print(line)
    sys.stdout.flush()
    for row in found if not arguments.json else ():
        if row.reason:
            print(f"{row.name}, instance {row.instance.id}: {row.reason}", file=sys.stderr)
    return 0


async def _look(pattern: str | None, config: Config, timeout_s: float) -> list[Row]:
    async with cluster(config, timeout_s) as workers:
        instances = await workers.instances()
        found = [each for each in await workers.rows(_asked(instances, pattern)) if names_match(each.name, pattern)]
        if not found:
            print(_nothing(pattern, instances, workers.asked()), file=sys.stderr)
        return found


def _asked(instances: list[Instance], pattern: str | None) -> list[Instance]:
    """The instances to ask: those that match, or all, because a worker may have paused the endpoint that matches."""
    return [each for each in instances if names_match(str(each.endpoint), pattern)] or instances


def _nothing(pattern: str | None, instances: list[Instance], asked: str) -> str:
    if instances:
        names = {str(each.endpoint) for each in instances if each.endpoint != INSPECT}
        parts = (name.split(".") for name in names)
        beginnings = {".".join(each[:count]) for each in parts for count in range(1, len(each) + 1)}
        hint = close_names(pattern or "", beginnings) or "; see `trd ls`"
        return f"no endpoint matches {pattern!r}; {len(names)} other endpoint(s) are served{hint}"
    return nothing_is_served(asked)


def as_json(row: Row) -> dict[str, Any]:
    """A row as plain values for JSON."""
    instance, served, worker = row.instance, row.served, row.worker
    return {
        "endpoint": row.name,
        "instance": str(instance.id),  # Text, as in protobuf's JSON: many JSON readers keep only 53 bits of a number.
        "state": row.state,
        "reason": row.reason,
        "addresses": instance.addresses,
        "host": instance.host,
        "metadata": dict(instance.metadata),
        "age_s": row.age_s(time.time()),
        "version": worker.version if worker else None,
        "replica": worker.replica if worker else None,
        "running": served.running if served else None,
        "waiting": served.waiting if served else None,
        "max_inflight": served.max_inflight if served else None,
        "max_queue": served.max_queue if served else None,
    }


def _cells(row: Row) -> tuple[str, ...]:
    instance, served = row.instance, row.served
    age_s = row.age_s(time.time())
    return (
        row.name,
        str(instance.id),
        row.state,
        _of(served.running, served.max_inflight) if served else "-",
        _of(served.waiting, served.max_queue or None) if served else "-",
        "-" if age_s is None else span(age_s),
        row.worker.version if row.worker else "-",
        ",".join(instance.addresses) or "-",
        msgspec.json.encode(dict(instance.metadata)).decode() if instance.metadata else "-",
    )


def _of(number: int, limit: int | None) -> str:
    return str(number) if limit is None else f"{number}/{limit}"

"""`trd ls`: list every served endpoint, its instances, and whether they answer."""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import dataclass
from typing import Any

import msgspec

from triton_distributed.cli.arguments import seconds
from triton_distributed.cli.instances import listed, silences
from triton_distributed.cli.rendering import json_line, names_match, table
from triton_distributed.cli.settings import settings
from triton_distributed.config import Config
from triton_distributed.names import Instance
from triton_distributed.runtime import DistributedRuntime

EPILOG = """\
PATTERN is a shell pattern (*, ?, [..]) for an endpoint's name or for a dotted
beginning of it: `demo`, `demo.back*`, `*.generate`. STATE is `up`, `busy` if an
instance reports that its event loop is stuck, or `unreachable` if it did not
answer in time; standard error shows why. A paused endpoint is not listed.

With --json each instance is one line: endpoint, instance (text: ids have 63
bits), addresses, host, metadata, reachable, busy and, if it does not answer,
reason.
"""

HEADER = ("ENDPOINT", "INSTANCE", "STATE", "ADDRESS", "METADATA")


@dataclass(frozen=True)
class Row:
    """An instance and the reason why it cannot be reached; the reason is empty if it can."""

    instance: Instance
    reason: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", help="only endpoints that match (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument(
        "--timeout", metavar="S", type=seconds, default=1.0, help="seconds to wait for each instance (default: 1)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    rows = asyncio.run(_look(arguments.pattern, settings(connect_timeout_s=arguments.timeout)))
    if arguments.json:
        for row in rows:
            sys.stdout.buffer.write(json_line(_described(row)))
    elif rows:
        for line in table(HEADER, list(map(_cells, rows))):
            print(line)
    sys.stdout.flush()
    for row in rows if not arguments.json else ():
        if row.reason:
            print(f"{row.instance.endpoint}, instance {row.instance.id}: {row.reason}", file=sys.stderr)
    return 0


async def _look(pattern: str | None, config: Config) -> list[Row]:
    async with DistributedRuntime(config=config) as runtime:
        found = await listed(runtime)
        wanted = [each for each in found if names_match(str(each.endpoint), pattern)]
        if not wanted:
            place = runtime.discovery.where
            asked = f"{place} was asked" + ("" if found else runtime.elsewhere(None))
            print(_nothing(pattern, found, asked), file=sys.stderr)
        return list(map(Row, wanted, await silences(runtime, wanted)))


def _nothing(pattern: str | None, found: list[Instance], asked: str) -> str:
    if found:
        names = {each.endpoint for each in found}
        return f"no endpoint matches {pattern!r}; {len(names)} other endpoint(s) are served, see `trd ls`"
    return f"no endpoint is served ({asked}); `trd serve MODULE:OBJECT --endpoint NS.COMP.EP` serves one"


def _described(row: Row) -> dict[str, Any]:
    instance = row.instance
    return {
        "endpoint": str(instance.endpoint),
        "instance": str(instance.id),  # Text, as in protobuf's JSON: many JSON readers keep only 53 bits of a number.
        "addresses": instance.addresses,
        "host": instance.host,
        "metadata": dict(instance.metadata),
        "reachable": not row.reason,
        "busy": instance.busy,
        **({"reason": row.reason} if row.reason else {}),
    }


def _cells(row: Row) -> tuple[str, ...]:
    instance = row.instance
    return (
        str(instance.endpoint),
        str(instance.id),
        "busy" if instance.busy else "unreachable" if row.reason else "up",
        ",".join(instance.addresses) or "-",
        msgspec.json.encode(dict(instance.metadata)).decode() if instance.metadata else "-",
    )

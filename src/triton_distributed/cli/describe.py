"""`trd describe NS.COMP.EP` or `trd describe ID`: show all that is known of an endpoint's instances or of a worker."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from triton_distributed.cli.arguments import endpoint, seconds
from triton_distributed.cli.cluster import cluster
from triton_distributed.cli.completion import completes, endpoints_and_ids
from triton_distributed.cli.failure import Failure, dotted
from triton_distributed.cli.health import Answer, Row, load
from triton_distributed.cli.instances import close_names
from triton_distributed.cli.load import duration
from triton_distributed.cli.ls import as_json as row_as_json
from triton_distributed.cli.rendering import json_option, span, write_json
from triton_distributed.cli.settings import settings
from triton_distributed.cli.types import contract_lines
from triton_distributed.config import Config
from triton_distributed.names import EndpointName
from triton_distributed.observe import BOUNDS_S, quantile

EPILOG = """\
The state of each instance (see `trd ls --help`), its contract, its record in
discovery, its load and limits; then its worker's process, event loop, memory,
sessions and calls. An instance that does not answer is shown as discovery
lists it.
"""

TIMES = {
    "duration": "from the arrival of a request to its end",
    "first_item": "from the arrival to the first item",
    "queue_wait": "in the queue",
    "loop_wait": "from the admission to the first step of the handler",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    target = parser.add_argument(
        "target", metavar="NS.COMP.EP|ID", type=_target, help="an endpoint, or the id of an instance"
    )
    completes(target, endpoints_and_ids)
    json_option(parser, "one instance")
    parser.add_argument(
        "--timeout", metavar="S", type=seconds, default=1.0, help="seconds to wait for each instance (default: 1)"
    )


def _target(text: str) -> EndpointName | int:
    return int(text) if text.isascii() and text.isdecimal() else endpoint(text)


def run(arguments: argparse.Namespace) -> int:
    """Print the descriptions."""
    config = settings(connect_timeout_s=arguments.timeout)
    for number, (row, answer) in enumerate(asyncio.run(_look(arguments.target, config, arguments.timeout))):
        if arguments.json:
            write_json(as_json(row, answer))
        else:
            if number:
                print()
            for line in lines(row, answer):
                print(line)
            sys.stdout.flush()
    return 0


async def _look(target: EndpointName | int, config: Config, timeout_s: float) -> list[tuple[Row, Answer]]:
    async with cluster(config, timeout_s) as workers:
        instances = await workers.instances()
        asked = [each for each in instances if target in (each.endpoint, each.id)]
        # A worker may have paused the endpoint: then it is not listed, and only its worker knows it.
        found = await workers.rows(asked or instances)
        found = [each for each in found if target in (each.instance.endpoint, each.instance.id)]
        if not found:
            place = workers.runtime.discovery.where
            if isinstance(target, int):
                raise Failure(f"there is no instance {target} ({place} was asked): `trd ls` shows the ids")
            close = close_names(str(target), (str(each.endpoint) for each in instances)) or ": see `trd ls`"
            raise Failure(f"no instance serves {target} ({place} was asked){close}")
        ids = dict.fromkeys(each.instance.id for each in found if each.worker)
        answers = {each.instance_id: each for each in await workers.ask(ids, "statistics")}
        return [(each, answers.get(each.instance.id, Answer(0, [], "", reached=False))) for each in found]


def _statistics(answer: Answer) -> Mapping[str, Any]:
    """A worker's statistics as plain values: also of another version, which may have more or fewer."""
    found = answer.items[0] if answer.items else {}
    return found if isinstance(found, Mapping) else {}


def _own(row: Row, statistics: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a worker's statistics about one endpoint."""
    path = row.instance.endpoint.path
    return next((each for each in statistics.get("endpoints", ()) if each.get("name") == path), {})


def as_json(row: Row, answer: Answer) -> dict[str, Any]:
    """A description as plain values for JSON."""
    instance, worker, statistics = row.instance, row.worker, _statistics(answer)
    return {
        **row_as_json(row),
        "contract": instance.contract,
        "since": instance.since or None,
        "pid": instance.pid or (worker.pid if worker else None),
        "status_url": instance.status_url or None,
        "worker": None
        if worker is None
        else {name: value for name, value in msgspec.to_builtins(worker).items() if name != "endpoints"},
        "endpoint_statistics": dict(_own(row, statistics)) or None,
        "runtime_statistics": {name: _ids(name, each) for name, each in statistics.items() if name != "endpoints"}
        or None,
    }


def _ids(name: str, value: Any) -> Any:
    """A value of the statistics with its instance ids as text, as everywhere in JSON."""
    if name == "instance_id":
        return str(value)
    if name == "calls":
        return [{**each, **{ids: [*map(str, each[ids])] for ids in ("instances", "candidates")}} for each in value]
    return value


def lines(row: Row, answer: Answer) -> Iterator[str]:
    """Describe an instance for people."""
    yield f"{row.name}, instance {row.instance.id}: {row.state}"
    for name, text in (*_of_instance(row), *_of_worker(row, _statistics(answer))):
        yield f"  {name:<13} {dotted(text)}"


def _of_instance(row: Row) -> Iterator[tuple[str, str]]:
    instance = row.instance
    if row.reason:
        yield "reason", row.reason
    if instance.contract is None:
        yield "contract", "none is published: the types of its handler, if it has any, are only checked"
    else:
        for number, line in enumerate(contract_lines(instance.contract)):
            yield "" if number else "contract", line
    for number, address in enumerate(instance.addresses or ("none",)):
        yield "" if number else "addresses", address
    if (age_s := row.age_s(time.time())) is not None:
        when = f" ({time.strftime('%Y-%m-%d %H:%M:%S %z', time.localtime(instance.since))})" if instance.since else ""
        yield "served for", f"{span(age_s)}{when}"
    for number, (name, value) in enumerate(sorted(instance.metadata.items())):
        yield "" if number else "metadata", f"{name} = {msgspec.json.encode(value).decode()}"
    if instance.status_url:
        yield "status port", instance.status_url
    if row.served is not None:
        yield "load", load(row.served)


def _of_worker(row: Row, statistics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    own, worker = _own(row, statistics), row.worker
    if own:
        ended = _counts(own.get("outcomes", {}))
        yield "requests", f"{ended or 'none has ended'}; items sent: {own.get('items', 0):,}"
        for number, text in enumerate(_times(own)):
            yield "" if number else "p50, p99", text
    if worker is None:
        if row.instance.pid:
            yield "process", f"pid {row.instance.pid}"
        return
    build = "compiled" if worker.compiled else "pure Python"
    replica = "" if worker.replica is None else f", replica {worker.replica}"
    yield (
        "process",
        f"pid {worker.pid} on {worker.host}{replica}; version {worker.version} ({build}), Python {worker.python}",
    )
    yield "all requests", f"{worker.running} running of {worker.max_requests}"
    if not statistics:
        return
    loop, threads = statistics.get("loop", {}), statistics.get("threads", {})
    stalls = loop.get("stalls", 0)
    took = f" of {duration(loop.get('stalled_s', 0))}, the longest {duration(loop.get('longest_s', 0))}"
    yield "event loop", f"{stalls} stalls{took}" if stalls else "no stall"
    yield "threads", ", ".join(f"{threads.get(name, 0)} {name}" for name in ("running", "parked", "waiting", "limit"))
    for name in ("held", "shared"):
        used, limit = statistics.get(f"{name}_bytes", 0), statistics.get(f"{name}_limit_bytes", 0)
        yield f"{name} memory", f"{used:,} of {limit:,} bytes"
    sessions = statistics.get("sessions", ())
    roles = _counts(Counter(each.get("role") for each in sessions)) or "none"
    streams, blocked = (sum(each.get(name, 0) for each in sessions) for name in ("streams", "blocked"))
    yield "sessions", f"{roles}; {streams} streams, {blocked} of them wait for their reader"
    for number, each in enumerate(statistics.get("calls", ())):
        words = f"{each['name']}: {each['open']} under way, {_counts(each['outcomes']) or 'none has ended'}"
        yield "" if number else "calls", words


def _times(own: Mapping[str, Any]) -> Iterator[str]:
    """The quantiles of the times that a worker has measured."""
    for name, words in TIMES.items():
        counts = own.get(name, {}).get("counts", ())
        if len(counts) != len(BOUNDS_S) + 1:  # Another version has other buckets.
            continue
        found = [quantile(counts, share) for share in (0.5, 0.99)]
        yield from [f"{', '.join(duration(each) for each in found if each is not None)}: {words}"] if found[0] else ()


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)

"""`trd requests`: list the requests that the workers serve now, and what each one waits for."""

from __future__ import annotations

import argparse
import asyncio
import sys

import msgspec

from triton_distributed.cli.arguments import seconds
from triton_distributed.cli.cluster import cluster
from triton_distributed.cli.completion import completes, endpoint_names
from triton_distributed.cli.health import Answer, stuck_words
from triton_distributed.cli.rendering import json_option, names_match, table, write_json
from triton_distributed.cli.settings import settings
from triton_distributed.config import Config
from triton_distributed.runtime.answering import read_reports
from triton_distributed.runtime.requests import RequestReport

EPILOG = """\
PATTERN is a shell pattern (*, ?, [..]) for an endpoint's name or for a dotted
beginning of it: `demo`, `demo.back*`, `*.generate`.

A request has the same id in all workers that it passes through: `trd why ID`
shows its way. A worker that does not answer is named on standard error.
"""

HEADER = ("REQUEST", "ENDPOINT", "INSTANCE", "STATE", "WAITS FOR")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    pattern = parser.add_argument(
        "pattern", metavar="PATTERN", nargs="?", help="only endpoints that match (default: all)"
    )
    completes(pattern, endpoint_names)
    json_option(parser, "one request")
    parser.add_argument(
        "--timeout", metavar="S", type=seconds, default=1.0, help="seconds to wait for each worker (default: 1)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the requests."""
    config = settings(connect_timeout_s=arguments.timeout)
    reports, silent = asyncio.run(look(config, arguments.timeout))
    reports = [each for each in reports if names_match(each.endpoint, arguments.pattern)]
    reports.sort(key=lambda each: (each.endpoint, each.instance_id))
    if arguments.json:
        for each in reports:
            write_json(as_json(each))
    elif reports:
        for line in table(HEADER, [_cells(each) for each in reports]):
            print(line)
    else:
        print("no worker that answered serves a request" if silent else "no request is served", file=sys.stderr)
    sys.stdout.flush()
    say_silent(silent)
    return 0


async def look(
    config: Config, timeout_s: float, id: str = "", stacks: bool = False
) -> tuple[list[RequestReport], list[Answer]]:
    """Ask all workers for their requests.

    Args:
        timeout_s: seconds to wait for each worker.
        id, stacks: see `answering.Question`.

    Returns:
        the reports, and the answers of the workers that gave none.
    """
    async with cluster(config, timeout_s) as found:
        answers = await found.ask(found.workers(), "requests", id=id, stacks=stacks)
        instances = await found.instances()
        # A fixed discovery makes the ids, one for each endpoint: a worker is asked once for each, and does not know it.
        fixed = {(str(each.endpoint), each.id) for each in instances} if config.backend.fixed else None
    reports: list[RequestReport] = []
    stuck = {each.id: stuck_words(each) for each in instances if each.busy}
    silent = [each._replace(reason=stuck.get(each.instance_id, each.reason)) for each in answers if each.reason]
    for answer in answers:
        try:
            for report in (report for chunk in answer.items for report in read_reports(chunk)):
                if fixed is None:
                    reports.append(report)
                elif (report.endpoint, answer.instance_id) in fixed:
                    reports.append(msgspec.structs.replace(report, instance_id=answer.instance_id))
        except msgspec.ValidationError as error:
            silent.append(answer._replace(reason=f"it runs another version, whose answer cannot be read: {error}"))
    return reports, silent


def say_silent(silent: list[Answer]) -> None:
    """Name on standard error the workers that did not answer."""
    for each in silent:
        print(f"instance {each.instance_id}: {each.reason}", file=sys.stderr)


def as_json(report: RequestReport) -> dict[str, object]:
    """A report as plain values for JSON."""
    calls = [{**msgspec.to_builtins(each), "instance_id": str(each.instance_id)} for each in report.calls]
    plain: dict[str, object] = msgspec.to_builtins(report)
    return {**plain, "instance_id": str(report.instance_id), "calls": calls}


def reason(report: RequestReport) -> str:
    """What a request waits for, in a few words."""
    if report.state == "waiting":
        return f"a place: {report.ahead} before it"
    if report.state == "announced":
        return "the event loop, to begin"
    if report.blocked:
        return "its caller, which does not read"
    if report.calls and report.state == "running":
        return ", ".join(dict.fromkeys(each.endpoint for each in report.calls))
    return f"its handler: {report.line}"


def _cells(report: RequestReport) -> tuple[str, ...]:
    return report.id, report.endpoint, str(report.instance_id), report.state, reason(report)

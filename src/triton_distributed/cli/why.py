"""`trd why REQUEST`: show the way of one request through the workers, and where it waits."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from typing import Any

from triton_distributed.cli.arguments import seconds
from triton_distributed.cli.completion import PATIENCE_S, completes, quietly
from triton_distributed.cli.failure import Failure
from triton_distributed.cli.rendering import json_option, write_json
from triton_distributed.cli.requests import as_json, look, reason, say_silent
from triton_distributed.cli.settings import settings
from triton_distributed.config import Config
from triton_distributed.runtime.requests import AwaitedCall, RequestReport

EPILOG = """\
REQUEST is the id of a request, as logs, errors and `trd requests` show it. A
handler's own calls have the id of its request, so that each line below another
one is a call that the upper one waits for. The last line is where it hangs.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    completes(parser.add_argument("request", metavar="REQUEST", help="the request's id"), request_ids)
    parser.add_argument("--stack", action="store_true", help="show all lines of the handlers, not only the innermost")
    json_option(parser, "one request on one worker")
    parser.add_argument(
        "--timeout", metavar="S", type=seconds, default=1.0, help="seconds to wait for each worker (default: 1)"
    )


def request_ids(**_: Any) -> list[str]:
    """The requests that the workers serve now, for a shell that completes the argument."""

    async def ask() -> list[str]:
        reports, _ = await look(Config.from_env(status_port=-1, connect_timeout_s=PATIENCE_S), PATIENCE_S)
        return sorted({each.id for each in reports})

    return quietly(ask())


def run(arguments: argparse.Namespace) -> int:
    """Print the way of the request."""
    config = settings(connect_timeout_s=arguments.timeout)
    reports, silent = asyncio.run(look(config, arguments.timeout, arguments.request, arguments.stack))
    say_silent(silent)
    if not reports:
        hint = (
            "a worker that did not answer may serve it" if silent else "it has ended, or its caller has not sent it yet"
        )
        raise Failure(f"no worker that answered serves request {arguments.request}: {hint}")
    if arguments.json:
        for each in reports:
            write_json(as_json(each))
    else:
        for line in way(reports):
            print(line)
    return 0


def way(reports: list[RequestReport]) -> Iterator[str]:
    """Describe the way of a request: each request that a handler waits for is below it, indented.

    Args:
        reports: the reports of all workers that have the request.
    """
    left = list(reports)
    called = {(call.endpoint, call.instance_id) for each in reports for call in each.calls}
    first = [each for each in reports if (each.endpoint, each.instance_id) not in called]
    for each in first or reports[:1]:
        if each in left:
            left.remove(each)
            yield from _below(each, left, "")
    for each in left:  # Requests that call each other in a circle, or whose caller waits no longer.
        yield from _lines(each, "")


def _below(report: RequestReport, left: list[RequestReport], indent: str) -> Iterator[str]:
    yield from _lines(report, indent)
    for call in report.calls:
        found = next((each for each in left if (each.endpoint, each.instance_id) == _target(call)), None)
        if found is not None:
            left.remove(found)
            yield from _below(found, left, indent + "  ")
        else:
            words = "has not answered" if call.sent else "the request has not been sent"
            yield f"{indent}  {call.endpoint} on instance {call.instance_id}: no report; {words}"


def _target(call: AwaitedCall) -> tuple[str, int]:
    return call.endpoint, call.instance_id


def _lines(report: RequestReport, indent: str) -> Iterator[str]:
    yield f"{indent}{report.endpoint} on instance {report.instance_id}: {report.state}, waits for {reason(report)}"
    deadline = report.remaining_s
    if deadline is not None:
        yield f"{indent}    its deadline is in {deadline:.3g} s"
    for line in report.stack or ((report.line,) if report.line else ()):
        yield f"{indent}    at {line}"

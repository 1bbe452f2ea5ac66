"""`trd replay TRACE --policy NAME`: run a trace in virtual time over mock engines, and compare routing policies."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from triton_distributed.cli.arguments import at_least, seconds
from triton_distributed.cli.failure import USAGE, Failure
from triton_distributed.cli.load import duration
from triton_distributed.cli.policies import policy_of
from triton_distributed.cli.rendering import table, write_json

HEADER = (
    "policy",
    "first token",
    "p50",
    "p90",
    "p99",
    "between tokens",
    "p99",
    "cached",
    "in time",
    "goodput",
    "requests",
)

POOLS = ("policy", "pool", "workers", "busy", "prompts", "first token", "p99", "cached", "in time", "goodput")


OPTIONS = ("workers", "prefill", "decode", "speed", "blocks", "block_tokens", "ttft", "itl", "seed", "plot")
"""The arguments that only a trace has."""

WORKERS = 8


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a trace."""
    group = parser.add_argument_group("a trace of requests for language models, in virtual time")
    group.add_argument(
        "--policy",
        metavar="NAME[,NAME…]",
        help="FILE is a trace in Mooncake's format: run it with each of these policies; module:object for your own",
    )
    group.add_argument("--workers", metavar="N", type=at_least(1), help="mock engines (default: 8)")
    group.add_argument(
        "--prefill", metavar="N", type=at_least(1), help="pools in place of --workers: those that only compute prompts"
    )
    group.add_argument("--decode", metavar="N", type=at_least(1), help="with --prefill: those that answer")
    group.add_argument(
        "--speed", metavar="X", type=_factor, default=1.0, help="times faster than in the trace (default: 1)"
    )
    group.add_argument(
        "--blocks", metavar="N", type=at_least(1), default=16_384, help="blocks of an engine's cache (default: 16384)"
    )
    group.add_argument(
        "--block-tokens", metavar="N", type=at_least(1), default=64, help="tokens in a block (default: 64)"
    )
    group.add_argument(
        "--ttft", metavar="S", type=seconds, default=2.0, help="most seconds to the first token (default: 2)"
    )
    group.add_argument(
        "--itl", metavar="S", type=seconds, default=0.2, help="most mean seconds between tokens (default: 0.2)"
    )
    group.add_argument("--seed", metavar="N", type=int, default=0, help="of random choices (default: 0)")
    group.add_argument("--plot", metavar="PNG", type=Path, help="draw the figures into this file")


def _factor(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Run the trace with each policy, and print what came of it.

    Raises:
        Failure: the file cannot be read, there is no such policy or the user's own fails, a package is missing, or the
            figure cannot be written.
        ConfigError: the user's policy is not a function of a question and candidates.
        InvalidParameter: the trace or a value is invalid.
    """
    if (arguments.prefill is None) != (arguments.decode is None):
        raise Failure("--prefill N and --decode N belong together", USAGE)
    if arguments.workers is not None and arguments.prefill is not None:
        raise Failure("--workers N contradicts --prefill N and --decode N", USAGE)
    prefill = arguments.prefill or 0
    workers = (arguments.workers or WORKERS) if arguments.decode is None else prefill + arguments.decode
    policies = _policies(arguments.policy)
    try:
        place = importlib.import_module("triton_distributed.llm.replay")
        plot = importlib.import_module("triton_distributed.llm.replay.plot") if arguments.plot else None
    except ImportError as error:
        raise Failure(str(error)) from error
    if plot is not None:
        _check_figure(arguments.plot, plot.Figure().canvas.get_supported_filetypes())
    routers = importlib.import_module("triton_distributed.llm.routing.router")
    failures = importlib.import_module("triton_distributed.llm.routing.view")
    for each in policies:
        routers.Router.named(each)  # One that takes other parameters is reported before the first replay.
    try:
        trace = place.read_trace(arguments.file)
    except OSError as error:
        raise Failure(f"cannot read {arguments.file}: {error.strerror}", USAGE) from error
    reports = []
    for policy in policies:
        try:
            found = place.simulate(
                trace,
                policy,
                workers=workers,
                prefill=prefill,
                speed=arguments.speed,
                blocks=arguments.blocks,
                block_tokens=arguments.block_tokens,
                ttft_sla_s=arguments.ttft,
                itl_sla_s=arguments.itl,
                seed=arguments.seed,
            )
        except failures.PolicyFailed as error:
            raise Failure(f"{error}{_place(error.__cause__)}") from error
        reports.append(found)
        if arguments.json:
            write_json(found.summary())
    if not arguments.json:
        requests, took = len(reports[0].requests), reports[0].duration_s
        print(f"{requests} requests, {workers} workers; {took:.0f} s of virtual time with {reports[0].policy}")
        for line in table(HEADER, [_row(each) for each in reports]):
            print(line)
        if prefill:
            print()
            for line in table(POOLS, [row for each in reports for row in _pools(each)]):
                print(line)
    if plot is not None:  # After the table: a full disk does not cost the results.
        try:
            plot.draw(reports, arguments.plot)
        except (OSError, ValueError) as error:
            raise Failure(f"cannot draw {arguments.plot}: {error}") from error
    return 0


def _policies(text: str) -> list[Any]:
    """Policies by name, or the user's own."""
    names = [each.strip() for each in text.split(",")]
    if not all(names):
        raise Failure("--policy: name at least one policy, e.g. kv,least_loaded", USAGE)
    if twice := [each for each in names if names.count(each) > 1]:
        raise Failure(f"--policy: {twice[0]} is given twice", USAGE)
    return [policy_of("--policy", each) for each in names]


def _check_figure(path: Path, formats: Collection[str]) -> None:
    """Refuse what cannot be drawn before the trace has run."""
    if not path.parent.is_dir():
        raise Failure(f"cannot draw {path}: there is no folder {path.parent}", USAGE)
    if path.suffix and path.suffix[1:].lower() not in formats:
        raise Failure(f"cannot draw {path}: the formats are {', '.join(sorted(formats))}", USAGE)


def _place(error: BaseException | None) -> str:
    """The line of the user's own code that has raised an error; empty without one."""
    trace = None if error is None else error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})"


def _row(report: Any) -> tuple[str, ...]:
    first, gap = report.ttft_s, report.itl_s
    requests = [each.requests for each in report.workers if each.role != "prefill"]
    return (
        report.policy,
        *map(duration, (first.mean, first.p50, first.p90, first.p99, gap.mean, gap.p99)),
        f"{report.hit_rate:.1%}",
        f"{report.within / len(report.requests):.1%}",
        f"{report.goodput:.3g}/s",
        f"{min(requests)}–{max(requests)}",
    )


def _pools(report: Any) -> list[tuple[str, ...]]:
    return [
        (
            report.policy,
            each.role,
            str(each.workers),
            f"{each.busy:.1%}",
            str(each.prompts),
            *map(duration, (each.ttft_s.mean, each.ttft_s.p99)),
            f"{each.hit_rate:.1%}",
            f"{each.within / each.prompts:.1%}" if each.prompts else "",
            f"{each.goodput:.3g}/s",
        )
        for each in report.pools
    ]

"""`python -m harness.runs.chaos` (`make chaos`): real workers under seeded calls and faults. Every call is judged."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from harness.caller import make_calls
from harness.journal import FileJournal
from harness.oracle import Oracle
from harness.requests import ENDPOINT, TWO_WAY, Plan, Variety, plans
from harness.worker import COMMAND
from triton_distributed.errors import ConfigError
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.testing.chaos import ChaosCluster, Fault, Report
from triton_distributed.testing.chaos.command import configure, run

PROG = "python -m harness.runs.chaos"

# Without the largest items: on a busy machine, dozens of items of a megabyte on one stream take longer than any fault.
VARIETY = Variety(largest=2**18, two_way=True, cancels=0.05, directly=0.05, priorities=True)

# A call's worker may be stopped for a second, and again after the call has moved, and its connection may delay each
# piece by a tenth of a second. A call that takes ten times as long hangs.
LONGEST_S = 15.0


async def judged(cluster: ChaosCluster, faults: Sequence[Fault], calls: Sequence[Plan], *, spare: int = 1) -> Report:
    """Make calls while a cluster suffers faults, and judge every call. The cluster must serve `requests.handler`.

    Args:
        cluster: a started cluster that was not run before.
        faults: the faults, from `schedule`.
        calls: the calls, from `plans`.
        spare: the schedule's number of spare workers; with at least one, a call that may move must not fail.
    """
    oracle = Oracle(strict=spare > 0, spared=cluster.spared, longest_s=LONGEST_S)

    async def make() -> None:
        async with DistributedRuntime(config=cluster.config) as runtime:
            clients = {path: await runtime.endpoint(path).client() for path in (ENDPOINT, TWO_WAY)}
            for client in clients.values():
                await client.wait_for_instances()
            await make_calls(clients, calls, oracle, time.monotonic)

    report = await cluster.run(faults, make, spare=spare)
    oracle.close(FileJournal.read(cluster.journal))
    report.violations += oracle.violations
    report.outcomes, report.worst_gap_s = oracle.outcomes(), oracle.worst_gap_s()
    report.worst_call_s = oracle.worst_call_s()
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Do a run; return 0 after a good run, 1 with violations, 2 if the run is not possible as requested."""
    parser = argparse.ArgumentParser(prog=PROG, description="Real workers under faults, every request judged.")
    configure(parser)
    parser.add_argument("--calls-per-s", type=float, default=40.0, help="calls that begin in a second (default: 40)")
    arguments = parser.parse_args(argv)
    calls = plans(arguments.seed, duration_s=arguments.seconds, calls_per_s=arguments.calls_per_s, variety=VARIETY)

    async def go(cluster: ChaosCluster, faults: Sequence[Fault]) -> Report:
        return await judged(cluster, faults, calls, spare=arguments.spare)

    try:
        return run(
            arguments,
            [*COMMAND, "--loop", arguments.loop],
            go,
            f"{PROG} --calls-per-s {arguments.calls_per_s:g}",
        )
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())

"""`python -m triton_distributed.testing.chaos --calls MODULE:FUNCTION -- PROGRAM …`: chaos runs of your own workers."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from triton_distributed.errors import ConfigError
from triton_distributed.testing.chaos.cluster import ChaosCluster
from triton_distributed.testing.chaos.command import configure, run
from triton_distributed.testing.chaos.report import Report
from triton_distributed.testing.chaos.schedule import Fault

PROG = "python -m triton_distributed.testing.chaos"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a schedule of faults from the command line.

    Args:
        argv: the arguments, by default those of the process.

    Returns:
        0 after a good run, 1 after violations, 2 if the run was impossible as requested.
    """
    parser = argparse.ArgumentParser(prog=PROG, description="Hurt your own workers on a seeded schedule.")
    configure(parser)
    parser.add_argument("--calls", required=True, metavar="MODULE:FUNCTION", help="an async function of the cluster")
    parser.add_argument("program", nargs="+", help="a worker that calls obey(runtime), and its arguments")
    arguments = parser.parse_args(argv)
    module, _, name = arguments.calls.partition(":")
    try:
        calls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        parser.error(f"--calls {arguments.calls}: {error}")

    async def judged(cluster: ChaosCluster, faults: Sequence[Fault]) -> Report:
        return await cluster.run(faults, lambda: calls(cluster), spare=arguments.spare)

    try:
        again, program = f"{PROG} --calls {arguments.calls}", f" -- {' '.join(arguments.program)}"
        return run(arguments, arguments.program, judged, again, program)
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())

"""`python -m triton_distributed.testing.chaos COMMAND --seed N`: chaos runs from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from triton_distributed.errors import ConfigError
from triton_distributed.testing.chaos import many, real

COMMANDS = {
    "processes": ("real worker processes that are killed, stopped, cut off and starved", real.configure, real.run),
    "simulated": ("thousands of systems in one thread, in virtual time; each repeats itself", many.configure, many.run),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Do a run.

    Args:
        argv: arguments, by default the process's own.

    Returns:
        0 after a good run, 1 with violations, 2 where it could not be done as asked.
    """
    parser = argparse.ArgumentParser(prog="python -m triton_distributed.testing.chaos", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (text, configure, _) in COMMANDS.items():
        configure(commands.add_parser(name, help=text, description=text))
    arguments = parser.parse_args(argv)
    try:
        return COMMANDS[arguments.command][2](arguments)
    except ConfigError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

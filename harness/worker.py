"""A worker of a chaos run: `python -m harness.worker JOURNAL`; its settings are `TRD_*`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.journal import FileJournal
from harness.requests import ENDPOINT, TWO_WAY, Journal, echo, handler
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.testing.chaos.cluster import JOURNAL
from triton_distributed.testing.chaos.control import obey

try:
    from uvloop import new_event_loop
except ImportError:  # no wheel for this platform
    from asyncio import new_event_loop  # type: ignore[assignment]

# The command that serves `requests.handler` and `requests.echo`.
COMMAND = (sys.executable, "-m", "harness.worker", JOURNAL)


async def serve(journal: Path, made: Callable[[Journal], Callable[..., Any]] = handler) -> None:
    """Serve until a signal ends it.

    Args:
        journal: path of the journal.
        made: makes the handler from the journal.
    """
    runtime = DistributedRuntime()
    obey(runtime)
    try:
        written = FileJournal(journal)
        await asyncio.gather(
            runtime.endpoint(ENDPOINT).serve_endpoint(made(written)),
            runtime.endpoint(TWO_WAY).serve_endpoint(echo(written)),
        )
    finally:
        await runtime.close()


def main(made: Callable[[Journal], Callable[..., Any]] = handler) -> None:
    """Run the program.

    Args:
        made: makes the handler from the journal.
    """
    parser = argparse.ArgumentParser(description="A worker of a chaos run.")
    parser.add_argument("journal", type=Path, help="where its handlers write down which requests they begin")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop", help="uvloop where it is installed")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s")
    factory = asyncio.new_event_loop if arguments.loop == "asyncio" else new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(arguments.journal, made))


if __name__ == "__main__":
    main()

"""The endpoints of a run's workers. The functions are parts of `harness.member`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.journal import FileJournal
from harness.member import Member
from harness.requests import ENDPOINT, PLAIN, RELAY, TWO_WAY, Journal, echo, handler, plain, relay
from triton_distributed.testing.chaos.cluster import JOURNAL

# The command of a `ChaosCluster` with workers that serve `requests.handler` and `requests.echo`.
COMMAND = (sys.executable, "-m", "harness.member", "worker", f"harness.worker:serve:{JOURNAL}")


async def serve(member: Member, journal: str) -> None:
    """Serve the endpoints of a chaos run. The handlers record in a file which requests they begin."""
    serve_made(member, journal, handler)


def serve_made(member: Member, journal: str, made: Callable[[Journal], Callable[..., Any]]) -> None:
    """Serve a handler that is made from the journal, and `requests.echo`."""
    written = FileJournal(Path(journal))
    member.serve(ENDPOINT, made(written))
    member.serve(TWO_WAY, echo(written))


class NoJournal:
    """Records nothing, for runs that are too long for a journal."""

    def began(self, request_id: int) -> None:
        """Write nothing."""


async def serve_all(member: Member, made: Callable[[Journal], Callable[..., Any]] = handler) -> None:
    """Serve all handlers of `harness.requests`, without a journal.

    Args:
        member: the process.
        made: makes the streaming handler.
    """
    onward = await member.runtime.endpoint(ENDPOINT).client()
    served = {ENDPOINT: made(NoJournal()), TWO_WAY: echo(NoJournal()), PLAIN: plain(NoJournal()), RELAY: relay(onward)}
    for path, function in served.items():
        member.serve(path, function)

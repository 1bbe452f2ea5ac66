"""`trd watch`: follow the instances of the system, one line for each change."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from triton_distributed.cli.arguments import seconds
from triton_distributed.cli.cluster import Cluster, cluster
from triton_distributed.cli.completion import completes, endpoint_names
from triton_distributed.cli.health import Row
from triton_distributed.cli.instances import nothing_is_served
from triton_distributed.cli.output import Output
from triton_distributed.cli.rendering import json_line, json_option, names_match
from triton_distributed.cli.settings import settings
from triton_distributed.config import Config
from triton_distributed.discovery import Added, Change, Snapshot
from triton_distributed.discovery.base import same
from triton_distributed.names import INSPECT, EndpointName, Instance

EPILOG = """\
Each line is one change of an instance: `present` (at the start), `come`, `gone`,
`changed` (its addresses or metadata), and its new state: `serving`, `full`,
`paused`, `draining`, `starting`, `stuck` or `unreachable`; see `trd ls --help`.

Discovery reports which instances come and go. Each worker is asked for its state
every --interval seconds. Ctrl-C ends the command.
"""

INTERVAL_S = 2.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    pattern = parser.add_argument(
        "pattern", metavar="PATTERN", nargs="?", help="only endpoints that match (default: all)"
    )
    completes(pattern, endpoint_names)
    parser.add_argument(
        "--interval",
        metavar="S",
        type=seconds,
        default=INTERVAL_S,
        help=f"seconds between two questions to a worker (default: {INTERVAL_S:g})",
    )
    parser.add_argument(
        "--timeout", metavar="S", type=seconds, default=1.0, help="seconds to wait for each answer (default: 1)"
    )
    json_option(parser, "one change")


def run(arguments: argparse.Namespace) -> int:
    """Print the changes until Ctrl-C."""
    config = settings(connect_timeout_s=arguments.timeout)
    return follow(arguments.pattern, config, arguments.timeout, arguments.interval, arguments.json)


def follow(pattern: str | None, config: Config, timeout_s: float, interval_s: float, json: bool) -> int:
    """Print the changes of matching endpoints until Ctrl-C.

    Args:
        timeout_s: seconds to wait for each worker's answer.
        interval_s: seconds between two questions to a worker.
        json: print one JSON object for each change.
    """
    asyncio.run(_follow(pattern, config, timeout_s, interval_s, json))
    return 0


async def _follow(pattern: str | None, config: Config, timeout_s: float, interval_s: float, json: bool) -> None:
    with Output() as output:
        async with cluster(config, timeout_s) as workers:
            changes: asyncio.Queue[tuple[str, Row]] = asyncio.Queue()  # Each is written before the loop turns again.
            following = Following(workers, interval_s, lambda event, row: changes.put_nowait((event, row)))
            watch = await workers.runtime.discovery.watch(None, following.apply)
            try:
                if changes.empty():
                    print(f"{nothing_is_served(workers.asked())}; waiting for changes", file=sys.stderr)
                while True:
                    event, row = await changes.get()
                    if names_match(row.name, pattern):
                        output.write(json_line(_as_json(event, row)) if json else f"{_line(event, row)}\n".encode())
            finally:
                watch.close()
                await following.close()


class _Followed:
    """One worker.

    Attributes:
        listed: its instances, as discovery lists them, by endpoint.
        shown: what was shown of it last, by endpoint.
        changed: set when discovery reports a change of it.
        task: asks it.
    """

    def __init__(self) -> None:
        self.listed: dict[EndpointName, Instance] = {}
        self.shown: dict[EndpointName, Row] = {}
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class Following:
    """Follows all instances: discovery reports which come and go, and each worker is asked for its state.

    Args:
        workers: the cluster.
        interval_s: seconds between two questions to a worker.
        show: called with each change: what happened, and the instance as it is now.
    """

    def __init__(self, workers: Cluster, interval_s: float, show: Callable[[str, Row], None]) -> None:
        self._workers = workers
        self._interval_s = interval_s
        self._show = show
        self._followed: dict[int, _Followed] = {}  # By instance id, as long as it is listed or has paused an endpoint.
        self._began = False

    def apply(self, change: Change) -> None:
        """Take a change from discovery."""
        if isinstance(change, Snapshot):
            present = {(each.endpoint, each.id) for each in change.instances}
            for id, each in list(self._followed.items()):
                for endpoint in [endpoint for endpoint in each.listed if (endpoint, id) not in present]:
                    self._gone(endpoint, id)
            for instance in sorted(change.instances, key=lambda each: (str(each.endpoint), each.id)):
                self._come(instance)
            self._began = True
        elif isinstance(change, Added):
            self._come(change.instance)
        else:
            self._gone(change.endpoint, change.instance_id)

    def _come(self, instance: Instance) -> None:
        worker = self._followed.setdefault(instance.id, _Followed())
        known = worker.listed.get(instance.endpoint)
        worker.listed[instance.endpoint] = instance
        if instance.endpoint != INSPECT:
            shown = worker.shown.get(instance.endpoint)
            if shown is None:
                worker.shown[instance.endpoint] = row = Row(instance, "serving")
                self._show("come" if self._began else "present", row)
            elif known is not None and not same(replace(known, busy=False), replace(instance, busy=False)):
                self._show("changed", shown._replace(instance=instance))
        worker.changed.set()
        if worker.task is None:
            worker.task = asyncio.create_task(self._follow(instance.id, worker))

    def _gone(self, endpoint: EndpointName, id: int) -> None:
        if (worker := self._followed.get(id)) is not None and worker.listed.pop(endpoint, None) is not None:
            worker.changed.set()  # If the worker answers, it has only paused the endpoint.

    async def _follow(self, id: int, worker: _Followed) -> None:
        """Ask one worker for the state of its endpoints, as long as discovery lists any."""
        while worker.listed:
            worker.changed.clear()
            found = {each.instance.endpoint: each for each in await self._workers.rows(list(worker.listed.values()))}
            if worker.changed.is_set():
                continue  # The answer may be older than the change.
            self._differ(worker, found)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await worker.changed.wait()
        self._differ(worker, {})
        del self._followed[id]

    def _differ(self, worker: _Followed, found: dict[EndpointName, Row]) -> None:
        """Show what has changed since the last look."""
        for endpoint in [each for each in worker.shown if each not in found]:
            self._show("gone", worker.shown.pop(endpoint))
        for endpoint, row in found.items():
            before = worker.shown.get(endpoint)
            worker.shown[endpoint] = row
            if before is None or before.state != row.state:
                self._show(row.state, row)

    async def close(self) -> None:
        """End the questions."""
        tasks = [each.task for each in self._followed.values() if each.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _as_json(event: str, row: Row) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    instance = row.instance
    return {
        "time": now.isoformat(timespec="milliseconds"),
        "event": event,
        "endpoint": row.name,
        "instance": str(instance.id),
        "reason": row.reason if event == row.state else "",
        "addresses": instance.addresses,
        "metadata": dict(instance.metadata),
    }


def _line(event: str, row: Row) -> str:
    now = datetime.datetime.now().astimezone()
    place = ",".join(row.instance.addresses) or "-"
    reason = f"  {row.reason}" if event == row.state and row.reason else ""
    return f"{now:%H:%M:%S}  {event:<11}  {row.name}  {row.instance.id}  {place}{reason}"

"""`processes`: seeded calls against a cluster of real processes that is hurt on a seeded schedule."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from triton_distributed.errors import ConfigError
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.testing.chaos.caller import make_calls
from triton_distributed.testing.chaos.cluster import JOURNAL, NETWORKS, WORKER, ChaosCluster
from triton_distributed.testing.chaos.disk import private_mounts
from triton_distributed.testing.chaos.injector import LINUX_ONLY, ON_TCP, PROXIED
from triton_distributed.testing.chaos.journal import FileJournal
from triton_distributed.testing.chaos.oracle import Oracle
from triton_distributed.testing.chaos.report import Report
from triton_distributed.testing.chaos.requests import ENDPOINT, TWO_WAY, Plan, Variety, plans
from triton_distributed.testing.chaos.schedule import Fault, FaultKind, Recovery, schedule
from triton_distributed.testing.servers import EtcdServer, NatsServer

try:
    from uvloop import new_event_loop
except ImportError:  # no wheel for this platform
    from asyncio import new_event_loop  # type: ignore[assignment]

# A successor needs 0.5 s to serve on an idle machine. A schedule leaves it this long; where it needs more, faults are
# left out, see `Injector`.
RECOVERY = Recovery(restart_s=1.5, other_s=0.5)


# Not the largest items: dozens of a megabyte on one stream take longer than any fault where the machine is busy.
VARIETY = Variety(largest=2**18, two_way=True, cancels=0.05, directly=0.05, priorities=True)

# A call may be with a worker that is stopped for a second, again after it has moved, and over a connection that delays
# each piece by a tenth of one. What takes ten times as long hangs.
LONGEST_S = 15.0

# What a command line is made of that repeats a run.
OPTIONS = (
    "seed", "seconds", "workers", "kinds", "network", "direct", "discovery", "plane", "loop", "calls_per_s",
    "faults_per_s", "spare",
)  # fmt: skip


async def judged(cluster: ChaosCluster, faults: Sequence[Fault], calls: Sequence[Plan], *, spare: int = 1) -> Report:
    """Make calls while a cluster is hurt, and judge every one of them; for clusters that serve `requests.handler`.

    Args:
        cluster: started, and not run before.
        faults: from `schedule`.
        calls: from `plans`.
        spare: as of the schedule; with at least one a call that may move must not fail.
    """
    oracle = Oracle(strict=spare > 0, spared=cluster.spared, longest_s=LONGEST_S)

    async def make() -> None:
        async with DistributedRuntime(config=cluster.config) as runtime:
            client = await runtime.endpoint(ENDPOINT).client()
            two_way = await runtime.endpoint(TWO_WAY).client()
            await client.wait_for_instances()
            await two_way.wait_for_instances()
            await make_calls(client, calls, oracle, time.monotonic, two_way=two_way)

    report = await cluster.run(faults, make, spare=spare)
    oracle.close(FileJournal.read(cluster.journal))
    report.violations += oracle.violations
    report.outcomes, report.worst_gap_s = oracle.outcomes(), oracle.worst_gap_s()
    report.worst_call_s = oracle.worst_call_s()
    return report


def kinds_for(network: str, proxied: bool, discovery: str) -> tuple[FaultKind, ...]:
    """All kinds that make sense there, on this system."""
    return tuple(
        kind
        for kind in FaultKind
        if (proxied or kind not in PROXIED)
        and (network != "unix" or kind not in ON_TCP)
        and (network == "tls" or kind != FaultKind.CORRUPT)
        and (discovery == "file" or kind != FaultKind.DISK_FULL)
        and (sys.platform == "linux" or kind not in LINUX_ONLY)
    )


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--seed", type=int, default=0, help="of faults and calls (default: 0)")
    parser.add_argument("--seconds", type=float, default=60.0, help="during which both begin (default: 60)")
    parser.add_argument("--workers", type=int, default=3, help="processes (default: 3)")
    parser.add_argument("--kinds", help="of faults, separated by commas (default: all that are possible)")
    parser.add_argument("--network", choices=NETWORKS, default="unix", help="between client and workers")
    parser.add_argument("--direct", action="store_true", help="no proxies: workers choose their own addresses")
    parser.add_argument("--discovery", choices=("file", "etcd"), default="file", help="an etcd is started for it")
    parser.add_argument("--plane", choices=("direct", "nats"), default="direct", help="a NATS server is started for it")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop", help="of client and workers")
    parser.add_argument("--calls-per-s", type=float, default=40.0, help="calls that begin in a second (default: 40)")
    parser.add_argument("--faults-per-s", type=float, default=1.0, help="faults, on average (default: 1)")
    parser.add_argument("--spare", type=int, default=1, help="workers that are well at every moment (default: 1)")


def run(arguments: argparse.Namespace) -> int:
    """Do a run and print its table; 1 with violations.

    Raises:
        ConfigError: the arguments make no sense together, or the machine lacks something; the text says what.
    """
    proxied = not arguments.direct and arguments.plane == "direct"
    kinds = kinds_for(arguments.network, proxied, arguments.discovery)
    if arguments.kinds:
        try:
            kinds = tuple(FaultKind(each.strip().replace("-", " ")) for each in arguments.kinds.split(","))
        except ValueError as error:
            raise ConfigError("--kinds", arguments.kinds, f"{error}: {', '.join(FaultKind)}") from error
    small_disk = FaultKind.DISK_FULL in kinds
    if small_disk:
        try:
            private_mounts()
        except ConfigError as error:
            if arguments.kinds:
                raise
            print(f"left out: {error}")
            small_disk, kinds = False, tuple(each for each in kinds if each != FaultKind.DISK_FULL)
    faults = schedule(
        arguments.seed,
        duration_s=arguments.seconds,
        workers=arguments.workers,
        kinds=kinds,
        faults_per_s=arguments.faults_per_s,
        spare=arguments.spare,
        recovery=RECOVERY,
    )
    calls = plans(arguments.seed, duration_s=arguments.seconds, calls_per_s=arguments.calls_per_s, variety=VARIETY)

    async def go() -> Report:
        async with servers(arguments.discovery, arguments.plane) as settings:
            cluster = ChaosCluster(
                [*WORKER, "--loop", arguments.loop, JOURNAL],
                workers=arguments.workers,
                network=arguments.network,
                proxied=proxied,
                small_disk=small_disk,
                settings=settings,
                recovery_s=RECOVERY.other_s,
            )
            async with cluster:
                return await judged(cluster, faults, calls, spare=arguments.spare)

    factory = asyncio.new_event_loop if arguments.loop == "asyncio" else new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        report = runner.run(go())
    print(report.table())
    if report.violations:
        print(f"again:      python -m triton_distributed.testing.chaos processes {' '.join(_words(arguments))}")
    return 1 if report.violations else 0


def _words(arguments: argparse.Namespace) -> list[str]:
    """The command line that repeats the run."""
    words = []
    for name in OPTIONS:
        value = getattr(arguments, name)
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            words.append(f"{option} '{value}'" if " " in str(value) else f"{option} {value}")
    return words


@contextlib.asynccontextmanager
async def servers(discovery: str, plane: str) -> AsyncIterator[dict[str, str]]:
    """Start what a run needs beside workers; gives the settings that name it."""
    async with contextlib.AsyncExitStack() as stack:
        settings: dict[str, Any] = {}
        if discovery == "etcd":
            etcd = await stack.enter_async_context(EtcdServer())
            settings |= {"ETCD_ENDPOINTS": etcd.url, "TRD_ETCD_LEASE_TTL_S": "2"}
        if plane == "nats":
            nats = await stack.enter_async_context(NatsServer())
            settings |= {"NATS_SERVER": nats.url, "TRD_REQUEST_PLANE": "nats"}
        yield settings

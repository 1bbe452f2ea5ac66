"""Runs a chaos schedule from the command line: options, the necessary servers, the verdict."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from triton_distributed.errors import ConfigError
from triton_distributed.system.event_loop import new_event_loop
from triton_distributed.testing.chaos.cluster import NETWORKS, ChaosCluster
from triton_distributed.testing.chaos.disk import private_mounts
from triton_distributed.testing.chaos.injector import LINUX_ONLY, ON_TCP, PROXIED
from triton_distributed.testing.chaos.report import Report
from triton_distributed.testing.chaos.schedule import Fault, FaultKind, Recovery, schedule
from triton_distributed.testing.servers import EtcdServer, NatsServer

# Recovery times of a schedule. A successor needs 0.5 s to serve on an idle machine. If it needs longer than this, the
# `Injector` skips faults.
RECOVERY = Recovery(restart_s=1.5, other_s=0.5)

# The options of a command line that repeats a run.
OPTIONS = (
    "seed", "seconds", "workers", "kinds", "network", "direct", "discovery", "plane", "loop", "faults_per_s", "spare",
)  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of every chaos run."""
    parser.add_argument("--seed", type=int, default=0, help="seed of the schedule (default: 0)")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds in which faults begin (default: 60)")
    parser.add_argument("--workers", type=int, default=3, help="number of worker processes (default: 3)")
    parser.add_argument("--kinds", help="kinds of faults, separated by commas (default: all possible ones)")
    parser.add_argument("--network", choices=NETWORKS, default="unix", help="network between client and workers")
    parser.add_argument("--direct", action="store_true", help="no proxies: workers choose their own addresses")
    parser.add_argument("--discovery", choices=("file", "etcd"), default="file", help="etcd: a server is started")
    parser.add_argument("--plane", choices=("direct", "nats"), default="direct", help="nats: a server is started")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop", help="event loop of the client")
    parser.add_argument("--faults-per-s", type=float, default=1.0, help="average faults per second (default: 1)")
    parser.add_argument("--spare", type=int, default=1, help="workers that are well at every moment (default: 1)")


def run(
    arguments: argparse.Namespace,
    command: Sequence[str],
    judged: Callable[[ChaosCluster, Sequence[Fault]], Awaitable[Report]],
    again: str,
    program: str = "",
) -> int:
    """Start a cluster, run the schedule and print the table.

    Args:
        arguments: the result of a parser that `configure` has prepared.
        command: the command of a worker, see `ChaosCluster`.
        judged: applies the faults to the started cluster and returns the report.
        again: the beginning of a command line that repeats the run.
        program: the end of that command line, after the options.

    Returns:
        0 after a good run, 1 after violations.

    Raises:
        ConfigError: the arguments contradict each other, or the machine lacks a feature; the text gives the reason.
    """
    proxied = not arguments.direct and arguments.plane == "direct"
    kinds = _kinds(arguments, proxied)
    faults = schedule(
        arguments.seed,
        duration_s=arguments.seconds,
        workers=arguments.workers,
        kinds=kinds,
        faults_per_s=arguments.faults_per_s,
        spare=arguments.spare,
        recovery=RECOVERY,
    )

    async def go() -> Report:
        async with servers(arguments.discovery, arguments.plane) as settings:
            cluster = ChaosCluster(
                command,
                workers=arguments.workers,
                network=arguments.network,
                proxied=proxied,
                small_disk=FaultKind.DISK_FULL in kinds,
                settings=settings,
                recovery_s=RECOVERY.other_s,
            )
            async with cluster:
                return await judged(cluster, faults)

    factory = asyncio.new_event_loop if arguments.loop == "asyncio" else new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        report = runner.run(go())
    print(report.table())
    if report.violations:
        print(f"again:      {again} {' '.join(_words(arguments))}{program}")
    return 1 if report.violations else 0


def _kinds(arguments: argparse.Namespace, proxied: bool) -> tuple[FaultKind, ...]:
    """Return the requested kinds of faults; by default all kinds that this run and this machine allow."""
    if arguments.kinds:
        try:
            kinds = tuple(FaultKind(each.strip().replace("-", " ")) for each in arguments.kinds.split(","))
        except ValueError as error:
            raise ConfigError("--kinds", arguments.kinds, f"{error}: {', '.join(FaultKind)}") from error
    else:
        kinds = kinds_for(arguments.network, proxied, arguments.discovery)
    if FaultKind.DISK_FULL in kinds:
        try:
            private_mounts()
        except ConfigError as error:
            if arguments.kinds:
                raise
            print(f"left out: {error}")
            kinds = tuple(each for each in kinds if each != FaultKind.DISK_FULL)
    return kinds


def kinds_for(network: str, proxied: bool, discovery: str) -> tuple[FaultKind, ...]:
    """Return all kinds of faults that are possible with these options on this system."""
    return tuple(
        kind
        for kind in FaultKind
        if (proxied or kind not in PROXIED)
        and (network != "unix" or kind not in ON_TCP)
        and (network == "tls" or kind != FaultKind.CORRUPT)
        and (discovery == "file" or kind != FaultKind.DISK_FULL)
        and (sys.platform == "linux" or kind not in LINUX_ONLY)
    )


def _words(arguments: argparse.Namespace) -> list[str]:
    """Return the options that repeat the run."""
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
    """Start the servers that a run needs, and yield the settings that name them."""
    async with contextlib.AsyncExitStack() as stack:
        settings: dict[str, str] = {}
        if discovery == "etcd":
            etcd = await stack.enter_async_context(EtcdServer())
            settings |= {"ETCD_ENDPOINTS": etcd.url, "TRD_ETCD_LEASE_TTL_S": "2"}
        if plane == "nats":
            nats = await stack.enter_async_context(NatsServer())
            settings |= {"NATS_SERVER": nats.url, "TRD_REQUEST_PLANE": "nats"}
        yield settings

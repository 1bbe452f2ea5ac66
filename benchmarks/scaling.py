"""How discovery through etcd scales: `make scaling`, or `python -m benchmarks.scaling`. Writes results/scaling.json.

Simulated workers register in a real etcd that is started here. Each keeps its own lease alive, as a real worker does.
Only their sockets are missing. The benchmark measures how long a client's table takes to be complete, how long a change
takes to reach many clients, what an instance costs a client, and what all this costs etcd.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.scaling_clients import ENDPOINT
from harness.machine import describe
from harness.processes import Child, environment_without_settings
from triton_distributed.config import Config
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.testing import EtcdServer
from triton_distributed.testing.servers import program

RESULT = Path(__file__).parent / "results" / "scaling.json"
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
MARKS = ("<!-- figures -->", "<!-- /figures -->")
PARTS = 20  # The registrations are made in this many parts, so that no answer of a child takes too long.
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS  # The fields utime and stime, see proc(5).


def resident_mib(pid: int) -> float:
    """Resident memory of a process now, MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def database_mib(etcd: EtcdServer) -> float:
    """The size of etcd's database file, MiB."""
    return sum(each.stat().st_size for each in etcd.folder.rglob("db")) / 2**20


@asynccontextmanager
async def children(module: str, count: int, *arguments: str) -> AsyncIterator[list[Child]]:
    """Start `count` processes of a kind."""
    found: list[Child] = []
    try:
        for number in range(count):
            child = await Child.start(module, str(number), *arguments, environ={})
            found.append(child)
        yield found
    finally:
        await asyncio.gather(*(each.stop() for each in found))


async def everybody(found: list[Child], question: str, **arguments: Any) -> list[Any]:
    """Return the answers of all processes."""
    return await asyncio.gather(*(each.ask(question, **arguments) for each in found))


def version_of_etcd() -> str:
    """The version of the etcd that is measured."""
    path = program("etcd", os.environ)
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return said.splitlines()[0].rpartition(" ")[2]


def shares(total: int, count: int) -> list[int]:
    """Divide `total` into `count` parts."""
    return [total // count + (number < total % count) for number in range(count)]


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all phases, one after the other."""
    figures: dict[str, Any] = {}
    async with EtcdServer(environ=os.environ) as etcd:
        figures["etcd_idle_mib"] = resident_mib(etcd.pid)
        async with (
            children("benchmarks.scaling_workers", options.simulators, etcd.url, str(options.ttl)) as simulators,
            children("benchmarks.scaling_clients", options.processes, etcd.url) as holders,
        ):
            (early,) = await everybody(holders[:1], "open", clients=1)
            begin, cpu = time.monotonic(), cpu_s(etcd.pid)
            for part in shares(options.instances, PARTS):
                counts = zip(simulators, shares(part, len(simulators)), strict=True)
                await asyncio.gather(*(child.ask("register", count=count) for child, count in counts))
            figures["register_s"] = time.monotonic() - begin
            figures["register_etcd_cpu_s"] = cpu_s(etcd.pid) - cpu
            seen = (await holders[0].ask("until", count=options.instances))["at"]
            figures["watching_client_complete_s"] = max(0.0, max(seen) - begin - figures["register_s"])
            assert early is not None

            figures |= await fresh_client(etcd, options)
            figures |= await many_clients(etcd, holders, simulators, options)
            figures |= await at_rest(etcd, simulators, options)
    return figures


async def fresh_client(etcd: EtcdServer, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a client in this process that starts when all instances are registered."""
    times, sizes = [], []
    for _ in range(options.rounds):
        gc.collect()
        before, begin = resident_mib(os.getpid()), time.monotonic()
        async with DistributedRuntime(config=Config.from_env({"ETCD_ENDPOINTS": etcd.url})) as runtime:
            client = await runtime.endpoint(ENDPOINT).client()
            times.append(time.monotonic() - begin)
            assert len(client.instance_ids()) == options.instances
            gc.collect()
            sizes.append((resident_mib(os.getpid()) - before) * 2**20 / options.instances)
    # Only the first round makes the process grow. Later rounds use the same memory again.
    return {"fresh_client_complete_s": statistics.median(times), "client_bytes_an_instance": sizes[0]}


async def many_clients(
    etcd: EtcdServer, holders: list[Child], simulators: list[Child], options: argparse.Namespace
) -> dict[str, Any]:
    """Measure many clients that start at once and then learn of one change after the other."""
    begin, cpu, used = time.monotonic(), cpu_s(etcd.pid), sum(cpu_s(each.process.pid) for each in holders)
    parts = shares(options.clients, len(holders))
    parts[0] -= 1  # This process already has one client.
    await asyncio.gather(*(child.ask("open", clients=count) for child, count in zip(holders, parts, strict=True)))
    await everybody(holders, "until", count=options.instances)
    figures = {
        "clients_complete_s": time.monotonic() - begin,
        "clients_etcd_cpu_s": cpu_s(etcd.pid) - cpu,
        "client_opening_cpu_s": (sum(cpu_s(each.process.pid) for each in holders) - used) / (options.clients - 1),
        "clients_etcd_mib": resident_mib(etcd.pid),
    }
    used = sum(cpu_s(each.process.pid) for each in holders)
    delays: dict[str, list[float]] = {"added": [], "removed": []}
    for number in range(options.changes):
        for what, count in (("added", options.instances + 1), ("removed", options.instances)):
            waiting = asyncio.ensure_future(everybody(holders, "until", count=count))
            changed = (await simulators[number % len(simulators)].ask(what))["at"]
            last = max(moment for answer in await waiting for moment in answer["at"])
            delays[what].append(last - changed)
    used = sum(cpu_s(each.process.pid) for each in holders) - used
    figures["client_change_cpu_ms"] = used / (options.clients * options.changes * 2) * 1000
    for what, each in delays.items():
        figures[f"{what}_reaches_all_ms"] = statistics.median(each) * 1000
        figures[f"{what}_reaches_all_worst_ms"] = max(each) * 1000
    return figures


async def at_rest(etcd: EtcdServer, simulators: list[Child], options: argparse.Namespace) -> dict[str, Any]:
    """Measure a time in which only leases are kept alive."""
    begin, cpu = time.monotonic(), cpu_s(etcd.pid)
    counted = sum(answer["beats"] for answer in await everybody(simulators, "rest", seconds=options.rest))
    passed = time.monotonic() - begin
    lost = sum(answer["lost"] for answer in await everybody(simulators, "count"))
    return {
        "rest_etcd_cores": (cpu_s(etcd.pid) - cpu) / passed,
        "rest_beats_a_second": counted / passed,
        "leases_lost": lost,
        "etcd_mib": resident_mib(etcd.pid),
        "etcd_database_mib": database_mib(etcd),
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    f, o = result["figures"], result["options"]
    rows = [
        (
            f"{o['instances']:,} workers register, {o['instances'] / f['register_s']:,.0f} a second",
            f"{f['register_s']:.1f} s",
        ),
        ("… a client that watches has the last of them after", f"{f['watching_client_complete_s'] * 1000:,.0f} ms"),
        ("a new client's table is complete after", f"{f['fresh_client_complete_s'] * 1000:,.0f} ms"),
        ("memory in a client", f"{f['client_bytes_an_instance']:,.0f} bytes an instance"),
        (f"{o['clients']} new clients at once: all tables complete after", f"{f['clients_complete_s']:.1f} s"),
        ("… CPU of each of them", f"{f['client_opening_cpu_s']:.2f} s"),
        (
            f"one more instance is known to {o['clients']} clients after (median of {o['changes']}; worst)",
            f"{f['added_reaches_all_ms']:.0f} ms; {f['added_reaches_all_worst_ms']:.0f} ms",
        ),
        (
            "one instance less (median; worst)",
            f"{f['removed_reaches_all_ms']:.0f} ms; {f['removed_reaches_all_worst_ms']:.0f} ms",
        ),
        ("… CPU of each client for one change", f"{f['client_change_cpu_ms']:.1f} ms"),
        (
            f"etcd at rest: {f['rest_beats_a_second']:,.0f} keep-alives a second (lease of {o['ttl']} s)",
            f"{f['rest_etcd_cores']:.2f} cores",
        ),
        ("etcd's memory; with no instance", f"{f['etcd_mib']:.0f} MiB; {f['etcd_idle_mib']:.0f} MiB"),
        ("etcd's database", f"{f['etcd_database_mib']:.1f} MiB"),
        ("leases that ran out meanwhile", f"{f['leases_lost']:,}"),
    ]
    lines = ["| what | figure |", "| --- | ---: |", *(f"| {what} | {figure} |" for what, figure in rows)]
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    before, after = result["load"]
    load = f"Load average {before:.1f} before and {after:.1f} after"
    lines += ["", f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, {versions}. {load}."]
    return "\n".join(lines)


def written(page: str, result: dict[str, Any]) -> str:
    """Return the page with the figures."""
    start, rest = page.split(MARKS[0])
    return f"{start}{MARKS[0]}\n{table(result)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description="Discovery through etcd at scale")
    parser.add_argument("--instances", type=int, default=10_000, help="simulated workers, one instance each (10000)")
    parser.add_argument("--clients", type=int, default=50, help="clients that watch them (50)")
    parser.add_argument("--ttl", type=int, default=60, help="seconds of a lease (60)")
    parser.add_argument("--changes", type=int, default=20, help="changes that are timed (20)")
    parser.add_argument("--rounds", type=int, default=3, help="new clients that are timed (3)")
    parser.add_argument("--rest", type=float, default=20.0, help="seconds at rest (20)")
    parser.add_argument("--simulators", type=int, default=2, help="processes that simulate workers (2)")
    parser.add_argument("--processes", type=int, default=2, help="processes that hold the clients (2)")
    parser.add_argument("--output", type=Path, default=RESULT, help="where the figures go (results/scaling.json)")
    options = parser.parse_args()
    for name in set(os.environ) - set(environment_without_settings()):
        del os.environ[name]
    load_before = os.getloadavg()[0]
    figures = asyncio.run(measure(options))
    result = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe(),
        "load": [load_before, os.getloadavg()[0]],
        "versions": {
            "etcd": version_of_etcd(),
            "Python": platform.python_version(),
            "h11": version("h11"),
            "msgspec": msgspec.__version__,
        },
        "options": {key: value for key, value in vars(options).items() if key != "output"},
        "figures": figures,
    }
    if options.output == RESULT:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(written(page, result), encoding="utf-8")
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

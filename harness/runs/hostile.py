"""Hostile peers: `python -m harness.runs.hostile`. Ends with status 1 if a bound is broken. `make hostile`.

There are a worker process, a client process that calls it at a steady pace and opens a new connection twice a second,
and an attacker process that sends raw bytes. Quiet phases and attacks alternate. An attack's p99 is compared with the
mean p99 of the quiet phases before and after it. With two cores, the worker has one of them. The client and the
attacker share the other one, the attacker at the lowest priority. So the figures show the work of the worker, and not
the scheduling of the processes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from harness.fleet import Fleet, Process
from harness.hostile.attacks import ATTACKS
from harness.hostile.bounds import MIB, broken, p99_ratio
from harness.hostile.liar import LIES
from harness.hostile.members import TARGETS
from harness.hostile.raw import WORKER
from harness.report import RESULTS, Setting, save
from harness.requests import ENDPOINT
from harness.vitals import Watch
from triton_distributed.testing.servers import free_port

RESULT = RESULTS / "hostile.json"
TOKEN = "the members' own secret, which no attacker knows"
SETTLE_S = 20.0  # Seconds in which an attack's connections, handlers and timers must end. A hello's timeout is 5 s.
# The limits of a worker that strangers can reach. They are low, so that an attack reaches them in a few seconds.
LIMITS = {
    "TRD_MAX_HELD_BYTES": str(64 * MIB),
    "TRD_MAX_MESSAGE_BYTES": str(16 * MIB),
    "TRD_MAX_REQUESTS": "10000",
    "TRD_GC_FREEZE": "1",
}
Row = dict[str, Any]


def cores() -> tuple[str, str]:
    """The worker's core and the core of the others; empty if there is only one core or no way to choose."""
    if not hasattr(os, "sched_setaffinity"):
        return "", ""
    usable = sorted(os.sched_getaffinity(0))
    return (str(usable[0]), str(usable[1])) if len(usable) > 1 else ("", "")


@asynccontextmanager
async def members(token: str, more: str = "") -> AsyncIterator[tuple[Fleet, str, str]]:
    """Yield a fleet without processes, and the worker's addresses over TCP and over a Unix socket.

    Args:
        token: the token of worker and client; empty for none.
        more: further entries of their static discovery.
    """
    with tempfile.TemporaryDirectory(prefix="trh", dir="/tmp" if os.path.isdir("/tmp") else None) as folder:
        address, unix = f"tcp://127.0.0.1:{free_port()}", f"unix://{folder}/w.sock"
        settings = {
            "TRD_DIR": folder,
            "TRD_DISCOVERY": "static",
            "TRD_STATIC": ";".join(f"{path}={address}" for path in (ENDPOINT, *TARGETS)) + more,
            "TRD_LISTEN": f"{address},{unix}",
            **LIMITS,
            **({"TRD_TOKEN": token} if token else {}),
        }
        async with Fleet(settings) as fleet:
            yield fleet, address, unix


async def phases(
    names: list[str],
    victim: Process,
    client: Process,
    begin: Callable[[str], Awaitable[Callable[[], Awaitable[Any]]]],
    load: dict[str, float],
    say: Callable[[Row], None],
    **more: Any,
) -> None:
    """Run quiet phases and attacks in turn.

    Args:
        names: the names of the attacks.
        victim: the process whose memory and CPU time are measured.
        client: the process whose calls are measured.
        begin: begins an attack; its result waits for the end and returns the attacker's counts.
        load: the seconds of each phase, and the rate.
        say: gets each row.
        more: further arguments of the client's load during attacks.
    """
    await client.ask("load", seconds=1, rate=load["rate"])
    quiet = await client.ask("load", **load)
    for name in names:
        before, logged = await victim.ask("quiet"), await _logged(victim)
        assert victim.child is not None
        async with Watch(victim.child.process.pid) as watch:
            started = time.perf_counter()
            end = await begin(name)
            figures = await client.ask("load", **load, **more)
            counts = await end()
            passed = time.perf_counter() - started
        if more:
            counts["calls"] = figures["lied_to"]
        after = await _settled(victim, before)
        following = await client.ask("load", **load)
        say(
            {
                "attack": name,
                "spare": int(bool(more)),
                "quiet": [quiet, following],
                "attacker": counts,
                "seconds": passed,
                "rss_before": before["rss"],
                "rss_peak": watch.peak,
                "rss_after": after["rss"],
                "cpu": watch.cpu,
                "fds": [before["descriptors"], after["descriptors"]],
                "tasks": [before["tasks"], after["tasks"]],
                "log_lines": await _logged(victim) - logged,
                "load": figures,
            }
        )
        quiet = following


async def _logged(process: Process) -> int:
    return sum((await process.ask("logged"))["counts"].values())


async def _settled(process: Process, before: dict[str, Any]) -> dict[str, Any]:
    """Return the resources of a process when they are as before, or after `SETTLE_S`."""
    end = time.monotonic() + SETTLE_S
    while True:
        now: dict[str, Any] = await process.ask("quiet")
        if all(now[each] <= before[each] for each in ("descriptors", "tasks")) or time.monotonic() > end:
            return now
        await asyncio.sleep(0.25)


async def on_a_worker(names: list[str], token: str, load: dict[str, float], say: Callable[[Row], None]) -> None:
    """Run the named attacks, one after the other, on one worker."""
    mine, theirs = cores()
    async with members(token) as (fleet, address, unix):
        worker = await fleet.start("worker", "harness.hostile.members:target", options={"core": mine})
        client = await fleet.start("client", "harness.hostile.members:behave", options={"core": theirs})
        options = {"core": theirs, "nice": "19", "loop": "asyncio"}
        attacker = await fleet.start("attacker", "harness.hostile.members:attack", options=options)

        async def begin(name: str) -> Callable[[], Awaitable[Any]]:
            where = unix if ATTACKS[name].unix else address
            attack = asyncio.ensure_future(attacker.ask(name, address=where, seconds=load["seconds"]))
            return lambda: attack

        await phases(names, worker, client, begin, load, say)


async def on_a_client(names: list[str], load: dict[str, float], say: Callable[[Row], None]) -> None:
    """Run a client that calls a good worker at a steady pace, and at the same time a worker that lies."""
    mine, theirs = cores()
    port = free_port()
    async with members("", f";{WORKER}.lies=tcp://127.0.0.1:{port}") as (fleet, _, _):
        await fleet.start("worker", "harness.hostile.members:target", options={"core": theirs})
        options = {"core": theirs, "nice": "19", "loop": "asyncio"}
        liar = await fleet.start("liar", f"harness.hostile.members:lie:127.0.0.1,{port}", options=options)
        client = await fleet.start("client", "harness.hostile.members:behave", options={"core": mine})

        async def begin(name: str) -> Callable[[], Awaitable[Any]]:
            await liar.ask(name)
            return lambda: liar.ask("silence")

        await phases(names, client, client, begin, load, say, believe=True)


HEAD = (
    f"{'attack':18}  {'RSS MiB before/peak/after':>25}  {'CPU':>4}  {'fds':>11}  {'tasks':>11}  {'p50 ms':>11}  "
    f"{'p99 ms':>13}  {'×':>5}  {'dial ms':>7}  {'failed':>6}  rate"
)


def line(row: Row) -> str:
    """Return a row of the table, with the broken bounds below it."""
    quiet, load = row["quiet"], row["load"]
    rss = "/".join(f"{row[name] / MIB:,.0f}" for name in ("rss_before", "rss_peak", "rss_after"))
    middle = {name: sum(each[name] for each in quiet) / len(quiet) for name in ("p50_ms", "p99_ms")}
    rates = ", ".join(f"{name} {number / row['seconds']:,.0f}/s" for name, number in row["attacker"].items())
    text = (
        f"{row['attack']:18}  {rss:>25}  {row['cpu']:4.0%}  {row['fds'][0]:>5}→{row['fds'][1]:<5}  "
        f"{row['tasks'][0]:>5}→{row['tasks'][1]:<5}  {middle['p50_ms']:5.2f}→{load['p50_ms']:5.2f}  "
        f"{middle['p99_ms']:6.2f}→{load['p99_ms']:6.2f}  {p99_ratio(row):5.1f}  {load['dial_max_ms']:7.0f}  "
        f"{sum(load['failed'].values()):>6}  {rates}"
    )
    return "\n".join([text, *(f"    BROKEN: {each}" for each in row["broken"])])


async def run(names: list[str], load: dict[str, float]) -> list[Row]:
    """Run the attacks; print each row as it comes, and return all rows."""
    rows: list[Row] = []

    def say(row: Row) -> None:
        row["broken"] = broken(row)
        rows.append(row)
        print(line(row), flush=True)

    for token in (TOKEN, ""):
        some = [name for name in names if name in ATTACKS and ATTACKS[name].token == bool(token)]
        if some:
            await on_a_worker(some, token, load, say)
    lies = [name for name in names if name in LIES]
    if lies:
        await on_a_client(lies, load, say)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m harness.runs.hostile", description="Peers that mean harm")
    parser.add_argument("attacks", nargs="*", help=f"some of {', '.join([*ATTACKS, *LIES])}; default: all")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each phase (10)")
    parser.add_argument("--rate", type=float, default=200.0, help="calls a second of the client that behaves (200)")
    parser.add_argument("--json", type=Path, help=f"result file; a whole run's default: {RESULT.name}")
    arguments = parser.parse_args()
    names = arguments.attacks or [*ATTACKS, *LIES]
    for name in names:
        if name not in ATTACKS and name not in LIES:
            parser.error(f"no such attack: {name}")
    mine, theirs = cores()
    placed = f"worker on core {mine}, client and attacker on core {theirs}" if mine else "all on the same cores"
    print(f"{arguments.rate:g} calls/s, phases of {arguments.seconds:g} s; {placed}, the attacker at nice 19")
    print(f"{', '.join('='.join(each) for each in LIMITS.items())}; everything else as it is by default\n\n{HEAD}")
    setting = Setting()
    rows = asyncio.run(run(names, {"seconds": arguments.seconds, "rate": arguments.rate}))
    method = {"seconds": arguments.seconds, "rate": arguments.rate, "placed": placed, "limits": LIMITS}
    path = arguments.json or (None if arguments.attacks else RESULT)
    if path is not None:
        save({**setting.as_json(), "method": method, "attacks": rows}, path)
    faults = [f"{row['attack']}: {each}" for row in rows for each in row["broken"]]
    print("\n".join(["", *faults]) if faults else "\nevery bound was kept")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())

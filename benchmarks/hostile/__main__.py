"""Hostile peers: `python -m benchmarks.hostile`. Ends with status 1 when a bound is broken.

A worker process, a client process that calls it at a steady pace and opens a new connection twice a second, and an
attacker process that speaks raw bytes. Quiet phases and attacks take turns: an attack's p99 stands beside the mean of
those of the quiet phases before and behind it. Where there are two cores the worker has one; the client and the
attacker share the other, the attacker at the lowest priority, so that what shows is what the worker does and not who
got the processor.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.hostile.attacks import ATTACKS
from benchmarks.hostile.bounds import MIB, broken
from benchmarks.hostile.liar import LIES
from benchmarks.hostile.measure import attacked
from benchmarks.hostile.raw import WORKER
from benchmarks.hostile.table import render
from benchmarks.machine import describe
from benchmarks.processes import Child
from triton_distributed.testing.servers import free_port

RESULTS = Path(__file__).resolve().parent.parent / "results" / "hostile.json"
TOKEN = "the members' own secret, of which no attacker knows"
HANDLERS = ("echo", "hold", "endless", "bulk", "upload", "deaf", "sip")
# What a worker that strangers can reach would set, so that a few seconds are enough to get there.
LIMITS = {
    "TRD_MAX_HELD_BYTES": str(64 * MIB),
    "TRD_MAX_MESSAGE_BYTES": str(16 * MIB),
    "TRD_MAX_REQUESTS": "10000",
    "TRD_GC_FREEZE": "1",
}
Row = dict[str, Any]


def cores() -> tuple[str, str]:
    """The worker's core and that of the others; empty where there is only one, or no way to choose."""
    if not hasattr(os, "sched_setaffinity"):
        return "", ""
    usable = sorted(os.sched_getaffinity(0))
    return (str(usable[0]), str(usable[1])) if len(usable) > 1 else ("", "")


def environment(directory: Path, address: str, listen: str, token: str) -> dict[str, str]:
    """The settings of worker and client: where the worker is, and what it may hold."""
    return {
        "TRD_DIR": str(directory),
        "TRD_DISCOVERY": "static",
        "TRD_STATIC": ";".join(f"{WORKER}.{each}={address}" for each in HANDLERS),
        "TRD_LISTEN": listen,
        **LIMITS,
        **({"TRD_TOKEN": token} if token else {}),
        **{name: value for name, value in os.environ.items() if name.startswith("HOSTILE_")},
    }


async def on_a_worker(names: list[str], token: str, seconds: float, rate: float, say: Callable[[Row], None]) -> None:
    """The attacks of these names, one after the other, on one worker."""
    mine, theirs = cores()
    with tempfile.TemporaryDirectory(prefix="trh", dir="/tmp" if os.path.isdir("/tmp") else None) as folder:
        address, unix = f"tcp://127.0.0.1:{free_port()}", f"unix://{folder}/w.sock"
        environ = environment(Path(folder), address, f"{address},{unix}", token)
        worker = await Child.start("benchmarks.hostile.worker", mine, environ=environ)
        client = await Child.start("benchmarks.hostile.client", theirs, environ=environ)
        attacker = await Child.start("benchmarks.hostile.attacker", theirs, environ=environ)
        try:
            await client.ask("load", seconds=1, rate=rate)
            quiet = await client.ask("load", seconds=seconds, rate=rate)
            for name in names:
                before = await worker.ask("state")
                where = unix if ATTACKS[name].unix else address

                async def attack(name: str = name, where: str = where) -> Any:
                    return await attacker.ask(name, address=where, seconds=seconds)

                row = await attacked(worker, client, attack, seconds, rate, before)
                following = await client.ask("load", seconds=seconds, rate=rate)
                say({"attack": name, "quiet": [quiet, following], **row})
                quiet = following
        finally:
            for each in (attacker, client, worker):
                await each.stop()


async def on_a_client(names: list[str], seconds: float, rate: float, say: Callable[[Row], None]) -> None:
    """A client that calls a good worker at a steady pace, and beside it one that lies."""
    mine, theirs = cores()
    with tempfile.TemporaryDirectory(prefix="trh", dir="/tmp" if os.path.isdir("/tmp") else None) as folder:
        good, bad = f"tcp://127.0.0.1:{free_port()}", f"tcp://127.0.0.1:{free_port()}"
        environ = environment(Path(folder), good, good, "")
        environ["TRD_STATIC"] += f";{WORKER}.lies={bad}"
        worker = await Child.start("benchmarks.hostile.worker", theirs, environ=environ)
        liar = await Child.start("benchmarks.hostile.liar", theirs, bad, environ=environ)
        client = await Child.start("benchmarks.hostile.client", mine, environ=environ)
        try:
            await client.ask("load", seconds=1, rate=rate)
            quiet = await client.ask("load", seconds=seconds, rate=rate)
            for name in names:
                await liar.ask(name)
                before = await client.ask("state")

                async def attack() -> Any:
                    return {}

                row = await attacked(client, client, attack, seconds, rate, before, believe=True)
                row["attacker"] = {**await liar.ask("silence"), "calls": row["load"]["lied_to"]}
                following = await client.ask("load", seconds=seconds, rate=rate)
                say({"attack": name, "spare": 1, "quiet": [quiet, following], **row})
                quiet = following
        finally:
            for each in (client, liar, worker):
                await each.stop()


async def run(names: list[str], seconds: float, rate: float) -> list[Row]:
    """All rows, said as they come."""
    rows: list[Row] = []

    def say(row: Row) -> None:
        row["broken"] = broken(row)
        rows.append(row)
        print(render([row], heading=len(rows) == 1), flush=True)

    for token in (TOKEN, ""):
        some = [name for name in names if name in ATTACKS and ATTACKS[name].token == bool(token)]
        if some:
            await on_a_worker(some, token, seconds, rate, say)
    lies = [name for name in names if name in LIES]
    if lies:
        await on_a_client(lies, seconds, rate, say)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description="Peers that mean harm")
    parser.add_argument("attacks", nargs="*", help=f"some of {', '.join([*ATTACKS, *LIES])}; default: all")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each phase (10)")
    parser.add_argument("--rate", type=float, default=200.0, help="calls a second of the client that behaves (200)")
    parser.add_argument("--json", type=Path, help=f"result file; a whole run's default: {RESULTS.name}")
    arguments = parser.parse_args()
    names = arguments.attacks or [*ATTACKS, *LIES]
    for name in names:
        if name not in ATTACKS and name not in LIES:
            parser.error(f"no such attack: {name}")
    mine, theirs = cores()
    placed = f"worker on core {mine}, client and attacker on core {theirs}" if mine else "all on the same cores"
    print(f"{arguments.rate:g} calls/s, phases of {arguments.seconds:g} s; {placed}, the attacker at nice 19")
    print(f"{', '.join('='.join(each) for each in LIMITS.items())}; everything else as it is by default\n")
    rows = asyncio.run(run(names, arguments.seconds, arguments.rate))
    method = {"seconds": arguments.seconds, "rate": arguments.rate, "placed": placed, "limits": LIMITS}
    path = arguments.json or (None if arguments.attacks else RESULTS)
    if path is not None:
        result = {"machine": describe(), "method": method, "attacks": rows}
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    faults = [f"{row['attack']}: {each}" for row in rows for each in row["broken"]]
    print("\n".join(["", *faults]) if faults else "\nevery bound was kept")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m benchmarks.planes [--rounds N]`: compares the set-ups with files, etcd and NATS, and prints a table.

It needs NATS' client and server, and etcd, which `make test` installs. CPU is that of client and worker. The NATS
server's CPU comes in addition and has its own row.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

from harness.processes import Child
from triton_distributed.testing import EtcdServer, NatsServer

PLANES = {
    "direct, Unix socket": {},
    "direct, Unix socket, etcd": {"ETCD_ENDPOINTS": "etcd"},
    "direct, TCP": {"TRD_LISTEN": "tcp://127.0.0.1:0"},
    "direct, TCP, etcd": {"TRD_LISTEN": "tcp://127.0.0.1:0", "ETCD_ENDPOINTS": "etcd"},
    "nats": {"TRD_REQUEST_PLANE": "nats"},
}
WORK = (  # workload, seconds, figures
    ("alone", 1.0, ("p50_us",)),
    ("concurrent", 1.5, ("per_s", "cpu_us")),
    ("streams", 1.5, ("per_s", "cpu_us")),
    ("array", 1.0, ("gb_per_s",)),
)


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used; 0 if the system does not tell. See proc_pid_stat(5), fields 14 and 15."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def run(rounds: int, directory: Path) -> None:
    taken: dict[tuple[str, str], list[float]] = {}
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(NatsServer(environ=os.environ))
        etcd = await stack.enter_async_context(EtcdServer(environ=os.environ))
        pairs = {}
        for number, (plane, settings) in enumerate(PLANES.items()):
            place = directory / str(number)
            place.mkdir(mode=0o700)
            environ = {"TRD_DIR": str(place), "NATS_SERVER": server.url, **settings}
            if "ETCD_ENDPOINTS" in settings:
                environ |= {"ETCD_ENDPOINTS": etcd.url, "TRD_ETCD_PREFIX": f"place-{number}"}
            pairs[plane] = await Child.start("benchmarks.client", "ours", str(place), "", environ=environ)
            stack.push_async_callback(pairs[plane].stop)
        for _ in range(rounds):
            for work, seconds, figures in WORK:
                for plane, pair in pairs.items():
                    before = cpu_s(server.pid)
                    answer = await pair.ask(work, seconds=seconds)
                    # A workload warms up for a quarter of its time, which the server's CPU includes.
                    busy = (cpu_s(server.pid) - before) / (1.25 * seconds)
                    for figure in figures:
                        taken.setdefault((f"{work} {figure}", plane), []).append(answer[figure])
                    taken.setdefault((f"{work} NATS server, cores", plane), []).append(busy)
    names = list(dict.fromkeys(name for name, _ in taken))
    print("| work |", " | ".join(PLANES), "|")
    print("| --- |", " | ".join("---" for _ in PLANES), "|")
    for name in names:
        shown = (f"{statistics.median(taken[name, plane]):,.4g}" for plane in PLANES)
        print(f"| {name} |", " | ".join(shown), "|")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planes", description="Direct sessions beside NATS")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all workloads and planes (5)")
    with tempfile.TemporaryDirectory(prefix="trb", dir="/tmp" if os.path.isdir("/tmp") else None) as directory:
        asyncio.run(run(parser.parse_args().rounds, Path(directory)))


if __name__ == "__main__":
    main()

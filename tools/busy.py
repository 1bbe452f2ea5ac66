"""Runs a command several times beside processes that use all of the processor; ends with status 1 if any run failed.

    tools/busy.py 3 python -m pytest tests

The processes stay in the session of this one: Linux may share its cores among sessions first, and in another session
they would slow the command less. Each ends by itself once this process is gone, however it ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

PROCESSES = 4

BUSY = """
import os, sys
parent = int(sys.argv[1])
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


def stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def run(command: list[str]) -> int:
    """The status of the command, which ends with this process."""
    with subprocess.Popen(command) as child:
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            raise


def main(arguments: list[str]) -> int:
    try:
        runs, command = int(arguments[0]), arguments[1:]
    except (IndexError, ValueError):
        command = []
    if not command:
        raise SystemExit("usage: tools/busy.py RUNS COMMAND…")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)  # `finally` below then ends the busy processes
    print(f"== {PROCESSES} busy processes on {os.cpu_count()} cores, {runs} runs in a row", flush=True)
    results: list[str] = []
    busy: list[subprocess.Popen[bytes]] = []
    try:
        while len(busy) < PROCESSES:
            busy.append(subprocess.Popen([sys.executable, "-c", BUSY, str(os.getpid())]))
        for each in range(1, runs + 1):
            began = time.monotonic()
            status = run(command)
            results.append(
                f"run {each}: status {status}, {time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.1f}"
            )
            print(f"== {results[-1]}", flush=True)
            if any(process.poll() is not None for process in busy):
                raise SystemExit("error: a busy process ended before the run did, so the run proves nothing")
            if status:
                return 1
        return 0
    finally:
        for process in busy:
            process.kill()
            process.wait()
        print("== beside busy processes: " + ("; ".join(results) or "no run ended"), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

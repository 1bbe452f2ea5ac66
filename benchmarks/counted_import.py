"""The import of a peer: `python -m benchmarks.counted_import PEER`, run by benchmarks.callgrind.

This file imports nothing that the peers import, so that they pay for it.
"""

from __future__ import annotations

import os
import sys

IMPORTS = {
    "yardstick": "import asyncio, msgspec",
    "ours": "import triton_distributed.runtime",
    "native": "import triton_distributed as trd\ntrd.connect, trd.serve",
}


def count(switch: str) -> None:
    """Switch the counting of this process `on` or `off`."""
    # Not `subprocess`, which takes as many instructions as a call: those up to "off" are counted.
    command = ["callgrind_control", "-i", switch, str(os.getpid())]
    quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    _, status = os.waitpid(os.posix_spawnp(command[0], command, {"PATH": os.environ["PATH"]}, file_actions=quiet), 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: status {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    count("on")
    exec(IMPORTS[sys.argv[1]])
    count("off")
    os._exit(0)

"""Checks for leftovers of a run: in its processes, their logs and the folder of discovery."""

from __future__ import annotations

import asyncio
import re
import stat
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from triton_distributed.testing.chaos.control import held
from triton_distributed.testing.chaos.place import Place
from triton_distributed.testing.chaos.processes import WorkerEnded

POLL_S = 0.05
# Bytes by which a process may grow. Messages of half a megabyte on dozens of streams leave free lists and fragmented
# pages: at most 40 MB in one run, and no more in further runs.
GROWTH_BYTES = 160 * 1024 * 1024

# Resources that a loop keeps for its next use. libuv keeps one of these files, to close it when no other descriptor is
# free; asyncio keeps the threads in which it looked up names.
RESERVED = frozenset({"/dev/null", "/", "asyncio"})

# Log texts that show a defect of the program, independent of the network.
_WRONG = re.compile(r"Traceback \(most recent call last\)|was never retrieved|was never awaited|Fatal Python error")
HANDLER_RAISED = "the handler raised"  # Some requests ask the handler to raise.
# Log texts of a loop that has no free file descriptor for a new connection.
_NO_FDS = re.compile(r"Too many open files|out of system resource")


def more(now: Mapping[str, Any], before: Mapping[str, Any], kept: int = 0) -> list[str]:
    """Return descriptions of the resources that have increased.

    Args:
        now: the present resources, see `control.held`.
        before: the earlier resources.
        kept: the most idle connections that may be kept for their next use.
    """
    found = []
    for what in ("fds", "tasks", "threads"):
        found += [
            f"{count - before[what].get(kind, 0)} {what[:-1]} more: {kind}"
            for kind, count in now[what].items()
            if count > before[what].get(kind, 0) + (kept if kind == "socket" else 0) and kind not in RESERVED
        ]
    for what in ("streams", "sessions", "children"):
        if now.get(what, 0) > before.get(what, 0):
            found.append(f"{now[what]} {what}, {before[what]} before")
    if now["rss"] > before["rss"] + GROWTH_BYTES:
        found.append(f"{(now['rss'] - before['rss']) >> 20} MiB more memory")
    return found


async def left_in_process(place: Place, patience_s: float, kept: int) -> list[str]:
    """Return the resources that a worker holds after its clients are gone, beyond those at its start."""
    before = place.process.ready
    if before is None:
        return []  # The worker did not start, which is a violation already.
    try:
        found = await _settled(lambda: place.process.ask("look"), before, patience_s, kept)
    except WorkerEnded as error:
        return [f"{place}: {error}"]
    return [f"{place} is left with {each}" for each in found]


async def left_here(before: Mapping[str, Any], patience_s: float) -> list[str]:
    """Return the resources that this process and the running loop hold, beyond those before the run."""
    loop = asyncio.get_running_loop()

    async def look() -> dict[str, Any]:
        return held(loop)

    return [f"the client's process is left with {each}" for each in await _settled(look, before, patience_s, 0)]


async def _settled(
    look: Callable[[], Awaitable[dict[str, Any]]], before: Mapping[str, Any], patience_s: float, kept: int
) -> list[str]:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience_s
    while True:
        found = more(await look(), before, kept)
        if not found or loop.time() > deadline:
            return found
        await asyncio.sleep(POLL_S)


def left_in_folder(folder: Path) -> list[str]:
    """Return the remaining files of discovery after all processes have ended: sockets, records, temporary files."""
    found = []
    for each in sorted(folder.rglob("*")):
        mode = each.lstat().st_mode
        if not stat.S_ISDIR(mode):
            kind = "socket" if stat.S_ISSOCK(mode) else "file"
            found.append(f"a {kind} is left in the folder of discovery: {each.relative_to(folder)}")
    return found


def logged_errors(log: Path, who: str) -> list[str]:
    """Return the parts of a worker's log that show a defect of the program."""
    lines = log.read_text(errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines):
        if _WRONG.search(line):
            context = lines[max(0, number - 2) : number + 25]
            raised = number and HANDLER_RAISED in lines[number - 1]
            if not raised and not any(map(_NO_FDS.search, context)):
                found.append(f"{who} logged:\n    " + "\n    ".join(context))
    return found

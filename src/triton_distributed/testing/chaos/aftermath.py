"""What a run must not leave: in its processes, their logs and the folder of discovery."""

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
# Bytes that a process may have grown: half a megabyte messages on dozens of streams leave free lists and fragmented
# pages, which one run fills to 40 MB at most and further runs do not.
GROWTH_BYTES = 160 * 1024 * 1024

# What a loop keeps for its next use: libuv one of these files, to give it up when there is no other descriptor, and
# asyncio the threads in which it looked up names.
RESERVED = frozenset({"/dev/null", "/", "asyncio"})

# What is logged where something is wrong in the program, whatever the network does.
_WRONG = re.compile(r"Traceback \(most recent call last\)|was never retrieved|was never awaited|Fatal Python error")
HANDLER_RAISED = "the handler raised"  # as some requests ask of it
# What a loop says that has no file descriptor to accept with.
_NO_FDS = re.compile(r"Too many open files|out of system resource")


def more(now: Mapping[str, Any], before: Mapping[str, Any], kept: int = 0) -> list[str]:
    """What there is more of, by kind.

    Args:
        now: see `control.held`, and `before`.
        kept: idle connections that may be kept for their next use.
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
    """What a worker holds more than when it began to serve, once its clients are gone."""
    before = place.process.ready
    if before is None:
        return []  # it did not start: a violation already
    try:
        found = await _settled(lambda: place.process.ask("look"), before, patience_s, kept)
    except WorkerEnded as error:
        return [f"{place}: {error}"]
    return [f"{place} is left with {each}" for each in found]


async def left_here(before: Mapping[str, Any], patience_s: float) -> list[str]:
    """What this process and the running loop hold more than before the run."""
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
    """Files of discovery that are there though no process lives: sockets, records, temporary ones."""
    found = []
    for each in sorted(folder.rglob("*")):
        mode = each.lstat().st_mode
        if not stat.S_ISDIR(mode):
            kind = "socket" if stat.S_ISSOCK(mode) else "file"
            found.append(f"a {kind} is left in the folder of discovery: {each.relative_to(folder)}")
    return found


def logged_errors(log: Path, who: str) -> list[str]:
    """Places of a worker's log that tell of something wrong in the program."""
    lines = log.read_text(errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines):
        if _WRONG.search(line):
            context = lines[max(0, number - 2) : number + 25]
            raised = number and HANDLER_RAISED in lines[number - 1]
            if not raised and not any(map(_NO_FDS.search, context)):
                found.append(f"{who} logged:\n    " + "\n    ".join(context))
    return found

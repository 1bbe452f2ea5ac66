"""The worker's end of a chaos run's control channel: it reports its resources, and blocks its loop on command."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from triton_distributed.runtime import DistributedRuntime

ORPHANED = 3  # Exit status of a worker after its harness is gone.
LONGEST_COMMAND = 4096  # Longest command in bytes; a command has about 40.
_STDIN = 0


def obey(runtime: DistributedRuntime) -> bool:
    """Let the `ChaosCluster` that started this process inspect it and block its loop. Call it before serving.

    The channel is the socket that is the process's standard input. If the channel ends, its harness is gone, and the
    process ends too. In a program that was not started by a `ChaosCluster`, this has no effect.

    Args:
        runtime: the serving runtime; its loop is running.

    Returns:
        whether the process has a channel.
    """
    try:
        if not stat.S_ISSOCK(os.fstat(_STDIN).st_mode):
            return False
    except OSError:  # Standard input is closed.
        return False
    _Control(runtime, socket.socket(fileno=os.dup(_STDIN)))
    return True


class _Control:
    """Answers commands; each command and each answer is one line of JSON."""

    def __init__(self, runtime: DistributedRuntime, channel: socket.socket) -> None:
        self._runtime, self._channel = runtime, channel
        self._buffer = b""
        channel.setblocking(False)
        runtime.event_loop().add_reader(channel.fileno(), self._on_readable)

    def _on_readable(self) -> None:
        try:
            data = self._channel.recv(LONGEST_COMMAND)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            os._exit(ORPHANED)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            answer = self._do(json.loads(line))
            # The answer has a few kB and its reader waits for it, so the socket's buffer is large enough.
            self._channel.send(json.dumps(answer).encode() + b"\n")

    def _do(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "block":
            time.sleep(command["seconds"])
            return {}
        return look(self._runtime)


def look(runtime: DistributedRuntime) -> dict[str, Any]:
    """Inspect the endpoints and resources of this process.

    Returns:
        `served`: its registered endpoints; `starting`: its other endpoints; `addresses`: its addresses; `streams`: the
        number of running requests; `sessions`: the number of accepted sessions; `fds`, `tasks`, `threads`: the numbers
        by kind; `children`: the number of child processes; `rss`: resident memory in bytes.
    """
    statistics = runtime.statistics()
    endpoints = statistics.endpoints
    return {
        "served": [each.name for each in endpoints if each.state != "starting"],
        "starting": [each.name for each in endpoints if each.state == "starting"],
        "addresses": sorted({address for each in endpoints for address in each.addresses}),
        "streams": sum(each.running for each in endpoints),
        "sessions": sum(each.role == "accepted" for each in statistics.sessions),
        **held(runtime.event_loop()),
    }


def held(loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
    """The resources of the process and the loop, independent of a runtime: the second part of `look`."""
    return {
        "fds": dict(Counter(_descriptors())),
        "tasks": dict(Counter(_name(task) for task in asyncio.all_tasks(loop))),
        "threads": dict(Counter(_family(each.name) for each in threading.enumerate())),
        "children": _children(),
        "rss": _resident(),
    }


def _descriptors() -> list[str]:
    """Return the kind of each open file descriptor."""
    found = []
    folder = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
    try:
        names = os.listdir(folder)
    except OSError:  # No descriptor is free for reading the folder.
        return ["unknown"]
    for name in names:
        try:
            target = os.readlink(f"{folder}/{name}") if sys.platform == "linux" else "open"
        except OSError:
            continue  # This is the descriptor that was used to read the folder.
        found.append(target.partition(":[")[0])
    return found


def _name(task: asyncio.Task[Any]) -> str:
    return getattr(task.get_coro(), "__qualname__", "unknown")


def _family(name: str) -> str:
    """A thread's name without its final number, so that all threads of a pool have one kind."""
    return name.rstrip("0123456789").rstrip("-_ ") or name


def _children() -> int:
    try:
        return sum(len((each / "children").read_text().split()) for each in Path("/proc/self/task").iterdir())
    except OSError:
        return 0


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0

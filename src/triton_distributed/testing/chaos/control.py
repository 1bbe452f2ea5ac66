"""The worker's end of a chaos run's control channel: it tells what it holds, and blocks its loop when asked to."""

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

ORPHANED = 3  # exit status of a worker whose harness is gone
LONGEST_COMMAND = 4096  # bytes; a command has about 40
_STDIN = 0


def obey(runtime: DistributedRuntime) -> bool:
    """Have the `ChaosCluster` that started this process look into it and block its loop; call it before serving.

    The channel is the socket that the process has as its standard input. Where that ends, so does the process: its
    harness is gone. A program that was started by anything else goes on as if it had not called this.

    Args:
        runtime: what serves; its loop is running.

    Returns:
        whether there is such a channel.
    """
    try:
        if not stat.S_ISSOCK(os.fstat(_STDIN).st_mode):
            return False
    except OSError:  # closed
        return False
    _Control(runtime, socket.socket(fileno=os.dup(_STDIN)))
    return True


class _Control:
    """Answers a command a line, each JSON."""

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
            # A few kB into an empty socket, whose reader waits for it.
            self._channel.send(json.dumps(answer).encode() + b"\n")

    def _do(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "block":
            time.sleep(command["seconds"])
            return {}
        return look(self._runtime)


def look(runtime: DistributedRuntime) -> dict[str, Any]:
    """What this process holds now.

    Returns:
        `served`: its endpoints that are registered, `starting`: the others; `addresses`: where it is reached;
        `streams`: requests that its handlers answer now; `sessions`: that it has accepted; how many of each kind there
        are of `fds`, `tasks` and `threads`; `children`: processes; `rss`: bytes of memory.
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
    """The part of `look` that is the process's and the loop's, whatever runs there."""
    return {
        "fds": dict(Counter(_descriptors())),
        "tasks": dict(Counter(_name(task) for task in asyncio.all_tasks(loop))),
        "threads": dict(Counter(_family(each.name) for each in threading.enumerate())),
        "children": _children(),
        "rss": _resident(),
    }


def _descriptors() -> list[str]:
    """What each open descriptor is; empty where the system does not tell."""
    found = []
    folder = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
    try:
        names = os.listdir(folder)
    except OSError:  # none is free for the folder itself
        return ["unknown"]
    for name in names:
        try:
            target = os.readlink(f"{folder}/{name}") if sys.platform == "linux" else "open"
        except OSError:
            continue  # the one through which the folder was read
        found.append(target.partition(":[")[0])
    return found


def _name(task: asyncio.Task[Any]) -> str:
    return getattr(task.get_coro(), "__qualname__", "unknown")


def _family(name: str) -> str:
    """A thread's name without the number after it: those of a pool are of one kind."""
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

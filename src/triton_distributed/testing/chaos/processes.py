"""One worker process of a chaos run, from its harness's side. The harness never leaves it running."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from triton_distributed.config import environment_reference
from triton_distributed.testing.chaos import launch

START_S = 60.0  # Seconds for a start. An interpreter needs 0.3 s to serve; a busy machine needs many times that.
POLL_S = 0.005  # Seconds between two checks for a start or an end, which no event announces.


class WorkerEnded(Exception):
    """The worker process has ended, or does not answer."""


class WorkerProcess:
    """A program that serves endpoints and calls `control.obey`. It is used on the running loop only.

    Args:
        command: the program and its arguments.
        settings: its `TRD_*`, `ETCD_*` and `NATS_*` variables; it inherits no other variables of these kinds.
        log: the file to which its output is appended.

    Attributes:
        pid: its process id.
        asked_to_end: the harness has killed it or is draining it; otherwise its end is a violation.
        ready: the resources that it held after its registration, see `control.look`; None before.
    """

    def __init__(self, command: Sequence[str], settings: Mapping[str, str], log: Path) -> None:
        self._loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        known = [name for name, _, _ in environment_reference()]
        unset = [argument for name in known if name not in settings for argument in ("-u", name)]
        named = [f"{name}={value}" for name, value in settings.items()]
        start = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid())]
        sink: BinaryIO
        with theirs, log.open("ab") as sink:
            self._process = subprocess.Popen(
                [*start, "env", *unset, *named, *command], stdin=theirs.fileno(), stdout=sink, stderr=sink
            )
        self.pid = self._process.pid
        self.asked_to_end = False
        self.ready: dict[str, Any] | None = None
        ours.setblocking(False)
        self._channel = ours
        self._buffer = b""
        self._asking = asyncio.Lock()
        self._answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()  # At most one answer, see `ask`.
        self.ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(ours.fileno(), self._on_readable)

    async def ask(self, do: str, timeout_s: float = START_S, **arguments: Any) -> dict[str, Any]:
        """Send a command and return its answer.

        Args:
            do: the command, see `control.obey`.
            timeout_s: seconds to wait.
            arguments: the arguments of the command.

        Raises:
            WorkerEnded: the process has ended or did not answer.
        """
        async with self._asking:
            if self.ended.done():
                raise WorkerEnded(f"{self} has ended")
            with contextlib.suppress(OSError):
                self._channel.send(json.dumps({"do": do, **arguments}).encode() + b"\n")
            answer = self._loop.create_task(self._answers.get())
            try:
                first: list[asyncio.Future[Any]] = [answer, self.ended]
                await asyncio.wait(first, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done():
                    raise WorkerEnded(f"{self} has ended" if self.ended.done() else f"{self} does not answer")
                return answer.result()
            finally:
                answer.cancel()

    async def started(self) -> None:
        """Wait until the process serves, and record its resources in `ready`.

        Raises:
            WorkerEnded: the process ended before that, or took too long.
        """
        deadline = self._loop.time() + START_S
        while self._loop.time() < deadline:
            found = await self.ask("look")
            if found["served"] and not found["starting"]:
                self.ready = found
                return
            await asyncio.sleep(POLL_S)
        raise WorkerEnded(f"{self} serves no endpoint after {START_S:g} s")

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        self._process.send_signal(number)

    async def end(self, number: signal.Signals, timeout_s: float) -> int | None:
        """Send a signal that ends the process, and wait for the end.

        Returns:
            the exit status; None if the process still runs after `timeout_s` seconds.
        """
        self.asked_to_end = True
        self.send(number)
        await asyncio.wait([self.ended], timeout=timeout_s)
        return self.ended.result() if self.ended.done() else None

    def close(self) -> None:
        """Kill the process if it still runs, and release its resources."""
        if self._channel.fileno() >= 0:
            self._loop.remove_reader(self._channel.fileno())
            self._channel.close()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if not self.ended.done():
            self.ended.set_result(self._process.returncode)

    def _on_readable(self) -> None:
        try:
            data = self._channel.recv(64 * 1024)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._channel.fileno())
            self._channel.close()
            self._await_end()
            return
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._answers.put_nowait(json.loads(line))

    def _await_end(self) -> None:
        """Wait for the end of the process, which comes soon after its channel has closed."""
        if self.ended.done():
            return
        status = self._process.poll()
        if status is None:
            self._loop.call_later(POLL_S, self._await_end)
        else:
            self.ended.set_result(status)

    def __str__(self) -> str:
        return f"worker process {self.pid}"


def last_words(log: Path, lines: int = 30) -> str:
    """The end of a log, for error texts."""
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    return ""

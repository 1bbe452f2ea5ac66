"""One process of a replica: its start, its link, its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from triton_distributed.config import environment_with
from triton_distributed.supervisor.output import Output
from triton_distributed.supervisor.pinning import Cores, bound
from triton_distributed.supervisor.replica import INDEX, LINK, READY, STATUS, WORN, named

LONGEST_WORD = 256
"""Bytes of an incomplete report that are kept."""


class Process:
    """A running process of a replica, in a process group of its own: a terminal's Ctrl-C reaches only the supervisor.

    Args:
        index: the replica's number.
        command: the program and its arguments.
        directory: the current directory of the process; None for the supervisor's.
        output: copies what the process writes.
        on_change: called after each change of the attributes.
        environment: variables for this process, added to those of the supervisor.
        cores: the CPU cores to which the process is bound; None for all.

    Attributes:
        started_at, ready_at: times on the loop's clock; `ready_at` is None until the process can be called.
        status_url: where its status port is; "" if it has none.
        worn: the process has served as many requests as it should.
        stuck_at: the place in its code at which its event loop is stuck, for which it is ended; None if it is not.
        status: its exit status, negative for a signal; None while it runs.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(
        self,
        index: int,
        command: Sequence[str],
        directory: str | None,
        output: Output,
        on_change: Callable[[Process], None],
        environment: Mapping[str, str],
        cores: Cores | None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_change = on_change
        self.index = index
        self.started_at = self._loop.time()
        self.ready_at: float | None = None
        self.status_url = ""
        self.worn = False
        self.stuck_at: str | None = None
        self.status: int | None = None
        self._kill: asyncio.TimerHandle | None = None
        self._heard = b""
        self._link, theirs = socket.socketpair()
        try:
            with theirs, bound(cores):
                own = {INDEX: str(index), LINK: named(theirs), "PYTHONUNBUFFERED": "1"}
                self._popen = subprocess.Popen(
                    command,
                    bufsize=0,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd=directory,
                    env=environment_with({**environment, **own}),
                    pass_fds=(theirs.fileno(),),
                    process_group=0,
                )
        except BaseException:
            self._link.close()
            raise
        self._link.setblocking(False)
        self._loop.add_reader(self._link, self._received)
        assert self._popen.stdout is not None
        assert self._popen.stderr is not None
        output.add(self._popen.stdout, str(index), sys.stdout)
        output.add(self._popen.stderr, str(index), sys.stderr, log=True)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    @property
    def is_over(self) -> bool:
        """Whether the process has ended."""
        return self.status is not None

    @property
    def is_ready(self) -> bool:
        """Whether the process can be called."""
        return self.ready_at is not None and self.status is None

    @property
    def is_draining(self) -> bool:
        """Whether the process was asked to end and has not ended."""
        return self._kill is not None and self.status is None

    @property
    def ready_s(self) -> float:
        """Seconds since the process was ready; 0 if it was not."""
        return 0.0 if self.ready_at is None else self._loop.time() - self.ready_at

    def _received(self) -> None:
        try:
            data = self._link.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._link)
            return
        *lines, self._heard = (self._heard + data).split(b"\n")
        self._heard = self._heard[-LONGEST_WORD:]
        for line in lines:
            self._reported(line.decode(errors="replace"))

    def _reported(self, word: str) -> None:
        if word == READY and self.ready_at is None:
            self.ready_at = self._loop.time()
        elif word == WORN:
            self.worn = True
        elif word.startswith(STATUS):
            self.status_url = word.removeprefix(STATUS)
        self._on_change(self)

    def drain(self, limit_s: float) -> None:
        """Send SIGTERM, unless it was sent before: a second one would cut the requests that run.

        Args:
            limit_s: seconds after which the process is killed if it still runs.
        """
        if self._kill is None:
            self._end_within(limit_s)

    def cut(self, limit_s: float) -> None:
        """Send SIGTERM, also if it was sent before; the rest as for `drain`."""
        self._end_within(limit_s)

    def _end_within(self, limit_s: float) -> None:
        if self.status is not None:
            return
        os.kill(self.pid, signal.SIGTERM)  # The process has not been waited for, so the id is still its own.
        if self._kill is not None:
            self._kill.cancel()
        self._kill = self._loop.call_later(limit_s, self.kill)

    def kill(self) -> None:
        """Kill the process with the processes that it has started and that are still in its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses a group of ended processes.
            os.killpg(self.pid, signal.SIGKILL)

    def look(self) -> None:
        """Note whether the process has ended. What it has started ends with it, e.g. to free the memory of a GPU."""
        status = self._popen.poll()
        if status is None or self.status is not None:
            return
        self.kill()
        if self._kill is not None:
            self._kill.cancel()
        self._loop.remove_reader(self._link)
        self._link.close()
        self.status = status
        self._on_change(self)


def described(status: int) -> str:
    """A process's end in words."""
    if status >= 0:
        return f"with status {status}"
    try:
        return f"by {signal.Signals(-status).name}"
    except ValueError:
        return f"by signal {-status}"


def look(processes: Mapping[int, Process]) -> None:
    """Note which processes have ended. Process 1 also removes the ended orphans that it has inherited.

    Args:
        processes: the replicas' processes by their ids.
    """
    if os.getpid() != 1:
        for each in list(processes.values()):
            each.look()
        return
    with contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid in processes:
                processes[found.si_pid].look()
            else:
                os.waitpid(found.si_pid, 0)

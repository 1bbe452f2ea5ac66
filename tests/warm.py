"""`trd` as a process that is forked from one which has imported it: its start takes a fifth of the CPU.

The start of an interpreter and the imports take most of the CPU of a short command. Here one process imports the package, then
forks for each command, with the command's own arguments, environment, folder and standard streams. What is forked runs as the
console script does, and ends as a process of its own: with an exit status, by a signal, through the interpreter's own end.

It is not a child of the tests' process, so only `Popen`'s methods can wait for it. Where that matters, and where this does not
work, `subprocess.Popen` is the way: see `possible`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.guards.tree import ROOT

PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.warm import main
sys.path.pop(0)
main()
"""

LARGEST = 1 << 17  # bytes of a request: arguments and environment


def interpreter_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What an interpreter reads when it starts, which a fork cannot change."""
    return {name: value for name, value in environment.items() if name.startswith(("PYTHON", "COVERAGE_"))}


class Warm:
    """The process that has imported the package.

    Args:
        folder: the current folder, which a supervisor remembers from the start on.
        environment: of the interpreter.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.settings = interpreter_settings(environment)
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=folder, env=dict(environment), pass_fds=[theirs.fileno()],
            )  # fmt: skip

    def fork(self, request: Mapping[str, Any], streams: Sequence[int]) -> tuple[int, int]:
        """Run a command; return its process id, and the descriptor from which its status can be read once."""
        status, told = os.pipe()
        try:
            message = json.dumps(request).encode()
            assert len(message) < LARGEST
            socket.send_fds(self.socket, [message], [*streams, told])
        finally:
            os.close(told)
        return read_number(status), status

    def close(self) -> None:
        self.socket.close()
        self.process.wait()


def possible(warm: Warm | None, environment: Mapping[str, str]) -> bool:
    """Whether a command with this environment can be forked."""
    return warm is not None and warm.settings == interpreter_settings(environment)


class Forked(subprocess.Popen[str]):
    """A command that is forked, with all of Popen's methods. It takes `env`, `cwd` and Popen's arguments of the three streams."""

    def __init__(self, warm: Warm, arguments: Sequence[str], **options: Any) -> None:
        self._warm = warm
        self._lock = threading.Lock()
        super().__init__(list(arguments), **options)

    def _execute_child(self, args: Any, *rest: Any) -> None:
        cwd, env = rest[4:6]
        ends = rest[9:15]  # three pairs; the child's is the first of standard input's, and the second of the others
        streams = [each if each != -1 else usual for usual, each in enumerate((ends[0], ends[3], ends[5]))]
        try:
            request = {"arguments": args, "cwd": os.fspath(cwd), "env": dict(env)}
            self.pid, self._status = self._warm.fork(request, streams)
        finally:
            self._close_pipe_fds(*ends)  # type: ignore[attr-defined]
        self._child_created = True

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        return self._ended(0)

    def _wait(self, timeout: float | None) -> int:
        status = self._ended(timeout)
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return status

    def _ended(self, timeout: float | None) -> int | None:
        with self._lock:
            if self.returncode is None and hasattr(self, "_status"):
                poll = select.poll()
                poll.register(self._status, select.POLLIN)
                if poll.poll(None if timeout is None else 1000 * max(timeout, 0)):
                    self.returncode = os.waitstatus_to_exitcode(read_number(self._status))
                    os.close(self._status)
            return self.returncode


def read_number(descriptor: int) -> int:
    data = os.read(descriptor, 4)
    assert len(data) == 4, "the process that forks has ended"
    return int.from_bytes(data, "little")


@contextmanager
def warm(folder: Path, environment: Mapping[str, str]) -> Iterator[Warm | None]:
    """The process that forks commands; None where coverage must see them, or where there is no SEQPACKET."""
    if sys.platform != "linux" or any(name.startswith("COVERAGE_") for name in environment):
        yield None
        return
    made = Warm(folder, environment)
    try:
        yield made
    finally:
        made.close()


# --- the process that forks ------------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> None:
    """Fork at each request, and tell how each child ended. Returns only in a child, and at the end of the connection."""
    running: dict[int, int] = {}
    wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker)
    poll = select.poll()
    for each in (wake, connection.fileno()):
        poll.register(each, select.POLLIN)
    while True:
        ready = dict(poll.poll())
        if wake in ready:
            os.read(wake, 4096)
            while running and (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                tell(running.pop(ended[0]), ended[1])
        if connection.fileno() in ready:
            message, descriptors, _, _ = socket.recv_fds(connection, LARGEST, 4)
            if not message:
                os._exit(0)
            *streams, told = descriptors
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (wake, waker, told, *running.values()):
                    os.close(each)
                connection.close()
                become(json.loads(message), streams)
                return
            for each in streams:
                os.close(each)
            os.write(told, pid.to_bytes(4, "little"))
            running[pid] = told


def tell(told: int, status: int) -> None:
    try:
        os.write(told, status.to_bytes(4, "little"))
    except BrokenPipeError:
        pass  # the tests' process has ended
    os.close(told)


def become(request: Mapping[str, Any], streams: Sequence[int]) -> None:
    """Take on what a process is started with."""
    for number, each in enumerate(streams):
        os.dup2(each, number)
        os.close(each)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]  # as with `python -m`
    sys.argv[1:] = request["arguments"]


def main() -> None:
    """Fork for each request; in the child, be `trd`."""
    for name in ("cli.call", "cli.ls", "cli.serve", "runtime.distributed"):
        importlib.import_module(f"triton_distributed.{name}")
    importlib.import_module("numpy")  # which the workers of the tests use
    trd = importlib.import_module("triton_distributed.cli.main")
    gc.collect()
    gc.freeze()  # A child that collects garbage would copy all memory.
    serve(socket.socket(fileno=int(sys.argv.pop(1))))
    sys.exit(trd.main())

"""Python programs as processes that are forked from one which has imported the package: a start takes a fifth of the CPU.

The start of an interpreter and the imports take most of the CPU of a short program. Here one process imports the package, then
forks for each program, with the program's own arguments, environment, folder and standard streams. What is forked runs as
`__main__`, with warnings as errors, and ends as a process of its own: with an exit status, by a signal, through the interpreter's
own end.

It is not a child of the tests' process, so only `Forked` can wait for it. Where that matters, and where this does not work,
`subprocess` is the way: see `possible`.
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
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.guards.tree import ROOT, SRC

# The names that it makes are not those of a program.
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.warm import main
sys.path.pop(0)
exec(main(), globals())
"""
TRD = "import sys; from triton_distributed.cli.main import main; sys.exit(main())"  # as the console script does

LARGEST = 1 << 17  # bytes of a request: arguments and environment
TAKEN_ON = {
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONPATH",
    "PYTHONUNBUFFERED",
    "PYTHONWARNINGS",
}  # by a fork, as far as tests use them


class Warm:
    """The process that has imported the package; it starts with the first program."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.socket: socket.socket | None = None

    def fork(self, request: Mapping[str, Any], streams: Sequence[int]) -> tuple[int, int]:
        """Run a program; return its process id, and the descriptor from which its status can be read once."""
        status, told = os.pipe()
        try:
            message = json.dumps(request).encode()
            assert len(message) < LARGEST
            socket.send_fds(self.socket or self._start(), [message], [*streams, told])
        finally:
            os.close(told)
        return read_number(status), status

    def _start(self) -> socket.socket:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRD_", "PYTHON"))}
        null = subprocess.DEVNULL
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", PROGRAM, str(theirs.fileno())],
                stdin=null, stdout=null, env={**environment, "PYTHONPATH": str(SRC)}, pass_fds=[theirs.fileno()],
            )  # fmt: skip
        return self.socket

    def close(self) -> None:
        """End it. The programs go on."""
        if self.socket is not None and self.process is not None:
            self.socket.close()
            self.process.wait()
            self.process = self.socket = None


warm = Warm()


def possible(environment: Mapping[str, str]) -> bool:
    """Whether a program with this environment can be forked: on Linux, unless coverage or other settings must be there."""
    settings = {name for name in environment if name.startswith(("PYTHON", "COVERAGE_"))}
    return sys.platform == "linux" and settings <= TAKEN_ON


class Forked(subprocess.Popen[Any]):
    """A program that is forked, with all of Popen's methods.

    Args:
        program: a file; or a text, which is run as by `python -c`.
        arguments: those after it.
        deprecated: it may use what is deprecated.
        options: `env`, and of Popen's others `cwd`, `start_new_session`, those of the three streams, and those of texts.
    """

    def __init__(
        self, program: Path | str, arguments: Sequence[str], *, deprecated: bool = False, **options: Any
    ) -> None:
        self._program, self._deprecated = program, deprecated
        self._lock = threading.Lock()
        super().__init__(list(arguments), **options)

    def _execute_child(self, args: Any, *rest: Any) -> None:
        cwd, env = rest[4:6]
        ends = rest[9:15]  # three pairs; the child's is the first of standard input's, and the second of the others
        streams = [each if each != -1 else usual for usual, each in enumerate((ends[0], ends[3], ends[5]))]
        request = {
            "file": str(self._program) if isinstance(self._program, Path) else None,
            "text": None if isinstance(self._program, Path) else self._program,
            "arguments": args,
            "deprecated": self._deprecated,
            "cwd": os.fspath(cwd or os.getcwd()),
            "env": dict(env),
            "session": rest[20],
        }
        try:
            self.pid, self.status = warm.fork(request, streams)
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
            if self.returncode is None and hasattr(self, "status"):
                poll = select.poll()
                poll.register(self.status, select.POLLIN)
                if poll.poll(None if timeout is None else 1000 * max(timeout, 0)):
                    self.returncode = os.waitstatus_to_exitcode(read_number(self.status))
                    os.close(self.status)
            return self.returncode


def read_number(descriptor: int) -> int:
    data = os.read(descriptor, 4)
    assert len(data) == 4, "the process that forks has ended"
    return int.from_bytes(data, "little")


# --- the process that forks ------------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> Mapping[str, Any]:
    """Fork at each request, and tell how each child ended. Returns only in a child, with its request."""
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
                request: Mapping[str, Any] = json.loads(message)
                become(request, streams)
                return request
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
    if request["session"]:
        os.setsid()
    for number, each in enumerate(streams):
        os.dup2(each, number)
        os.close(each)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.dont_write_bytecode = bool(request["env"].get("PYTHONDONTWRITEBYTECODE"))
    if request["deprecated"]:
        warnings.simplefilter("ignore", DeprecationWarning)
    sys.argv = [request["file"] or "-c", *request["arguments"]]
    own_words = [request["file"]] if request["file"] else ["-c", request["text"]]
    sys.orig_argv = [sys.executable, *own_words, *request["arguments"]]  # with which it may start others of its kind
    own = os.path.dirname(os.path.abspath(request["file"])) if request["file"] else request["cwd"]
    more = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = list(dict.fromkeys([own, *filter(None, more), *sys.path[1:]]))
    if request["env"].get("PYTHONUNBUFFERED"):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[union-attr]


def main() -> Any:
    """Fork for each request; in the child, return the program."""
    for name in ("cli.call", "cli.ls", "cli.main", "runtime.distributed"):
        importlib.import_module(f"triton_distributed.{name}")
    for name in ("numpy", "uvloop"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # A child that collects garbage would copy all memory.
    request = serve(socket.socket(fileno=int(sys.argv.pop(1))))
    program = vars(sys.modules["__main__"])
    for name in ("main", "sys"):
        del program[name]
    if request["file"] is None:
        return compile(request["text"], "<string>", "exec")
    program["__file__"] = request["file"]
    return compile(Path(request["file"]).read_bytes(), request["file"], "exec")

"""The processes of the servers that are measured."""

from __future__ import annotations

import asyncio
import ctypes
import signal
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from benchmarks.llm.work import Work
from harness.leftovers import Leftovers
from harness.processes import ROOT, ChildFailed, environment_without_settings

START_S = 90.0  # LiteLLM takes some 10 s on an idle machine.
STOP_S = 10.0
LOGGED_BYTES = 500
PIECE_BYTES = 4096
"""What is read of an answer that does not end soon."""
PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Args:
        port: where it listens on the loopback.
        pids: its processes; the first is the one that speaks HTTP with clients.
        model: the model's name, if it is not that of the workload.
        content: the user's message, if it is not the usual one.
        tokens: of an answer, if they are not those of the workload.
        under_path: whether the path begins with the workload.
    """

    port: int
    pids: Sequence[int]
    model: str = ""
    content: str = ""
    tokens: int = 0
    under_path: bool = False

    def path(self, work: Work) -> str:
        """The path of a workload's requests."""
        return f"/{work.name}{PATH}" if self.under_path else PATH

    def body(self, work: Work) -> str:
        """The body of a workload's requests."""
        return work.body(self.model, self.content, self.tokens)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing is left if the benchmark is killed.


class Processes:
    """The processes of a benchmark. They end with the stack.

    Args:
        stack: what ends them.
        folder: a private folder for their files and logs.
    """

    def __init__(self, stack: AsyncExitStack, folder: Path) -> None:
        self.folder = folder
        self._stack = stack
        self._logs: dict[int, Path] = {}

    async def start(self, *command: str, environ: Mapping[str, str] | None = None) -> asyncio.subprocess.Process:
        """Start a process, which logs into a file."""
        path = self.folder / f"log-{len(self._logs) + 1}"
        environ = {**environment_without_settings(), "PYTHONDONTWRITEBYTECODE": "", **(environ or {})}
        with open(path, "wb") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=environ,
                preexec_fn=_end_with_parent,
            )
        self._logs[process.pid] = path
        self._stack.push_async_callback(self.stop, process)
        return process

    async def stop(self, process: asyncio.subprocess.Process) -> None:
        """End a process by SIGTERM, or else by SIGKILL, with all that it has started."""
        below = Leftovers(process.pid)
        below.look()
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        below.kill()

    def logged(self, *processes: asyncio.subprocess.Process) -> str:
        """The end of what processes have logged, for the text of an error."""
        ends = (self._logs[each.pid].read_bytes()[-LOGGED_BYTES:].decode(errors="replace") for each in processes)
        return "; ".join(end.strip() for end in ends)

    async def until_answers(self, server: Server, works: Iterable[Work], *running: asyncio.subprocess.Process) -> None:
        """Wait until a server answers a request of each workload with 200.

        Raises:
            ChildFailed: it does not within 90 s, or one of its processes has ended.
        """
        loop = asyncio.get_running_loop()
        over = loop.time() + START_S
        for work in works:
            while (told := await asyncio.to_thread(_asked, server, work))[0] != 200:
                ended = [each.returncode for each in running if each.returncode is not None]
                if ended or loop.time() > over:
                    why = f"it ended with status {ended[0]}" if ended else f"not ready within {START_S:g} s"
                    raise ChildFailed(
                        f"{why}; its last answer: {told[0]} {told[1][:200]!r}; it logged: {self.logged(*running)}"
                    )
                await asyncio.sleep(0.1)


def _asked(server: Server, work: Work) -> tuple[int, bytes]:
    """Return the status and the body of a request; the status 0 if there is no answer."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", server.path(work), server.body(work), headers)
        answer = connection.getresponse()
        return answer.status, answer.read(PIECE_BYTES) if work.endless else answer.read()
    except (OSError, HTTPException) as error:
        return 0, str(error).encode()
    finally:
        connection.close()


def answered(server: Server, work: Work) -> bytes:
    """Return the body of an answer.

    Raises:
        ChildFailed: the status is not 200.
    """
    status, body = _asked(server, work)
    if status != 200:
        raise ChildFailed(f"{work.name} was answered with {status}: {body[:300]!r}")
    return body

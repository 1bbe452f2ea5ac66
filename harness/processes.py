"""Child processes that answer questions over their stdin and stdout, with one JSON value on each line."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from harness.leftovers import Leftovers

ROOT = Path(__file__).resolve().parent.parent
# The longest single measurement (1 GiB echoed by the slowest peer) takes about 2 minutes on two busy cores.
ANSWER_TIMEOUT_S = 240.0
# One answer holds only a few figures.
LINE_LIMIT_BYTES = 1 << 20
LOGGED_BYTES = 1000
# Settings from outside would change the measurement. Children start with the defaults and the benchmark's settings.
SETTINGS = ("TRD_", "ETCD_", "NATS_", "GRPC_", "DYN_", "RAY_")


def environment_without_settings() -> dict[str, str]:
    """This process's environment without the variables that would change a peer's defaults."""
    return {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}


class ChildFailed(RuntimeError):
    """A child failed. The text contains the child's error."""


class Child:
    """A process `python -m MODULE ARGUMENTS` that this process started and that answers questions."""

    def __init__(self, module: str, process: asyncio.subprocess.Process, stderr: Path | None = None) -> None:
        self.module, self.process, self._stderr = module, process, stderr
        self._below = Leftovers(process.pid)

    @classmethod
    async def start(
        cls,
        module: str,
        *arguments: str,
        environ: Mapping[str, str] | None = None,
        python: str = sys.executable,
        stderr: Path | None = None,
    ) -> Child:
        """Start a child and wait until it reports that it is ready.

        Args:
            environ: added to this process's environment, from which the settings are removed then.
            python: the interpreter, of another virtual environment for example.
            stderr: a file for what the child and its own children log; its end is told if the child fails.
        """
        with open(stderr, "ab") if stderr else nullcontext() as log:
            process = await asyncio.create_subprocess_exec(
                python,
                "-m",
                module,
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=None if environ is None else {**environment_without_settings(), **environ},
                limit=LINE_LIMIT_BYTES,
            )
        child = cls(module, process, stderr)
        try:
            await child._answer()
        except BaseException:
            await child.stop()
            raise
        child._below.look()
        return child

    async def ask(self, question: str, **arguments: Any) -> Any:
        """Return the child's answer to a question; raise its error here as ChildFailed."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([question, arguments]).encode() + b"\n")
        return await self._answer()

    async def _answer(self) -> Any:
        assert self.process.stdout is not None
        try:
            line = await asyncio.wait_for(self.process.stdout.readline(), ANSWER_TIMEOUT_S)
        except TimeoutError:
            # A late answer would be taken for the answer to the next question.
            await self.stop(patience_s=0)
            raise ChildFailed(f"{self.module} said nothing for {ANSWER_TIMEOUT_S:g} s{self._logged()}") from None
        if not line:
            raise ChildFailed(f"{self.module} ended with status {await self.process.wait()}{self._logged()}")
        answer, error = json.loads(line)
        if error is not None:
            raise ChildFailed(error)
        return answer

    def _logged(self) -> str:
        if self._stderr is None:
            return ""
        return f"; it logged: {self._stderr.read_bytes()[-LOGGED_BYTES:].decode(errors='replace').strip()}"

    async def stop(self, patience_s: float = 5.0) -> None:
        """Let the child end by closing its stdin. Kill it if it has not ended within `patience_s`.

        The processes that it started, and left, are killed too.
        """
        assert self.process.stdin is not None
        self._below.look()
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), patience_s)
        except TimeoutError:
            self.process.kill()
            self._below.kill()  # They may hold the pipes whose end `wait` waits for.
            await self.process.wait()
        self._below.kill()


async def answer_questions(answer: Callable[..., Awaitable[Any]]) -> None:
    """Run the child's side: report that it is ready, then answer until stdin ends, which also ends an open answer.

    Args:
        answer: called with the question and its keyword arguments.
    """

    async def reply(question: str, arguments: dict[str, Any]) -> None:
        try:
            _say(await answer(question, **arguments), None)
        except Exception as error:
            _say(None, f"{type(error).__name__}: {error}")

    reader = asyncio.StreamReader(LINE_LIMIT_BYTES)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    replying: asyncio.Task[None] | None = None
    try:
        _say(None, None)
        while line := await reader.readline():
            replying = asyncio.ensure_future(reply(*json.loads(line)))
    finally:
        if replying is not None:
            replying.cancel()
        transport.close()


def _say(value: Any, error: str | None) -> None:
    sys.stdout.write(json.dumps([value, error]) + "\n")
    sys.stdout.flush()

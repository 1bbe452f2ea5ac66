"""Child processes that answer questions: one JSON value a line, over their own stdin and stdout."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# The longest single measurement (10,000 idle streams of the slowest peer) takes some 20 s on two busy cores.
ANSWER_TIMEOUT_S = 90.0
# One answer holds a handful of figures.
LINE_LIMIT_BYTES = 1 << 20
# Settings from outside would change what is measured: children start with the defaults and what the benchmark sets.
SETTINGS = ("TRD_", "ETCD_", "NATS_", "GRPC_")


def environment_without_settings() -> dict[str, str]:
    """This process' environment without what would change a peer's defaults."""
    return {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}


class ChildFailed(RuntimeError):
    """A child failed; its own words are in the text."""


class Child:
    """A `python -m MODULE ARGUMENTS` that was started here and answers questions."""

    def __init__(self, module: str, process: asyncio.subprocess.Process) -> None:
        self.module, self.process = module, process

    @classmethod
    async def start(cls, module: str, *arguments: str, environ: Mapping[str, str] | None = None) -> Child:
        """Start it and wait until it says that it is ready.

        Args:
            environ: added to this process' own environment, of which the settings are left out then.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env=None if environ is None else {**environment_without_settings(), **environ},
            limit=LINE_LIMIT_BYTES,
        )
        child = cls(module, process)
        try:
            await child._answer()
        except BaseException:
            await child.stop()
            raise
        return child

    async def ask(self, question: str, **arguments: Any) -> Any:
        """The child's answer to a question; its error is raised here as ChildFailed."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([question, arguments]).encode() + b"\n")
        return await self._answer()

    async def _answer(self) -> Any:
        assert self.process.stdout is not None
        try:
            line = await asyncio.wait_for(self.process.stdout.readline(), ANSWER_TIMEOUT_S)
        except TimeoutError:
            # A later answer would be taken for that to the next question.
            self.process.kill()
            raise ChildFailed(f"{self.module} said nothing for {ANSWER_TIMEOUT_S:g} s") from None
        if not line:
            raise ChildFailed(f"{self.module} ended with status {await self.process.wait()}")
        answer, error = json.loads(line)
        if error is not None:
            raise ChildFailed(error)
        return answer

    async def stop(self) -> None:
        """Let it end by closing its stdin; kill it where that does not help within 5 s."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), 5)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


async def answer_questions(answer: Callable[..., Awaitable[Any]]) -> None:
    """The child's side: say ready, then answer until stdin ends, which also ends an answer that is under way.

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

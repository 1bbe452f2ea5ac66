"""Programs that a test writes and runs as processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from tests.timing import PATIENCE_S
from tests.warm import Forked, possible

ROOT = Path(__file__).parents[2]
ERRORS = ("-W", "error")
# For programs as they were: uvloop deprecates install() from Python 3.12 on.
DEPRECATED = (*ERRORS, "-W", "ignore::DeprecationWarning")


class ForkedOnLoop:
    """A forked program with what is used of `asyncio.subprocess.Process`."""

    def __init__(self, process: Forked) -> None:
        self._process = process
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.pid = process.pid
        self.stdout, self.stderr = asyncio.StreamReader(), asyncio.StreamReader()
        self._transports: list[asyncio.ReadTransport] = []

    @classmethod
    async def start(
        cls, path: Path, arguments: Sequence[str], env: Mapping[str, str], *, deprecated: bool
    ) -> ForkedOnLoop:
        pipe = subprocess.PIPE
        made = cls(Forked(path, arguments, stdout=pipe, stderr=pipe, env=env, deprecated=deprecated))
        loop = asyncio.get_running_loop()
        loop.add_reader(made._process.status, made._end)
        for reader, end in ((made.stdout, made._process.stdout), (made.stderr, made._process.stderr)):
            transport, _ = await loop.connect_read_pipe(functools.partial(asyncio.StreamReaderProtocol, reader), end)
            made._transports.append(transport)
        return made

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._process.status)
        self._process.wait()
        self._ended.set_result(None)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # The loop has not heard of the end.
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    async def wait(self) -> int:
        await asyncio.shield(self._ended)
        return self._process.wait()

    async def communicate(self) -> tuple[bytes, bytes]:
        out, err, _ = await asyncio.gather(self.stdout.read(), self.stderr.read(), self.wait())
        for each in self._transports:
            each.close()  # uvloop's stay open at their end.
        await asyncio.sleep(0)
        return out, err


class Program:
    """A running program."""

    def __init__(self, process: asyncio.subprocess.Process | ForkedOnLoop) -> None:
        self.process = process
        self.pid = process.pid

    async def line(self) -> str:
        """Its next line of output; empty at its end."""
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), PATIENCE_S)).decode().rstrip("\n")

    async def output(self) -> tuple[str, str]:
        """What it still writes until it ends, to stdout and stderr."""
        out, err = await asyncio.wait_for(self.process.communicate(), PATIENCE_S)
        return out.decode(), err.decode()

    async def ended(self) -> int:
        """Its exit status."""
        return await asyncio.wait_for(self.process.wait(), PATIENCE_S)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


@contextlib.asynccontextmanager
async def program(
    folder: Path,
    code: str,
    *arguments: str,
    environment: dict[str, str] | None = None,
    options: tuple[str, ...] = ERRORS,
) -> AsyncIterator[Program]:
    """Run `code` with this interpreter; asked to end, then killed, where it still runs. Its warnings are errors."""
    path = folder / f"program_{abs(hash(code)):x}.py"
    if not path.exists():  # another process may be reading it at this moment
        path.write_text(code)
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})}
    process: asyncio.subprocess.Process | ForkedOnLoop
    if options in (ERRORS, DEPRECATED) and possible(env):
        process = await ForkedOnLoop.start(path, arguments, env, deprecated=options == DEPRECATED)
    else:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *options,
            str(path),
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=env,
        )
    try:
        yield Program(process)
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            out, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
        except TimeoutError:
            process.kill()
            out, err = await process.communicate()
        sys.stdout.write(out.decode())
        sys.stderr.write(err.decode())

"""Programs that a test writes and runs as processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from tests.timing import PATIENCE_S

ROOT = Path(__file__).parents[2]


class Program:
    """A running program."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
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
    folder: Path, code: str, *arguments: str, environment: dict[str, str] | None = None, options: tuple[str, ...] = ()
) -> AsyncIterator[Program]:
    """Run `code` with this interpreter; asked to end, then killed, where it still runs."""
    path = folder / f"program_{abs(hash(code)):x}.py"
    if not path.exists():  # another process may be reading it at this moment
        path.write_text(code)
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *options,
        str(path),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})},
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

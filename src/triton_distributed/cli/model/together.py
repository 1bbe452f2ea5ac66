"""`trd model run MODEL`: workers and a front end in one command."""

from __future__ import annotations

import argparse
import asyncio
import codecs
import contextlib
import importlib
import os
import re
import signal
import socket
import sys
from typing import Any

from triton_distributed.api.connection import connect
from triton_distributed.cli.arguments import at_least
from triton_distributed.cli.failure import Failure
from triton_distributed.cli.http import (
    check_installed,
    front_options,
    listening_at,
    models_options_of,
    options_of,
    serve_front,
)
from triton_distributed.cli.model.serve import as_given, model_options
from triton_distributed.cli.settings import worker_settings
from triton_distributed.config import Config, environment_with
from triton_distributed.errors import NoInstances
from triton_distributed.llm.contract.errors import ModelNotFound, PrefillOnly
from triton_distributed.llm.contract.records import NAMESPACE
from triton_distributed.supervisor.replica import INDEX, LINK, named
from triton_distributed.system.event_loop import new_event_loop

EPILOG = """\
It starts workers as `trd model serve` does, each in a process of its own, and
answers the OpenAI API as `trd http` does; the pages of these two describe the
options. A worker that ends is started again. When the model can be called, one
line is printed on standard output:
    ready: URL/v1

SIGTERM and SIGINT let running requests finish; then all of it ends. A second
signal ends it at once.
"""

LONGEST_READ = 65536
"""Bytes of the workers' output that are read at once."""

NEWS_S = 1.0
"""Seconds that the news of a worker may take to this process."""

_READY_MARK = re.compile(r"^(\[\d+\] |)ready: ")
_READY = re.compile(r"ready: serving the model (.+) as instance \d+ at ")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.epilog = EPILOG
    model_options(parser)
    parser.add_argument(
        "--workers", metavar="N", type=at_least(1), default=1, help="processes that compute (default: 1)"
    )
    front_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run until a signal."""
    check_installed()
    config = worker_settings(handle_signals=False, status_port=-1)
    options, models_options = options_of(arguments), models_options_of(arguments)
    listening = listening_at(arguments.host, arguments.port)
    with listening, asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_run(arguments, listening, config, options, models_options))
    return 0


async def _run(
    arguments: argparse.Namespace,
    listening: Any,
    config: Config,
    options: dict[str, Any],
    models_options: dict[str, Any],
) -> None:
    task = asyncio.current_task()
    assert task is not None
    for each in (signal.SIGTERM, signal.SIGINT):  # Until `serve` takes the signals.
        asyncio.get_running_loop().add_signal_handler(each, task.cancel)
    workers = await _Workers.start(arguments)

    def stop(_: object) -> None:
        task.cancel()

    workers.ended.add_done_callback(stop)
    try:
        async with connect(config) as here:
            await _serve(here, listening, workers, options, models_options)
    except asyncio.CancelledError:  # By a signal before the model was ready, or by the end of the workers.
        if workers.ended.done():
            raise workers.failure() from None
    finally:
        workers.ended.remove_done_callback(stop)
        await workers.end()


async def _serve(
    here: Any, listening: Any, workers: _Workers, options: dict[str, Any], models_options: dict[str, Any]
) -> None:
    models_of = importlib.import_module("triton_distributed.llm.models.models")
    async with models_of.Models(here, **models_options) as models:
        card = (await answering(models, await workers.ready())).card
        models.expected = frozenset(card.names)
        await serve_front(here, models, listening, options, before_forced_exit=workers.kill)


async def answering(models: Any, name: str) -> Any:
    """Wait until a model can be called, and say on standard error what is missing if there are prefill workers only.

    Args:
        models: a `Models`.
        name: the model's name; a worker of it is ready.

    Raises:
        LLMError: as `Models.get` raises it.
    """
    with contextlib.suppress(ModelNotFound, NoInstances):
        try:
            return await models.wait_for(name, NEWS_S)
        except PrefillOnly as error:
            print(f"trd model run: {error}", file=sys.stderr, flush=True)
    return await models.wait_for(name)


class _Workers:
    """The process `trd model serve` with its replicas, in a session of its own.

    A signal of the terminal does not reach it, so that it serves until the front end has drained. If this process is
    killed, the link ends, and the workers drain.

    Attributes:
        ended: has its exit status when it has ended.
    """

    def __init__(self, process: asyncio.subprocess.Process, link: socket.socket) -> None:
        self._process, self._link = process, link
        self._name: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.ensure_future(self._follow())

    @classmethod
    async def start(cls, arguments: argparse.Namespace) -> _Workers:
        """Start it with the options of the command."""
        program = [sys.executable, "-m", "triton_distributed.cli.main", "model", "serve"]
        link, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *program,
                    f"--replicas={arguments.workers}",
                    f"--namespace={arguments.namespace or NAMESPACE}",
                    *as_given(arguments),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    env=environment_with({INDEX: "", LINK: named(theirs)}),
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
        except BaseException:
            link.close()
            raise
        return cls(process, link)

    async def ready(self) -> str:
        """Wait until a worker can be called; return the name of its model.

        Raises:
            Failure: the workers have ended.
        """
        either: list[asyncio.Future[Any]] = [self._name, self.ended]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._name.done():
            raise self.failure()
        return self._name.result()

    def failure(self) -> Failure:
        """The error if they have ended; they have said why."""
        status = self.ended.result()
        return Failure(f"the workers have ended with status {status}", status if status > 0 else 1)

    async def end(self) -> None:
        """Let the workers drain, and wait for their end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        await self.ended

    def kill(self) -> None:
        """End the workers at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _follow(self) -> int:
        """Show what the workers print, on standard error, until they end."""
        assert self._process.stdout is not None
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        rest = ""
        while part := await self._process.stdout.read(LONGEST_READ):  # A line may be of any length.
            *lines, rest = (rest + decode(part)).split("\n")
            for line in lines:
                self._show(line + "\n")
            if len(rest) > LONGEST_READ:
                self._show(rest)
                rest = ""
        self._show(rest)
        with self._link:
            return await self._process.wait()

    def _show(self, line: str) -> None:
        # The word `ready:` is for the line of this command.
        sys.stderr.write(_READY_MARK.sub(r"\1workers: ", line))
        if not self._name.done() and (found := _READY.search(line)):
            self._name.set_result(found[1])

"""The supervisor: starts the replicas, replaces them, starts them again when they end, and drains them on a signal."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from triton_distributed.config import Config
from triton_distributed.status.port import not_open
from triton_distributed.supervisor import pinning, reload
from triton_distributed.supervisor.bell import Bell
from triton_distributed.supervisor.output import Output
from triton_distributed.supervisor.place import Place
from triton_distributed.supervisor.process import Process, described, look
from triton_distributed.supervisor.program import own_command, own_directory
from triton_distributed.supervisor.replacement import Replacer
from triton_distributed.supervisor.replicas import Replicas
from triton_distributed.supervisor.shareable import check_shareable, has_fixed_address
from triton_distributed.system.fork import no_fork
from triton_distributed.system.signals import ECHO_S, GRACE_S

logger = logging.getLogger("triton_distributed.supervisor")

SPARE_S = 2.0
"""Seconds after the time within which a replica ends by itself (the drain's time and `GRACE_S`); then it is killed."""

LOOK_S = 10.0
"""Seconds between two looks at whether replicas are stuck, or a quarter of `TRD_LIVE_TIMEOUT_S` if that is shorter."""

STUCK_S = 2.0
"""Seconds that a replica whose event loop is stuck gets after SIGTERM. It has had `TRD_LIVE_TIMEOUT_S` already, and a
stuck loop cannot drain."""

AT_ONCE_S = 1.0
"""Seconds from a second signal until the replicas are killed. They name the requests that are cut."""


class StartFailed(RuntimeError):
    """The replicas cannot be started.

    Args:
        text: what is missing, or the replica and its end.
        status: the exit status for the command.
    """

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def supervise(replicas: Replicas, config: Config, module: str | None = None) -> int:
    """Run this program again in some processes, which find out by `replica.is_replica()`, until a signal ends them.

    Args:
        replicas: how many processes, and how they are kept.
        config: the settings that they will have.
        module: the module with the handlers, whose files `reload` watches; None for this program's own.

    Returns:
        The exit status: 0 if all have drained, 128 plus its number after a second signal, else the status of a replica.

    Raises:
        ConfigError: the replicas cannot share these settings.
        StartFailed: this system cannot do what `replicas` asks for, or a replica ended before any could be called.
        RuntimeError: the program cannot be run again, or this is not the main thread.
        OSError: no process can be started.
    """
    check_shareable(replicas, config)
    command = own_command()
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("only the main thread gets signals, so processes can be supervised only there")
    cores, watched = None, None
    try:
        if replicas.pin:
            cores = pinning.shares(replicas.count, pinning.allowed_cores())
        if replicas.reload:
            reload.check_available()
            watched = reload.folder_of(module)
    except (OSError, ImportError) as error:
        raise StartFailed(str(error), 1) from error

    async def main() -> int:
        supervisor = Supervisor(
            replicas,
            command,
            own_directory(),
            config.drain_timeout_s,
            drain_first=replicas.drain_first or has_fixed_address(replicas, config),
            cores=cores,
            watched=watched,
            json=config.log_format == "json",
            status=StatusAt(config.status_host, config.status_port, config.live_timeout_s)
            if config.status_port >= 0
            else None,
        )
        return await supervisor.run()

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(main())


class StatusAt(NamedTuple):
    """Where the status port is, and the seconds after which a replica with a stuck event loop is ended; 0 for never."""

    host: str
    port: int
    live_timeout_s: float


class Supervisor:
    """Keeps some processes of one command running.

    Each place has a task that starts its process again after an end. One more task replaces processes that run.

    Args:
        replicas: how many processes, and how they are kept.
        command: the program and its arguments.
        directory: its current directory; None for this process's.
        drain_s: seconds that a replica may take to drain.
        drain_first: a process drains before its successor starts.
        cores: the CPU cores of each replica; None for all.
        watched: the folder whose Python files are watched; None for none.
        json: the log has one JSON object in each line.
        status: the status port; None for none.
    """

    def __init__(
        self,
        replicas: Replicas,
        command: Sequence[str],
        directory: str | None,
        drain_s: float,
        *,
        drain_first: bool = False,
        cores: Sequence[pinning.Cores] | None = None,
        watched: Path | None = None,
        json: bool = False,
        status: StatusAt | None = None,
    ) -> None:
        self._replicas, self._command, self._directory = replicas, command, directory
        self._drain_first, self._cores, self._watched, self._json = drain_first, cores, watched, json
        self._status_at = status
        self._page: Any = None
        self._limit_s = drain_s + GRACE_S + SPARE_S
        self._places = [Place(index) for index in range(replicas.count)]
        self._processes: dict[int, Process] = {}  # All that run, by their ids.
        self._loop = asyncio.get_running_loop()
        self._bell = Bell()
        self._stopping = asyncio.Event()
        self._first: float | None = None  # When the first signal came.
        self._cut = 0  # The number of the second signal.
        self._served = False  # A replica has been ready.
        self._complete = False  # All have been ready at once.
        self._failure: StartFailed | None = None
        self._status = 0
        self._terminal = _has_terminal()

    async def run(self) -> int:
        """Run until a signal has ended all replicas; the rest as for `supervise`."""
        self._output = Output(self._json)
        self._replacer = Replacer(
            self._places,
            self._bell,
            self._stopping,
            self._start,
            lambda process: process.drain(self._limit_s),
            self._output.say,
            drain_first=self._drain_first,
            wait=self._watched is None,  # A developer does not wait for the streams of the last version.
        )
        with self._signals():
            self._open_page()
            try:
                async with asyncio.TaskGroup() as group:
                    for each in self._places:
                        group.create_task(self._keep(each))
                    group.create_task(self._replacer.run())
                    if self._page is not None and self._status_at is not None and self._status_at.live_timeout_s:
                        group.create_task(self._end_stuck(min(self._status_at.live_timeout_s / 4, LOOK_S)))
                    if self._watched is not None:
                        group.create_task(self._watch(self._watched))
                await self._bell.until(lambda: not self._processes)
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from None
            finally:
                for process in self._processes.values():  # After an error only.
                    process.kill()
                await self._bell.until(lambda: not self._processes)
                if self._page is not None:
                    await self._page.close()
                self._output.close()
        if self._cut:
            return 128 + self._cut
        if self._failure is not None:
            raise self._failure
        return self._status

    def _open_page(self) -> None:
        """Open the status port. Without it the replicas serve as well."""
        if self._status_at is None:
            return
        # Most programs have no status port, and its modules take a tenth of a second.
        with no_fork:
            module = importlib.import_module("triton_distributed.supervisor.page")
        host, port, _ = self._status_at
        try:
            self._page = module.StatusPage(host, port, self._places, lambda: not self._complete, self._stopping.is_set)
        except (OSError, UnicodeError) as error:
            not_open(error, f"{host}, port {port}", "The replicas serve")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        handlers = {
            signal.SIGCHLD: lambda: look(self._processes),
            signal.SIGTERM: lambda: self._signalled(signal.SIGTERM),
            signal.SIGINT: lambda: self._signalled(signal.SIGINT),
        }
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # Under `nohup` it stays ignored.
            handlers[signal.SIGHUP] = self._hung_up
        else:
            logger.info("SIGHUP is ignored, for example because of nohup: it does not restart the replicas")
        before = {number: signal.getsignal(number) for number in handlers}
        for number, handle in handlers.items():
            self._loop.add_signal_handler(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                self._loop.remove_signal_handler(number)
                signal.signal(number, handler or signal.SIG_DFL)

    # Processes.

    def _start(self, place: Place) -> Process:
        cores = None if self._cores is None else self._cores[place.index]
        environment = self._replicas.environment(place.index)
        if self._status_at is not None:
            environment.setdefault("TRD_STATUS_PORT", "0")  # The port of the settings is the supervisor's.
        process = Process(place.index, self._command, self._directory, self._output, self._changed, environment, cores)
        self._processes[process.pid] = process
        where = "" if cores is None else f" on cores {pinning.described(cores)}"
        logger.info("replica %d: started as process %d%s", place.index, process.pid, where, extra=place.field)
        return process

    def _changed(self, process: Process) -> None:
        """Note that a process can be called, is worn, or has ended."""
        if process.is_over:
            del self._processes[process.pid]
            if self._stopping.is_set():
                self._note_end(process)
        elif process.is_ready:
            self._served = True
            place = self._places[process.index]
            if process is place.process and not place.asked:
                place.settled = True
            if not self._complete and all(each.is_ready for each in self._places):
                self._complete = True
                self._output.say(f"ready: {len(self._places)} replica(s){self._where()}")
        self._bell.ring()

    def _where(self) -> str:
        cores = "" if self._cores is None else " on cores " + " | ".join(map(pinning.described, self._cores))
        return cores + ("" if self._page is None else f"; status at {self._page.url}")

    def _note_end(self, process: Process) -> None:
        """Note the end of a replica that was asked to end."""
        status = process.status
        if status and not self._status and (process.ready_at is not None or status != -signal.SIGTERM):
            self._status = status if status > 0 else 128 - status

    # A replica ends.

    async def _keep(self, place: Place) -> None:
        """Keep one replica running."""
        while not self._stopping.is_set():
            wait_s: float | None
            try:
                place.take(self._start(place))
            except OSError as error:
                if not self._served:
                    raise
                place.begun_at = self._loop.time()
                wait_s, words = place.restarts.ended(0.0), f"cannot be started: {error}"
            else:
                process = await self._end_of(place)
                if self._stopping.is_set():
                    break
                if place.asked:
                    continue
                assert process.status is not None
                words = f"process {process.pid} ended {described(process.status)}"
                if process.stuck_at is not None:
                    words += f", because its event loop was stuck at {process.stuck_at}"
                if not self._served and self._watched is None:
                    self._fail(place.index, words, process.status)
                    break
                wait_s = place.restarts.ended(process.ready_s)
                if self._watched is not None and process.ready_at is None:
                    wait_s = None  # The program itself is at fault, and its developer is about to change it.
            place.has_ended(words)
            place.settled = True
            self._tell(place, words, wait_s)
            self._bell.ring()
            await self._bell.until(lambda: self._stopping.is_set() or place.due, wait_s)
        place.settled = place.over = True
        self._bell.ring()

    async def _end_of(self, place: Place) -> Process:
        """Wait until the place's process has ended and no successor has taken its place; return the process."""
        while True:
            process = place.process
            assert process is not None
            await self._bell.until(partial(place.has_changed, process))
            if place.process is not process:
                continue
            successor = place.successor
            if successor is not None and not successor.is_over and not self._stopping.is_set():
                words = f"process {process.pid} ended {described(process.status or 0)}"
                logger.warning("replica %d: %s while its successor starts", place.index, words, extra=place.field)
                place.has_ended(words)
                place.take(successor)
                continue
            place.process = None
            return process

    def _tell(self, place: Place, words: str, wait_s: float | None) -> None:
        when = f"starting again in {wait_s:.1f} s" if wait_s else "starting again"
        if wait_s is None:
            when = "it starts again after a change of a file"
        restarts = place.restarts
        if restarts.failing:
            logger.error(
                "replica %d is failing, %d ends in a row: %s; %s; %d of %d replicas can be called",
                place.index,
                restarts.in_a_row,
                words,
                when,
                sum(each.is_ready for each in self._places),
                len(self._places),
                extra=place.field,
            )
        else:
            logger.warning("replica %d: %s; %s", place.index, words, when, extra=place.field)

    def _fail(self, index: int, words: str, status: int) -> None:
        """End all replicas: this program does not start at all, and what has started this process must know."""
        text = f"replica {index}: {words} before any replica could be called; its output says why"
        self._failure = StartFailed(text, status if status > 0 else 128 - status or 1)
        self._stop()

    # Signals.

    def _signalled(self, number: signal.Signals) -> None:
        now = self._loop.time()
        if self._first is None:
            self._first = now
            logger.info("%s: draining %d process(es)", number.name, len(self._processes))
            self._stop()
        elif now - self._first >= ECHO_S:
            self._cut = number
            for each in self._processes.values():
                each.cut(AT_ONCE_S)

    def _stop(self) -> None:
        self._stopping.set()
        for each in self._processes.values():
            each.drain(self._limit_s)
        self._bell.ring()

    def _hung_up(self) -> None:
        if self._terminal and not _has_terminal():
            self._signalled(signal.SIGTERM)  # The terminal was closed.
        else:
            self._outdate("")

    def _outdate(self, cause: str) -> None:
        """Let all processes be replaced that run now."""
        if not self._stopping.is_set():
            self._replacer.outdate(self._loop.time(), cause)

    async def _end_stuck(self, every_s: float) -> None:
        """End replicas whose event loops are stuck for too long, as Kubernetes ends a single worker."""
        while True:
            await self._bell.until(self._stopping.is_set, every_s)
            if self._stopping.is_set():
                return
            try:
                await self._end_one_stuck()
            except Exception as error:  # E.g. no further thread can be started. The replicas serve as before.
                text = "cannot see whether replicas are stuck, trying again in %.1f s: %s: %s"
                logger.error(text, every_s, type(error).__name__, error)  # noqa: TRY400 (again at each look)

    async def _end_one_stuck(self) -> None:
        """Look once. One replica at a time ends: what they all wait for may come meanwhile."""
        if any(each.stuck_at is not None for each in self._processes.values()):
            return
        asked = [each.process for each in self._places]
        for index, where in (await asyncio.to_thread(self._page.stuck)).items():
            place, process = self._places[index], asked[index]
            if process is not None and process is place.process and not process.is_draining:
                text = "replica %d: the event loop of process %d is stuck at %s, so the process is ended"
                logger.error(text, index, process.pid, where, extra=place.field)
                process.stuck_at = where
                process.drain(STUCK_S + AT_ONCE_S)
                self._loop.call_later(STUCK_S, process.cut, AT_ONCE_S)  # It names the requests that are cut.
                return

    async def _watch(self, folder: Path) -> None:
        """Replace the processes when files have changed that can be compiled."""
        wrong: dict[Path, str] = {}
        try:
            async for files in reload.changes(folder, self._stopping):
                wrong = reload.broken({*files, *wrong})
                if not wrong:
                    self._outdate(f"changed: {reload.named(files)}: ")
                for file, words in wrong.items():
                    logger.error(
                        "%s cannot be compiled: %s; the running processes continue until the file is corrected",
                        reload.named([file]),
                        words,
                    )
        except OSError as error:
            text = "the files in %s cannot be watched, so a change restarts nothing: %s"
            logger.error(text, folder, error)  # noqa: TRY400 (a traceback says no more)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True

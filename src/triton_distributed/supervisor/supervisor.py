"""The supervisor: starts the replicas, starts them again when they end, and drains them on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import threading
from collections.abc import Sequence

from triton_distributed.config import Config
from triton_distributed.errors import ConfigError
from triton_distributed.supervisor.output import Output
from triton_distributed.supervisor.process import Process, described, look
from triton_distributed.supervisor.program import own_command, own_directory
from triton_distributed.supervisor.restarts import Restarts
from triton_distributed.system.signals import ECHO_S, GRACE_S
from triton_distributed.transport.address import Address, entries_of

logger = logging.getLogger("triton_distributed.supervisor")

SPARE_S = 2.0
"""Seconds after the time within which a replica ends by itself (the drain's time and `GRACE_S`); then it is killed."""

AT_ONCE_S = 1.0
"""Seconds from a second signal until the replicas are killed. They name the requests that are cut."""


class StartFailed(RuntimeError):
    """A replica ended before any replica could be called.

    Args:
        text: the replica and its end.
        status: the exit status of the replica.
    """

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def supervise(count: int, config: Config) -> int:
    """Run this program again in some processes, which find out by `replica.is_replica()`, until a signal ends them.

    Args:
        count: the number of replicas, at least 1.
        config: the settings that they will have.

    Returns:
        The exit status: 0 if all have drained, 128 plus its number after a second signal, else the status of a replica.

    Raises:
        ConfigError: the replicas cannot share these settings.
        StartFailed: a replica ended before any replica could be called.
        RuntimeError: the program cannot be run again, or this is not the main thread.
        OSError: no process can be started.
    """
    check_shareable(count, config)
    command = own_command()
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("only the main thread gets signals, so only there processes can be supervised")

    async def main() -> int:
        return await Supervisor(count, command, own_directory(), config.drain_timeout_s).run()

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(main())


def check_shareable(count: int, config: Config) -> None:
    """Check that several processes can use the settings.

    Raises:
        ConfigError: they would listen on one address, or their memory has to be shared.
    """
    if config.backend.reach == "process":
        raise ConfigError("TRD_DISCOVERY", config.discovery, "processes do not share memory: use file or etcd")
    if count == 1:
        return
    if config.backend.fixed:
        raise ConfigError(
            "TRD_DISCOVERY",
            config.discovery,
            f"{count} processes cannot share the addresses of one worker: use file or etcd, or start each process with "
            "a TRD_LISTEN of its own",
        )
    for variable, text in (("TRD_LISTEN", config.listen), ("TRD_ADVERTISE", config.advertise)):
        for entry in entries_of(text, variable):
            with contextlib.suppress(ConfigError):  # A host alone can be advertised. The worker checks the rest.
                address = Address.parse(entry, variable)
                if address.scheme != "tcp" or address.port:
                    instead = f"use port 0: tcp://{address.host}:0" if address.scheme == "tcp" else "remove it"
                    break
        else:
            continue
        raise ConfigError(variable, entry, f"{count} processes cannot share an address: {instead}")


class _Replica:
    """One place of a supervisor, which has a process most of the time."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.process: Process | None = None
        self.restarts = Restarts(random.random)
        self.renewing = False  # The supervisor has asked the process to end, so that a new one takes its place.
        self.settled = asyncio.Event()  # The process is ready, or it has ended before.

    def is_ready(self) -> bool:
        """Whether its process can be called."""
        return self.process is not None and self.process.ready_at is not None


class Supervisor:
    """Keeps some processes of one command running.

    Args:
        count: the number of replicas.
        command: the program and its arguments.
        directory: its current directory; None for this process's.
        drain_s: seconds that a replica may take to drain.
    """

    def __init__(self, count: int, command: Sequence[str], directory: str | None, drain_s: float) -> None:
        self._command, self._directory = command, directory
        self._limit_s = drain_s + GRACE_S + SPARE_S
        self._replicas = [_Replica(index) for index in range(count)]
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._first: float | None = None  # When the first signal came.
        self._cut = 0  # The number of the second signal.
        self._served = False  # A replica has been ready.
        self._complete = False  # All have been ready at once.
        self._failure: StartFailed | None = None
        self._status = 0
        self._renewal: asyncio.Task[None] | None = None
        self._again = False
        self._terminal = _has_terminal()

    async def run(self) -> int:
        """Run until a signal has ended all replicas; the rest as for `supervise`."""
        handlers = {
            signal.SIGCHLD: lambda: look(self._processes()),
            signal.SIGTERM: lambda: self._signalled(signal.SIGTERM),
            signal.SIGINT: lambda: self._signalled(signal.SIGINT),
        }
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # Under `nohup` it stays ignored.
            handlers[signal.SIGHUP] = self._hung_up
        before = {number: signal.getsignal(number) for number in handlers}
        for number, handle in handlers.items():
            self._loop.add_signal_handler(number, handle)
        self._output = Output()
        try:
            async with asyncio.TaskGroup() as group:
                for each in self._replicas:
                    group.create_task(self._keep(each))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            if self._renewal is not None:
                self._renewal.cancel()
            for process in self._processes().values():  # After an error only.
                process.kill()
                await process.over
            self._output.close()
            for number, handler in before.items():
                self._loop.remove_signal_handler(number)
                signal.signal(number, handler or signal.SIG_DFL)
        if self._cut:
            return 128 + self._cut
        if self._failure is not None:
            raise self._failure
        return self._status

    def _processes(self) -> dict[int, Process]:
        return {each.process.pid: each.process for each in self._replicas if each.process is not None}

    async def _keep(self, replica: _Replica) -> None:
        """Keep one replica running."""
        while not self._stopping.is_set():
            wait_s, words = 0.0, ""
            try:
                process = self._start(replica)
            except OSError as error:
                if not self._served:
                    raise
                wait_s, words = replica.restarts.ended(0.0), f"cannot be started: {error}"
            else:
                logger.info("replica %d: started as process %d", replica.index, process.pid)
                status = await asyncio.shield(process.over)
                ready_s, was_ready, replica.process = process.ready_s, replica.is_ready(), None
                if self._stopping.is_set():
                    self._note_end(was_ready, status)
                    break
                if replica.renewing:
                    replica.renewing = False
                    continue
                words = f"process {process.pid} ended {described(status)}"
                if not self._served:
                    self._fail(replica.index, words, status)
                    break
                wait_s = replica.restarts.ended(ready_s)
            self._tell(replica, words, wait_s)
            replica.settled.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait_s)
        replica.settled.set()

    def _start(self, replica: _Replica) -> Process:
        def ready() -> None:
            self._served = True
            if replica.renewing:
                return  # This process has been asked to end.
            replica.settled.set()
            if not self._complete and all(each.is_ready() for each in self._replicas):
                self._complete = True
                self._output.say(f"ready: {len(self._replicas)} replica(s)")

        replica.process = Process(replica.index, self._command, self._directory, self._output, ready)
        return replica.process

    def _tell(self, replica: _Replica, words: str, wait_s: float) -> None:
        when = f"starting again in {wait_s:.1f} s" if wait_s else "starting again"
        restarts = replica.restarts
        if restarts.failing:
            running = sum(each.is_ready() for each in self._replicas)
            logger.error(
                "replica %d is failing, %d ends in a row: %s; %s; %d of %d replicas can be called",
                replica.index,
                restarts.in_a_row,
                words,
                when,
                running,
                len(self._replicas),
            )
        else:
            logger.warning("replica %d: %s; %s", replica.index, words, when)

    def _note_end(self, was_ready: bool, status: int) -> None:
        """Note the end of a replica that was asked to end."""
        if status and not self._status and (was_ready or status != -signal.SIGTERM):
            self._status = status if status > 0 else 128 - status

    def _fail(self, index: int, words: str, status: int) -> None:
        """End all replicas: this program does not start at all, and what has started this process must know."""
        text = f"replica {index}: {words} before any replica could be called; its output says why"
        self._failure = StartFailed(text, status if status > 0 else 128 - status or 1)
        self._stop()

    def _signalled(self, number: signal.Signals) -> None:
        now = self._loop.time()
        if self._first is None:
            self._first = now
            logger.info("%s: draining %d replica(s)", number.name, len(self._processes()))
            self._stop()
        elif now - self._first >= ECHO_S:
            self._cut = number
            for each in self._processes().values():
                each.cut(AT_ONCE_S)

    def _stop(self) -> None:
        self._stopping.set()
        for each in self._processes().values():
            each.drain(self._limit_s)

    def _hung_up(self) -> None:
        if self._terminal and not _has_terminal():
            self._signalled(signal.SIGTERM)  # The terminal was closed.
            return
        self._again = True
        if not self._stopping.is_set() and (self._renewal is None or self._renewal.done()):
            self._renewal = asyncio.ensure_future(self._renew())

    async def _renew(self) -> None:
        """Drain and start one replica after the other. A signal meanwhile lets this begin anew."""
        while self._again:
            self._again = False
            self._output.say(f"restarting {len(self._replicas)} replica(s), one after the other")
            for each in self._replicas:
                if each.process is None:
                    continue  # It waits for its next start, which has what is new.
                each.settled.clear()
                each.renewing = True
                each.process.drain(self._limit_s)
                await each.settled.wait()
                if self._stopping.is_set():
                    return
                if not each.is_ready():
                    logger.error(
                        "replica %d did not start again, so the others are not restarted; they go on as they are",
                        each.index,
                    )
                    break
            else:
                self._output.say(f"restarted: {len(self._replicas)} replica(s)")


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True

"""A cluster of real worker processes that suffer faults on a schedule while clients call them."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from triton_distributed.config import Config
from triton_distributed.errors import ConfigError
from triton_distributed.external.etcd import PARALLEL
from triton_distributed.system.loop_thread import LoopThread
from triton_distributed.testing.chaos.aftermath import left_here, left_in_folder, left_in_process, logged_errors
from triton_distributed.testing.chaos.control import held
from triton_distributed.testing.chaos.disk import SmallDisk
from triton_distributed.testing.chaos.injector import LINUX_ONLY, ON_TCP, PROXIED, Injector
from triton_distributed.testing.chaos.place import Place
from triton_distributed.testing.chaos.processes import WorkerEnded, last_words
from triton_distributed.testing.chaos.report import Report
from triton_distributed.testing.chaos.schedule import Fault, FaultKind
from triton_distributed.testing.proxy import FaultProxy
from triton_distributed.testing.servers import free_port

JOURNAL = "{journal}"  # Placeholder in a command for the path of the cluster's journal.
NETWORKS = ("unix", "tcp", "tls")
STOP_S = 15.0  # Seconds for the thread to stop, when it has no work left.
DRAIN_TIMEOUT_S = 10  # The workers' TRD_DRAIN_TIMEOUT_S, below `place.DRAIN_S`.

# Linux accepts connections on all of 127.0.0.0/8, and an outgoing connection never uses a port of this address.
LOOPBACK = "127.0.67.1" if sys.platform == "linux" else "127.0.0.1"


class ChaosCluster:
    """Worker processes, a proxy in front of each, and the faults. `async with` starts and ends them.

    Supervision, proxies and faults run in a thread with its own loop, so only the clients use the caller's loop. No
    process outlives the cluster, even if the process that made the cluster is killed. (This holds on Linux; on other
    systems a worker that is stopped at that moment survives.)

    Args:
        command: the command of a worker, which calls `obey(runtime)` before it serves. `JOURNAL` in the command is
            replaced by `journal`.
        workers: the number of workers.
        network: `unix`, `tcp`, or `tls`, which is TCP with certificates made by `openssl`.
        proxied: put a `FaultProxy` in front of each worker. Without it, workers choose their addresses themselves.
        small_disk: put the folder of discovery on a file system that can be filled, see `disk.private_mounts`.
        settings: further variables of workers and clients, e.g. `ETCD_ENDPOINTS`.
        recovery_s: seconds after a fault, or a successor's start, until clients must find a worker well.
        settle_s: seconds after the end of the clients after which held resources count as left over. Closed resources
            are gone within milliseconds, but a session with a silent peer takes 5 s.

    Attributes:
        folder: journals and logs; removed at the end.
        journal: the path of a file in which workers may record their work.
        violations: descriptions of the violated promises so far.

    Raises:
        ConfigError: an argument is invalid.
        WorkerEnded: from `async with`: a worker does not start; the text contains the end of its log.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        workers: int = 3,
        network: str = "unix",
        proxied: bool = True,
        small_disk: bool = False,
        settings: Mapping[str, str] | None = None,
        recovery_s: float = 0.5,
        settle_s: float = 15.0,
    ) -> None:
        if workers < 1:
            raise ConfigError("workers", workers, "must be at least 1")
        if network not in NETWORKS:
            raise ConfigError("network", network, f"one of {', '.join(NETWORKS)}")
        self.folder = Path(tempfile.mkdtemp(prefix="trd-chaos-"))
        self.journal = self.folder / "journal"
        self._command = [each.replace(JOURNAL, str(self.journal)) for each in command]
        self._workers, self._network, self._proxied, self._recovery_s = workers, network, proxied, recovery_s
        self._directory = self.folder / "d"
        self._directory.mkdir(mode=0o700)
        self._disk = SmallDisk(self._directory) if small_disk else None
        self._settle_s = settle_s
        self.settings = {
            "TRD_DIR": str(self._directory),
            "TRD_DRAIN_TIMEOUT_S": str(DRAIN_TIMEOUT_S),
            **({} if network != "tls" else _certificates(self.folder)),
            **(settings or {}),
        }
        self.violations: list[str] = []
        self._places: list[Place] = []
        self._proxies: list[FaultProxy] = []
        self._thread: LoopThread | None = None

    @property
    def config(self) -> Config:
        """The settings for clients of this cluster."""
        return Config.from_env(self.settings)

    @property
    def pids(self) -> list[int]:
        """The ids of the workers' present processes."""
        return [each.process.pid for each in self._places]

    def spared(self, from_s: float, to_s: float) -> bool:
        """Whether at least one worker was well during the whole time between two moments of `time.monotonic`."""
        return any(each.was_well(from_s, to_s) for each in self._places)

    async def __aenter__(self) -> Self:
        self._thread = LoopThread(_until_stopped, "chaos")
        try:
            await self._thread.call(self._start)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            await thread.call(self._end)
            await thread.stop(STOP_S)
        if self._disk is not None:
            self._disk.unmount()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def run(
        self,
        faults: Sequence[Fault],
        calls: Callable[[], Awaitable[object]],
        *,
        spare: int = 1,
        patience_s: float = 60.0,
    ) -> Report:
        """Do the faults while `calls` makes its calls; then heal everything, and check what is left over.

        A cluster can run once, because its workers are drained at the end.

        Args:
            faults: a schedule for the same number of workers.
            calls: opens its clients, makes its calls and closes its clients, on the running loop. Its errors are raised
                here.
            spare: workers that are well at every moment; a fault that would leave fewer is skipped.
            patience_s: seconds that the calls may take after everything is healed.

        Returns:
            the report; the caller fills in `outcomes` and the fields that depend on them.

        Raises:
            ConfigError: the cluster cannot do one of the faults; the text gives the reason.
        """
        self._check(faults)
        assert self._thread is not None, "within `async with`"
        began, before = time.monotonic(), held(asyncio.get_running_loop())
        injector = await self._thread.call(lambda: self._injector(spare))
        calling = asyncio.ensure_future(calls())
        try:
            await self._thread.call(lambda: injector.run(faults))
            await self._thread.call(self._heal)
            await asyncio.wait([calling], timeout=patience_s)
            if not calling.done():
                self._accuse(f"{patience_s:g} s after everything was healed, some calls have not ended")
        finally:
            if not calling.done():
                calling.cancel()
                await asyncio.wait([calling])
        if not calling.cancelled():
            calling.result()
        await self._thread.call(self._look_and_finish)
        self.violations += await left_here(before, self._settle_s)  # The thread has closed its proxies' connections.
        return Report(
            faults=injector.done,
            left_out=injector.left_out,
            seconds=time.monotonic() - began,
            violations=self.violations,
        )

    def _check(self, faults: Sequence[Fault]) -> None:
        for kind in {each.kind for each in faults}:
            if kind in PROXIED and not self._proxied:
                raise ConfigError("faults", str(kind), "needs a cluster with proxied=True")
            if kind in ON_TCP and self._network == "unix":
                raise ConfigError("faults", str(kind), "needs a network: Unix sockets lose no bytes")
            if kind == FaultKind.CORRUPT and self._network != "tls":
                raise ConfigError(
                    "faults", str(kind), 'needs network="tls": a plain session has no checksum besides that of TCP'
                )
            if kind == FaultKind.DISK_FULL and self._disk is None:
                raise ConfigError("faults", str(kind), "needs a cluster with small_disk=True")
            if kind in LINUX_ONLY and sys.platform != "linux":
                raise ConfigError("faults", str(kind), "only Linux can do this to another process")
        if any(each.worker >= self._workers for each in faults):
            raise ConfigError("faults", self._workers, "the schedule is for more workers than the cluster has")

    def _accuse(self, words: str) -> None:
        self.violations.append(words)

    # in the thread

    async def _start(self) -> None:
        for number in range(self._workers):
            listen, proxy = self._addresses(number)
            settings = dict(self.settings)
            if listen:
                settings["TRD_LISTEN"] = listen
            if proxy is not None:
                self._proxies.append(await proxy.__aenter__())
                settings["TRD_ADVERTISE"] = proxy.address
            log = self.folder / f"worker{number}.log"
            self._places.append(Place(number, self._command, settings, log, proxy, self._recovery_s, self._accuse))
        for each in self._places:
            try:
                await each.start()
            except WorkerEnded as error:
                raise WorkerEnded(f"{each} did not start: {error}: {last_words(each.log)}") from error

    def _addresses(self, number: int) -> tuple[str, FaultProxy | None]:
        """Return the address on which a worker listens, "" for its own choice, and the proxy in front of it."""
        if self._network == "unix":
            listen = f"unix://{self._directory}/w{number}"
            return (listen, FaultProxy(listen)) if self._proxied else ("", None)
        listen = f"tcp://{LOOPBACK}:{free_port() if self._proxied else 0}"
        return listen, FaultProxy(listen) if self._proxied else None

    async def _injector(self, spare: int) -> Injector:
        return Injector(self._places, self._disk, spare)

    async def _heal(self) -> None:
        for each in self._places:
            each.heal()

    async def _look_and_finish(self) -> None:
        kept = PARALLEL if self.config.discovery == "etcd" else 0
        for each in self._places:
            self.violations += await left_in_process(each, self._settle_s, kept)
        for each in self._places:
            await each.finish()
            self.violations += logged_errors(each.log, str(each))
        await self._end()
        self.violations += left_in_folder(self._directory)

    async def _end(self) -> None:
        for place in self._places:
            place.close()
        while self._proxies:
            await self._proxies.pop().__aexit__()


async def _until_stopped(stopping: asyncio.Event) -> None:
    await stopping.wait()


def _certificates(folder: Path) -> dict[str, str]:
    """Make one self-signed certificate for all members.

    Raises:
        ConfigError: `openssl` is missing or fails.
    """
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=chaos"
    try:
        done = subprocess.run(
            [*command.split(), "-keyout", key, "-out", cert], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ConfigError("network", "tls", f"openssl is needed for the certificates: {error.strerror}") from error
    if done.returncode != 0:
        raise ConfigError("network", "tls", f"openssl made no certificate: {done.stderr.strip()[-300:]}")
    return {"TRD_TLS_CERT": cert, "TRD_TLS_KEY": key, "TRD_TLS_CA": cert}

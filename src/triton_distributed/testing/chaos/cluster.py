"""A cluster of real worker processes that are hurt on a schedule while something calls them."""

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

JOURNAL = "{journal}"  # in a command: the path of the cluster's journal
NETWORKS = ("unix", "tcp", "tls")
STOP_S = 15.0  # of the thread, which has nothing left to do by then
DRAIN_TIMEOUT_S = 10  # of the workers: below `place.DRAIN_S`

# Linux takes connections on all of 127.0.0.0/8, and an outgoing one never takes a port of this address by itself.
LOOPBACK = "127.0.67.1" if sys.platform == "linux" else "127.0.0.1"


class ChaosCluster:
    """Worker processes, a proxy in front of each, and what hurts them. `async with` starts and ends them.

    Supervision, proxies and faults run in a thread with a loop of its own: the caller's loop is its clients' alone.
    No process outlives the cluster, also where the one that made it is killed (on Linux; elsewhere one that is stopped
    just then does).

    Args:
        command: of a worker, which calls `obey(runtime)` before it serves; `JOURNAL` in it stands for `journal`.
        workers: how many.
        network: `unix`, `tcp`, or `tls`, which is TCP with certificates made by `openssl`.
        proxied: a `FaultProxy` stands in front of each worker. Without, workers choose their addresses themselves.
        small_disk: discovery's folder is a file system that can be filled, see `disk.private_mounts`.
        settings: further variables of workers and clients, e.g. `ETCD_ENDPOINTS`.
        recovery_s: seconds after a fault, or a successor's start, that clients may need to find a worker well.
        settle_s: seconds after which what is still held when clients are gone counts as left. What is closed is gone
            within milliseconds, but a session whose peer does not answer has 5 s.

    Attributes:
        folder: journals and logs; removed at the end.
        journal: a path for a file in which workers may write down what they did.
        violations: what must not be, so far.

    Raises:
        ConfigError: an argument makes no sense.
        WorkerEnded: from `async with`: a worker does not start; its log's end is in the text.
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
            raise ConfigError("workers", workers, "at least 1")
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
        """The settings of a client of this cluster."""
        return Config.from_env(self.settings)

    @property
    def pids(self) -> list[int]:
        """The processes of the workers now."""
        return [each.process.pid for each in self._places]

    def spared(self, from_s: float, to_s: float) -> bool:
        """Whether some worker was well all the time between two moments of `time.monotonic`."""
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
        """Hurt the workers while `calls` makes its calls; then heal everything, and look at what is left.

        Once a cluster: its workers are drained at the end.

        Args:
            faults: from `schedule`, with as many workers.
            calls: opens its clients, makes its calls and closes its clients, on the running loop. What it raises is
                raised here.
            spare: workers that are well at every moment; a fault that would leave fewer is left out.
            patience_s: seconds that the calls may take when everything is healed.

        Returns:
            what was done and found; `outcomes` and what follows from them is the caller's to fill in.

        Raises:
            ConfigError: the cluster cannot do one of the faults; the text says what it lacks.
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
                self._accuse(f"{patience_s:g} s after everything was healed there are calls that have not ended")
        finally:
            if not calling.done():
                calling.cancel()
                await asyncio.wait([calling])
        if not calling.cancelled():
            calling.result()
        await self._thread.call(self._look_and_finish)
        self.violations += await left_here(before, self._settle_s)  # the thread has closed its proxies' connections
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
                raise ConfigError("faults", str(kind), "needs a network: a Unix socket loses nothing")
            if kind == FaultKind.CORRUPT and self._network != "tls":
                raise ConfigError(
                    "faults", str(kind), 'needs network="tls": a plain session has no checksum beside that of TCP'
                )
            if kind == FaultKind.DISK_FULL and self._disk is None:
                raise ConfigError("faults", str(kind), "needs a cluster with small_disk=True")
            if kind in LINUX_ONLY and sys.platform != "linux":
                raise ConfigError("faults", str(kind), "only Linux can do that to another process")
        if any(each.worker >= self._workers for each in faults):
            raise ConfigError("faults", self._workers, "the schedule is for more workers than there are")

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
        """Where a worker listens, "" for where it likes, and the proxy in front of it."""
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
    """One certificate for all members, which is its own authority.

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
        raise ConfigError("network", "tls", f"openssl makes the certificates: {error.strerror}") from error
    if done.returncode != 0:
        raise ConfigError("network", "tls", f"openssl made no certificate: {done.stderr.strip()[-300:]}")
    return {"TRD_TLS_CERT": cert, "TRD_TLS_KEY": key, "TRD_TLS_CA": cert}

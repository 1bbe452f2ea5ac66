"""What the tests of discovery through files and etcd share."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.timing import PATIENCE_S
from triton_distributed.discovery import record
from triton_distributed.discovery.etcd.backend import EtcdDiscovery
from triton_distributed.discovery.file.backend import FileDiscovery
from triton_distributed.external.etcd import EtcdClient
from triton_distributed.external.etcd_endpoint import EtcdOptions
from triton_distributed.names import EndpointName, Instance
from triton_distributed.system import inotify
from triton_distributed.system.loop_thread import tell

HOUR_S = 3600.0
_numbers = itertools.count()
NAME = EndpointName("ns", "comp", "generate")


def instance(id: int, endpoint: EndpointName = NAME, **metadata: object) -> Instance:
    return Instance(endpoint, id, ("tcp://127.0.0.1:1",), "", metadata)


class Places:
    """The folder of a test's discoveries, and what lies in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.records = directory / "instances"

    def path(self, id: int, endpoint: EndpointName = NAME) -> Path:
        return self.records / record.key(endpoint, id)

    def write(self, id: int, data: bytes | None = None, endpoint: EndpointName = NAME) -> Path:
        """A record that nobody holds, as a killed worker leaves it; `data` instead of what belongs there."""
        self.records.mkdir(mode=0o700, exist_ok=True)
        path = self.path(id, endpoint)
        path.write_bytes(record.encode(instance(id, endpoint)) if data is None else data)
        return path


@pytest.fixture
def places(trd_dir: Path) -> Places:
    return Places(trd_dir)


class Opens(Protocol):
    def __call__(self, *, poll_s: float = HOUR_S, check_s: float = HOUR_S) -> FileDiscovery: ...


@pytest.fixture
async def opens(trd_dir: Path) -> AsyncIterator[Opens]:
    """Makes discoveries whose clocks do not strike during a test, unless it asks for that; closes them."""
    made: list[FileDiscovery] = []

    def make(*, poll_s: float = HOUR_S, check_s: float = HOUR_S) -> FileDiscovery:
        made.append(FileDiscovery(trd_dir, poll_s=poll_s, check_s=check_s))
        return made[-1]

    yield make
    for each in made:
        await each.close()


Raw = Callable[[str], EtcdClient]


class OpensEtcd(Protocol):
    def __call__(self, urls: str, *, ttl_s: int = 10, prefix: str = ..., timeout_s: float = 5.0) -> EtcdDiscovery: ...


@pytest.fixture
async def opens_etcd() -> AsyncIterator[OpensEtcd]:
    """Makes discoveries of one etcd, under a prefix of the test's own unless it names one; closes them."""
    own = f"test-{next(_numbers)}"
    made: list[EtcdDiscovery] = []

    def make(urls: str, *, ttl_s: int = 10, prefix: str = own, timeout_s: float = 5.0) -> EtcdDiscovery:
        made.append(EtcdDiscovery(EtcdOptions(urls), prefix=prefix, lease_ttl_s=ttl_s, timeout_s=timeout_s))
        return made[-1]

    yield make
    await asyncio.gather(*(each.close() for each in made))


@pytest.fixture
async def raw() -> AsyncIterator[Raw]:
    """Makes clients that look into etcd, and write what no discovery would; closes them."""
    made: list[EtcdClient] = []

    def make(urls: str) -> EtcdClient:
        made.append(EtcdClient(EtcdOptions(urls), b"nothing"))
        return made[-1]

    yield make
    for each in made:
        each.close()
    await asyncio.sleep(0)  # their transports close


class Heard(logging.Handler):
    """What discovery logs; a test can wait for it."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []
        self._more = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        if self._loop is not None:
            tell(self._loop, self._more.set)  # it may be said in another thread

    @property
    def warnings(self) -> list[str]:
        return [each.getMessage() for each in self.records if each.levelno >= logging.WARNING]

    async def until(self, condition: Callable[[str], bool]) -> None:
        """Wait until a line was logged for which `condition` holds."""
        self._loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE_S):
            while not any(condition(each.getMessage()) for each in self.records):
                self._more.clear()
                await self._more.wait()


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler = Heard()
    logger = logging.getLogger("triton_distributed.discovery")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.fixture
def no_inotify(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system that has none."""

    def missing() -> None:
        raise OSError(errno.ENOSYS, "this system has no inotify")

    monkeypatch.setattr(inotify, "Inotify", missing)


@pytest.fixture
async def removals() -> AsyncIterator[Callable[[Path, str], asyncio.Future[None]]]:
    """Gives a future that is done when the kernel says that a file of that name was removed."""
    loop = asyncio.get_running_loop()
    made: list[inotify.Inotify] = []

    def listen(folder: Path, name: str) -> asyncio.Future[None]:
        gone: asyncio.Future[None] = loop.create_future()
        notifier = inotify.Inotify()
        made.append(notifier)
        notifier.watch_folder(str(folder))

        def read() -> None:
            names, _ = notifier.read()
            if names.get(name, 0) & inotify.IN_DELETE and not gone.done():
                gone.set_result(None)

        loop.add_reader(notifier.fd, read)
        return gone

    yield listen
    for each in made:
        loop.remove_reader(each.fd)
        each.close()

"""Files on which it depends whether a worker is reached: whatever is done to them, it is reached again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource  # noqa: F401  # imported late by what is tested, and another user may not read it
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.runtime.cluster import Cluster, patiently, turns, until
from tests.runtime.programs import program
from tests.runtime.repair import ENDPOINT, FILES, World, aside, delete, every, harms, move
from tests.timing import PATIENCE_S
from triton_distributed.config import Config
from triton_distributed.discovery.file import backend as file_module
from triton_distributed.discovery.file.backend import FileDiscovery
from triton_distributed.errors import ConnectionFailed, DiscoveryError
from triton_distributed.events import local
from triton_distributed.events.local import LocalEvents
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.testing import EtcdServer
from triton_distributed.transport import kept

USER = 12345  # who is not root

HARMS = dict(harms())


def look_soon(patch: pytest.MonkeyPatch) -> None:
    """Looks that come soon: how soon they come is nobody's promise but "within seconds"."""
    for module in (kept, file_module, local):
        patch.setattr(module, "SETTLE_S", 0.02)
    for module in (kept, local):
        patch.setattr(module, "RETRY_S", 0.05)
    patch.setattr(kept, "CHECK_S", 0.02)
    for made in (FileDiscovery, LocalEvents):
        defaults = made.__init__.__kwdefaults__
        assert defaults is not None
        patch.setitem(defaults, "check_s", 0.02)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    look_soon(monkeypatch)


async def looks(number: int = 10) -> None:
    """Let sockets and records be looked at some times, for tests that something does NOT happen."""
    for _ in range(number):
        await asyncio.sleep(kept.CHECK_S)
        await turns(3)


@pytest.fixture
def no_root(request: pytest.FixtureRequest, trd_dir: Path) -> Iterator[None]:
    """Root may do what modes forbid, so tests of these are another user's."""
    modes = ("take_rights", "make_read_only")
    callspec = getattr(request.node, "callspec", None)
    if os.geteuid() != 0 or callspec is None or not callspec.params.get("harm", "").startswith(modes):
        yield
        return
    os.chown(trd_dir, USER, USER)
    os.seteuid(USER)
    yield
    os.seteuid(0)


@contextlib.asynccontextmanager
async def started(directory: Path, **settings: object) -> AsyncIterator[World]:
    made = World(directory, **settings)
    try:
        await made.start()
        yield made
    finally:
        await made.close()
    assert made.listing() == set()
    for each in directory.parent.parent.rglob("*aside*"):
        delete(each)


@pytest.fixture
async def world(trd_dir: Path, no_root: None, quick: None) -> AsyncIterator[World]:
    async with started(trd_dir / "above" / "trd") as made:
        yield made


@pytest.mark.any_loop
@pytest.mark.parametrize("harm", HARMS)
async def test_what_is_done_to_it_is_mended(world: World, harm: str) -> None:
    HARMS[harm](world.directory)
    await world.all_is_well()


@pytest.mark.parametrize("seed", range(5))
async def test_what_is_done_to_it_one_after_the_other_is_mended(world: World, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(6):
        for harm in chance.sample([each for each in HARMS if not each.startswith("move ")], chance.randint(1, 3)):
            with contextlib.suppress(AssertionError, OSError):  # what is to be harmed is away already
                HARMS[harm](world.directory)
        if chance.random() < 0.7:
            await world.all_is_well()
    await world.all_is_well()


@pytest.mark.parametrize("what", ["the folder", "instances", "sockets", "events"])
async def test_a_folder_that_was_away_for_long_may_come_back(world: World, what: str) -> None:
    """Then it holds a record that nobody locks and sockets on which nobody listens."""
    folder = world.directory if what == "the folder" else world.directory / what
    move(folder)
    await world.all_is_well()
    shutil.rmtree(folder)
    os.rename(aside(folder), folder)
    await world.all_is_well()


async def test_a_folder_that_others_may_enter_is_refused_until_it_is_closed(world: World) -> None:
    world.directory.chmod(0o755)
    await looks()
    async with world.runtime() as runtime:
        with pytest.raises(DiscoveryError, match=f"chmod 700 {world.directory}"):
            await runtime.endpoint(ENDPOINT).client()
    await world.the_session_goes_on()
    world.directory.chmod(0o700)
    await world.all_is_well()


REMOVES = """
import shutil, sys
for _ in range(int(sys.argv[2])):
    shutil.rmtree(sys.argv[1])
    print("removed", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.slow
async def test_removing_everything_does_not_fail_because_it_is_mended(trd_dir: Path, tmp_path: Path) -> None:
    """With the real times: whoever removes a folder with all that is in it has a moment for that."""
    number = 3
    async with started(trd_dir / "above" / "trd") as world:
        removing = await asyncio.create_subprocess_exec(
            sys.executable, "-c", REMOVES, str(world.directory), str(number),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert removing.stdin is not None
        assert removing.stdout is not None
        for _ in range(number):
            assert await patiently(removing.stdout.readline()) == b"removed\n"
            await world.all_is_well()
            removing.stdin.write(b"\n")
        assert await patiently(removing.wait()) == 0


# --- a socket that cannot be made again ------------------------------------------------------------------------------


async def listed(runtime: DistributedRuntime) -> list[tuple[str, ...]]:
    """Under which addresses the worker is known to somebody who asks now."""
    client = await runtime.endpoint(ENDPOINT).client()
    return [each.addresses for each in client.candidates.table.instances]


async def until_listed(asks: DistributedRuntime, wanted: list[tuple[str, ...]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await listed(asks) != wanted:
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def plain_file(path: Path) -> Iterator[None]:
    path.unlink()
    path.write_text("precious")
    yield
    assert path.read_text() == "precious"
    path.unlink()


@contextlib.contextmanager
def another_worker(path: Path) -> Iterator[None]:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        number = path.stat().st_ino
        yield
        assert path.stat().st_ino == number
    path.unlink()


@contextlib.contextmanager
def file_for_folder(path: Path) -> Iterator[None]:
    shutil.rmtree(path.parent)
    path.parent.write_text("precious")
    yield
    path.parent.unlink()


IN_ITS_PLACE = [plain_file, another_worker, file_for_folder]


@pytest.mark.parametrize("instead", IN_ITS_PLACE)
async def test_a_record_is_taken_back_while_its_socket_cannot_be_there(
    world: World, instead: Callable[[Path], contextlib.AbstractContextManager[None]], caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = world.directory.glob(FILES["socket"])
    async with world.runtime() as asks:
        with instead(path):
            await until_listed(asks, [])
            assert list(world.directory.glob(FILES["record"])) == []
            await world.the_session_goes_on()
            await looks()
            assert await listed(asks) == []
        await until_listed(asks, [(f"unix://{path}",)])
    await world.all_is_well()
    assert caplog.text.count("no client can connect to") == 1


async def test_the_other_addresses_stay_listed(trd_dir: Path, quick: None) -> None:
    first, second = trd_dir / "a" / "first.sock", trd_dir / "b" / "second.sock"
    for each in (first, second):
        each.parent.mkdir()
    listen = f"unix://{first},unix://{second},tcp://127.0.0.1:0"
    async with started(trd_dir / "above" / "trd", listen=listen) as world, world.runtime() as asks:
        (everything,) = await listed(asks)
        with plain_file(first):
            await until_listed(asks, [everything[1:]])
            await world.a_new_client_is_answered()
            with another_worker(second):
                await until_listed(asks, [everything[2:]])
                await world.a_new_client_is_answered()
        await until_listed(asks, [everything])
        await world.all_is_well()


async def test_another_name_of_a_socket_goes_with_it(trd_dir: Path, quick: None) -> None:
    """A container publishes the path under which others have mounted its folder."""
    path = trd_dir / "w.sock"
    (trd_dir / "seen").symlink_to(".")
    seen = f"unix://{trd_dir}/seen/w.sock"
    settings = {"listen": f"unix://{path}", "advertise": seen}
    async with started(trd_dir / "above" / "trd", **settings) as world, world.runtime() as asks:
        assert await listed(asks) == [(seen,)]
        with plain_file(path):
            await until_listed(asks, [])
        await until_listed(asks, [(seen,)])
        await world.all_is_well()


@pytest.mark.parametrize("harm", [delete, move])
@pytest.mark.parametrize("what", ["socket", "folder", "folder above"])
async def test_a_socket_of_the_users_own_comes_back_where_it_was(
    trd_dir: Path, quick: None, what: str, harm: Callable[[Path], None]
) -> None:
    folder = trd_dir / "run" / "app"
    folder.mkdir(parents=True)
    folder.chmod(0o2750)
    path = folder / "w.sock"
    async with started(trd_dir / "above" / "trd", listen=f"unix://{path}") as world:
        harm({"socket": path, "folder": folder, "folder above": folder.parent}[what])
        await world.all_is_well()
        assert folder.stat().st_mode & 0o7777 == 0o2750
        path.chmod(0o666)  # for a group that is to call it
        await looks()
        assert path.stat().st_mode & 0o777 == 0o666
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
async def test_a_folder_of_another_user_in_place_of_the_users_own_is_not_used(trd_dir: Path, quick: None) -> None:
    path = trd_dir / "app" / "w.sock"
    path.parent.mkdir()
    async with started(trd_dir / "above" / "trd", listen=f"unix://{path}") as world, world.runtime() as asks:
        delete(path.parent)
        path.parent.mkdir()
        os.chown(path.parent, USER, -1)
        await until_listed(asks, [])
        assert list(path.parent.iterdir()) == []
        path.parent.rmdir()
        await world.all_is_well()


# --- with other discoveries ------------------------------------------------------------------------------------------


async def test_with_etcd_the_socket_comes_back_and_its_address_goes_while_it_cannot(
    etcd: EtcdServer, trd_dir: Path, quick: None
) -> None:
    settings = {"discovery": "etcd", "etcd_endpoints": etcd.url, "events": "local"}
    async with started(trd_dir / "above" / "trd", **settings) as world, world.runtime() as asks:
        (both,) = await listed(asks)
        for harm in ("delete socket", "delete sockets", "delete the folder", "delete event socket"):
            HARMS[harm](world.directory)
            await world.all_is_well()
        (path,) = world.directory.glob(FILES["socket"])
        with plain_file(path):
            await until_listed(asks, [both[1:]])
        await until_listed(asks, [both])


async def test_with_static_discovery_the_socket_comes_back(trd_dir: Path, quick: None) -> None:
    path = trd_dir / "w.sock"
    settings = {"discovery": "static", "static": f"{ENDPOINT}=unix://{path}", "listen": f"unix://{path}"}
    async with started(trd_dir / "above" / "trd", events="local", **settings) as world:
        for harm in (delete, move):
            harm(path)
            await world.all_is_well()
        with plain_file(path):
            await looks()
            async with world.runtime() as asks:
                client = await asks.endpoint(ENDPOINT).client()
                with pytest.raises(ConnectionFailed):
                    await patiently(client.call(1))
        await world.all_is_well()


# --- what does not come back -----------------------------------------------------------------------------------------


async def test_a_paused_endpoint_stays_out_of_discovery(world: World) -> None:
    endpoint = world.worker.endpoint(ENDPOINT)
    await endpoint.pause()
    (path,) = world.directory.glob(FILES["socket"])
    for harm in (
        every("sockets", delete), every("instances", delete), every(".", delete), every("sockets/*.sock", delete)
    ):  # fmt: skip
        harm(world.directory)
        await until(path.exists)
        await looks()
        assert list(world.directory.glob(FILES["record"])) == []
    with plain_file(path):
        await looks()
        await endpoint.resume()  # it cannot be reached, so it is not listed
        assert list(world.directory.glob(FILES["record"])) == []
    await world.all_is_well()


async def test_a_worker_that_drains_does_not_come_back(trd_dir: Path, quick: None) -> None:
    running, go_on = asyncio.Event(), asyncio.Event()

    async def handler(request: object) -> object:
        running.set()
        await go_on.wait()
        return request

    cluster = Cluster(discovery="file", directory=trd_dir / "trd")
    worker = await cluster.worker(handler)
    client = await cluster.client()
    call = asyncio.ensure_future(client.call("last"))
    await patiently(running.wait())
    closing = asyncio.ensure_future(worker.close())
    await until(lambda: not list((trd_dir / "trd").glob(FILES["record"])))
    for folder in ("sockets", "instances", "."):
        delete((trd_dir / "trd" / folder).resolve())
        await looks()
        assert list((trd_dir / "trd").glob(FILES["record"])) == []  # Only `trd` finds it.
    go_on.set()
    assert await patiently(call) == "last"
    await patiently(closing)
    assert [each for each in (trd_dir / "trd").rglob("*") if not each.is_dir()] == []
    await cluster.close()


class SlowDiscovery(FileDiscovery):
    """Whose registrations and withdrawals wait until they are let go, as those of a distant server may."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.go = asyncio.Event()
        self.go.set()
        self.asked = asyncio.Event()

    async def register(self, instance):
        self.asked.set()
        await self.go.wait()
        await super().register(instance)


@pytest.mark.parametrize("leave", ["pause", "close"])
async def test_a_worker_that_leaves_while_it_is_listed_again_stays_away(trd_dir: Path, quick: None, leave: str) -> None:
    discovery = SlowDiscovery(trd_dir / "trd")
    worker = DistributedRuntime(config=Config(directory=trd_dir / "trd", handle_signals=False), discovery=discovery)
    endpoint = worker.endpoint(ENDPOINT)
    endpoint.serve_endpoint(lambda request: request)
    await until(lambda: list((trd_dir / "trd").glob(FILES["record"])))
    (path,) = (trd_dir / "trd").glob(FILES["socket"])
    with plain_file(path):
        await until(lambda: not list((trd_dir / "trd").glob(FILES["record"])))
        discovery.go.clear()
        discovery.asked.clear()
    await patiently(discovery.asked.wait())  # its socket is there, and it is being registered again
    leaving: Awaitable[None] = endpoint.pause() if leave == "pause" else worker.close()
    task = asyncio.ensure_future(leaving)
    await turns()
    discovery.go.set()
    await patiently(task)
    await looks()
    assert list((trd_dir / "trd").glob(FILES["record"])) == []
    await worker.close()


# --- processes, with the real times ----------------------------------------------------------------------------------

WORKER = """
import asyncio
from triton_distributed.runtime import triton_worker

async def echo(request):
    return request

@triton_worker()
async def main(runtime):
    serving = runtime.endpoint("t.c.e").serve_endpoint(echo)
    events = await runtime.namespace("t").component("c").subscribe("e")
    client = await runtime.endpoint("t.c.e").client()
    await client.wait_for_instances()
    print("ready", flush=True)
    while not serving.done():
        hears = asyncio.ensure_future(events.get())
        await asyncio.wait([hears, serving], return_when=asyncio.FIRST_COMPLETED)
        if hears.done():
            print("heard", flush=True)
        hears.cancel()

asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_worker_process_is_reached_again_within_seconds(trd_dir: Path, tmp_path: Path) -> None:
    directory = trd_dir / "trd"
    async with program(tmp_path, WORKER, environment={"TRD_DIR": str(directory)}) as worker:
        assert await worker.line() == "ready"
        shutil.rmtree(directory)
        cluster = Cluster(discovery="file", directory=directory)
        try:
            client = await cluster.client("t.c.e")
            assert await patiently(client.call(1)) == 1
            heard = asyncio.ensure_future(worker.line())
            while not heard.done():
                await cluster.caller.namespace("t").component("c").publish("e", 1)
                await asyncio.wait([heard], timeout=0.05)
            assert heard.result() == "heard"
        finally:
            await cluster.close()

"""Unix sockets: private, found under long paths, swept when dead, and never taken from a living worker."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.timing import PATIENCE_S
from tests.transport.sessions import calling, numbers, serving
from triton_distributed.system import unix_sockets
from triton_distributed.system.unix_sockets import FRESH_S, LONGEST_PATH, SWEEP, sweep


def dead_socket(path: Path) -> Path:
    """What a killed worker leaves."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, unix_sockets.reachable(path) as name:
        sock.bind(name)
        sock.listen()
    return path


@pytest.mark.any_loop
async def test_a_socket_is_the_users_alone_and_goes_with_the_listener(trd_dir):
    path = trd_dir / "w.sock"
    async with serving(f"unix://{path}") as service, calling() as caller:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert os.listdir(trd_dir) == ["w.sock"]
        assert await numbers(await caller.call(service.address, b"count 3")) == [0, 1, 2]
        service.listener.close_listening()
        assert not path.exists()
        assert await numbers(await caller.call(service.address, b"count 3")) == [0, 1, 2]  # the session stays


@pytest.mark.any_loop
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reaches a path that is longer than a socket's address")
async def test_a_path_longer_than_an_address(trd_dir):
    folder = trd_dir / ("d" * 100) / ("e" * 100)
    folder.mkdir(parents=True)
    path = folder / "w.sock"
    assert len(os.fsencode(path)) > LONGEST_PATH
    async with serving(f"unix://{path}") as service, calling() as caller:
        assert await numbers(await caller.call(service.address, b"count 3")) == [0, 1, 2]
    assert not path.exists()


async def test_a_name_that_is_too_long_even_so(trd_dir):
    path = trd_dir / ("w" * 150)
    with pytest.raises(OSError, match="cannot listen on unix://.*too long"):
        async with serving(f"unix://{path}"):
            pass
    assert os.listdir(trd_dir) == []


async def test_a_folder_that_is_not_there(trd_dir):
    with pytest.raises(OSError, match="cannot listen on unix://.*/none/w.sock: .") as caught:
        async with serving(f"unix://{trd_dir}/none/w.sock"):
            pass
    assert caught.value.errno == errno.ENOENT


async def test_dead_sockets_of_workers_are_swept_and_nothing_else(trd_dir):
    dead = dead_socket(trd_dir / f"{7:016x}.sock")
    others = [dead_socket(trd_dir / name) for name in ("of-another-program", "other-program.sock")]
    plain = trd_dir / f"{8:016x}.sock"
    plain.write_text("no socket")
    fresh = dead_socket(trd_dir / ".1-1.sock")  # of a worker that is about to listen
    old = dead_socket(trd_dir / ".1-2.sock")
    os.utime(old, (time.time() - FRESH_S - 60,) * 2)
    async with serving(f"unix://{trd_dir}/alive.sock"):
        sweep(trd_dir)
        left = {each.name for each in trd_dir.iterdir()}
    for each in (*others, fresh):
        each.unlink()
    assert left == {"alive.sock", *(each.name for each in others), plain.name, fresh.name}
    assert dead.name not in left


def test_a_sweep_looks_at_so_many_and_never_raises(trd_dir):
    sweep(trd_dir / "none")
    for number in range(SWEEP + 5):
        dead_socket(trd_dir / f"{number:016x}.sock")
    sweep(trd_dir)
    assert len(os.listdir(trd_dir)) == 5
    sweep(trd_dir)
    assert os.listdir(trd_dir) == []


async def test_a_dead_socket_in_the_way_is_replaced(trd_dir):
    path = dead_socket(trd_dir / "w.sock")
    async with serving(f"unix://{path}") as service, calling() as caller:
        assert await numbers(await caller.call(service.address, b"count 1")) == [0]


async def test_a_living_worker_keeps_its_socket(trd_dir):
    path = trd_dir / "w.sock"
    async with serving(f"unix://{path}") as service, calling() as caller:
        with pytest.raises(OSError, match="another worker listens there") as caught:
            async with serving(f"unix://{path}"):
                pass
        assert caught.value.errno == errno.EADDRINUSE
        assert os.listdir(trd_dir) == ["w.sock"]
        assert await numbers(await caller.call(service.address, b"count 1")) == [0]


async def test_of_two_workers_that_start_on_one_path_at_a_moment_one_gets_it(trd_dir, monkeypatch):
    path = trd_dir / "w.sock"
    claimed: list[Any] = []
    chmod = os.chmod

    def another_is_faster(name, mode):
        chmod(name, mode)
        if not claimed:
            claimed.append(None)
            claimed[0] = unix_sockets.claim(path)

    monkeypatch.setattr(os, "chmod", another_is_faster)
    with pytest.raises(OSError, match="another worker listens there") as caught:
        unix_sockets.claim(path)
    assert caught.value.errno == errno.EADDRINUSE
    sock, inode = claimed[0]
    assert path.stat().st_ino == inode
    assert os.listdir(trd_dir) == ["w.sock"]
    assert not unix_sockets._is_dead(path)
    sock.close()
    path.unlink()


async def test_a_dead_socket_that_another_worker_has_replaced_meanwhile_is_left(trd_dir, monkeypatch):
    path = dead_socket(trd_dir / "w.sock")
    is_dead = unix_sockets._is_dead
    claimed: list[Any] = []

    def another_is_faster(name):
        answer = is_dead(name)
        if not claimed:
            claimed.append(None)
            claimed[0] = unix_sockets.claim(path)
        return answer

    monkeypatch.setattr(unix_sockets, "_is_dead", another_is_faster)
    with pytest.raises(OSError, match="another worker listens there"):
        unix_sockets.claim(path)
    sock, inode = claimed[0]
    assert path.stat().st_ino == inode
    assert os.listdir(trd_dir) == ["w.sock"]
    assert not is_dead(path)
    sock.close()
    path.unlink()


async def test_a_dead_socket_that_another_worker_removes_meanwhile_is_in_nobodys_way(trd_dir, monkeypatch):
    path = dead_socket(trd_dir / "w.sock")

    def another_is_faster(name):
        path.unlink(missing_ok=True)
        return False

    monkeypatch.setattr(unix_sockets, "_is_dead", another_is_faster)
    sock, inode = unix_sockets.claim(path)
    assert path.stat().st_ino == inode
    sock.close()
    path.unlink()


async def test_where_there_are_no_hard_links_a_socket_is_renamed(trd_dir, monkeypatch):
    def link(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    async with serving(f"unix://{trd_dir}/w.sock") as service, calling() as caller:
        assert await numbers(await caller.call(service.address, b"count 1")) == [0]
        assert os.listdir(trd_dir) == ["w.sock"]


async def test_a_file_in_the_way_is_left(trd_dir):
    path = trd_dir / "w.sock"
    path.write_text("precious")
    with pytest.raises(OSError, match="cannot listen on"):
        async with serving(f"unix://{path}"):
            pass
    assert path.read_text() == "precious"


async def test_closing_leaves_the_socket_of_a_successor(trd_dir):
    path = trd_dir / "w.sock"
    async with serving(f"unix://{path}") as first:
        path.unlink()
        async with serving(f"unix://{path}") as second, calling() as caller:
            first.listener.close()
            assert path.exists()
            assert await numbers(await caller.call(second.address, b"count 1")) == [0]


@pytest.mark.parametrize("name", ["none.sock", "file.sock", "dead.sock"])
async def test_what_cannot_be_reached(trd_dir, name):
    (trd_dir / "file.sock").write_text("no socket")
    dead = dead_socket(trd_dir / "dead.sock")
    with pytest.raises((FileNotFoundError, ConnectionRefusedError)):
        await unix_sockets.connect(asyncio.get_running_loop(), str(trd_dir / name), asyncio.Protocol())
    dead.unlink()


@pytest.mark.any_loop
async def test_a_connection_that_is_closed_as_soon_as_it_is_made_closes_its_descriptor_once(trd_dir):
    """Its number may belong to another file by the time the socket object is collected."""

    pipe: list[int] = []

    class Leaves(asyncio.Protocol):
        def connection_made(self, transport):
            transport.abort()
            pipe.extend(os.pipe())

    class Accepted(asyncio.Protocol):
        def connection_lost(self, error):
            gone.set()

    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    server, inode = await unix_sockets.listen(loop, trd_dir / "w.sock", Accepted)
    await unix_sockets.connect(loop, str(trd_dir / "w.sock"), Leaves())
    gc.collect()
    for each in pipe:
        os.close(each)  # fails if something has closed it
    await asyncio.wait_for(gone.wait(), PATIENCE_S)
    server.close()
    await server.wait_closed()
    unix_sockets.remove(trd_dir / "w.sock", inode)

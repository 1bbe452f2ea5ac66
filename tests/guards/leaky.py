"""Tests that leak, each in its own way; test_leaks.py runs them in a process of their own and looks at what is said."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

kept: list[object] = []  # what would otherwise be collected, and so be found as an unclosed resource instead


async def forever() -> None:
    await asyncio.Event().wait()


async def test_leaks_task():
    kept.append(asyncio.create_task(forever(), name="forgotten"))


@pytest.mark.any_loop
async def test_leaks_task_on():
    kept.append(asyncio.create_task(forever(), name="forgotten"))


def test_leaks_thread():
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="forgotten", daemon=True)
    thread.start()
    kept.append((thread, end))


def test_leaks_executor():
    pool = ThreadPoolExecutor(1, thread_name_prefix="pool")
    pool.submit(int).result()
    kept.append(pool)


def test_leaks_descriptor():
    kept.append(os.open(__file__, os.O_RDONLY))


def test_leaks_pipe():
    kept.append(os.pipe())


def test_leaks_listening_socket(tmp_path_factory):
    listening = socket.socket(socket.AF_INET)
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    kept.append(listening)


def test_leaks_unix_socket(trd_dir):
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(trd_dir / "s"))
    listening.listen()
    kept.append(listening)


def test_leaks_socket_file(trd_dir):
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(trd_dir / "stale"))


async def test_leaks_server():
    kept.append(await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0))


def test_leaks_child():
    kept.append(subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE))


def test_leaks_zombie():
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)


def test_leaks_unclosed_file():
    open(__file__)  # noqa: SIM115


def test_leaks_unclosed_socket_in_a_cycle():
    cycle: list[object] = [socket.socket()]
    cycle.append(cycle)


def test_leaks_coroutine():
    forever()  # type: ignore[unused-coroutine]


async def test_leaks_error():
    async def fails() -> None:
        raise LookupError("nobody asked")

    task = asyncio.create_task(fails())
    await asyncio.wait([task])


def test_leaks_unraisable():
    class Breaks:
        def __del__(self) -> None:
            raise LookupError("in a finaliser")

    Breaks()
    gc.collect()


# --- and these are fine


async def test_fine_task_that_ends_when_cancelled():
    asyncio.create_task(forever()).cancel()


@pytest.fixture
async def server():
    served = asyncio.create_task(forever())
    yield served
    served.cancel()
    await asyncio.wait([served])


@pytest.mark.any_loop
async def test_fine_task_of_an_async_fixture(server):
    assert not server.done()


@pytest.mark.any_loop
async def test_fine_connection():
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
    writer.write(b"hello\n")
    assert await reader.readline() == b"hello\n"
    writer.close()
    listening.close()
    await listening.wait_closed()


@pytest.mark.any_loop
async def test_fine_default_executor():
    assert await asyncio.to_thread(int) == 0


@pytest.mark.any_loop
async def test_fine_subprocess():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "print(5)", stdout=asyncio.subprocess.PIPE)
    assert (await process.communicate())[0] == b"5\n"


def test_fine_pool():
    with ThreadPoolExecutor(2) as pool:
        pool.submit(int).result()


def test_fine_child():
    subprocess.run([sys.executable, "-c", ""], check=True)


def test_fine_asyncio_run():
    asyncio.run(asyncio.sleep(0))


@pytest.mark.leaves("descriptors", reason="shows that a test may say so")
def test_fine_marked():
    kept.append(os.open(__file__, os.O_RDONLY))


@pytest.mark.leaves("descriptors")
def test_leaks_without_a_reason():
    pass


@pytest.fixture
async def endless():
    yield
    await forever()


async def stubborn() -> None:
    while True:
        try:
            await forever()
        except asyncio.CancelledError:
            pass


def time_is_over() -> None:
    """Do what the clock does when the time of the running test is over, without waiting for it."""
    again = signal.getitimer(signal.ITIMER_REAL)[1]
    signal.setitimer(signal.ITIMER_REAL, again, again)
    signal.raise_signal(signal.SIGALRM)


async def test_hangs_and_then_its_fixture(endless):
    kept.append(asyncio.create_task(stubborn()))
    await asyncio.sleep(0)
    time_is_over()


@pytest.mark.leaves("asyncio errors", reason="the loop logs what is raised in the callback")
async def test_hangs_and_is_told_so_in_a_callback():
    asyncio.get_running_loop().call_soon(time_is_over)
    await forever()


def test_hangs_no_more_when_it_is_reported():
    def interrupted(_: object) -> bool:
        time_is_over()
        return False

    __tracebackhide__ = interrupted  # pytest calls this while it writes the report
    raise LookupError("what the test says")


def test_hangs_no_more():
    pass

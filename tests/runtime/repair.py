"""A worker, a subscriber and their callers in one private folder, and what may be done to its files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from tests.leaks import descriptors
from tests.runtime.cluster import patiently, until
from tests.timing import PATIENCE_S
from triton_distributed.config import Config
from triton_distributed.errors import TritonError
from triton_distributed.runtime import DistributedRuntime

ENDPOINT = "t.c.e"
Harm = Callable[[Path], None]


async def echo(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for each in requests:
        yield each


class Sent:
    """The requests of a call, one at a time."""

    def __init__(self) -> None:
        self._next: asyncio.Queue[Any] = asyncio.Queue()

    def __aiter__(self) -> Sent:
        return self

    async def __anext__(self) -> Any:
        if (item := await self._next.get()) is None:
            raise StopAsyncIteration
        return item

    def send(self, item: Any) -> None:
        self._next.put_nowait(item)


class World:
    """What depends on the folder.

    Args:
        directory: the private folder.
        settings: of every runtime.
    """

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self._settings = {"directory": directory, "handle_signals": False, **settings}
        self._numbers = iter(range(1_000_000))
        self.worker = self.runtime()
        self.caller = self.runtime()

    def runtime(self) -> DistributedRuntime:
        return DistributedRuntime(config=Config(**self._settings))

    async def start(self) -> None:
        self.worker.endpoint(ENDPOINT).serve_endpoint(echo)
        self.heard = await self.worker.namespace("t").component("c").subscribe("happened")
        client = await self.caller.endpoint(ENDPOINT).client()
        await patiently(client.wait_for_instances())
        self._sent = Sent()
        self._stream = client.generate(self._sent, annotated=False)
        self._answers = aiter(self._stream)
        await self.the_session_goes_on()
        await self.an_event_arrives()
        self.files = self.listing()
        self.open = self.opened()

    async def close(self) -> None:
        for each in FOLDERS.values():  # nobody removes anything from a folder that is read-only
            with contextlib.suppress(FileNotFoundError):
                (self.directory / each).chmod(0o700)
        await self.caller.close()
        await self.worker.close()

    async def the_session_goes_on(self) -> None:
        """The call that was there before gets its answers, over the connection that it had."""
        number = next(self._numbers)
        self._sent.send(number)
        assert await patiently(anext(self._answers)) == number

    async def a_new_client_is_answered(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                await self.the_session_goes_on()
                async with self.runtime() as runtime:
                    try:
                        client = await runtime.endpoint(ENDPOINT).client()
                        async with asyncio.timeout(0.2):
                            await client.wait_for_instances()
                        sent = Sent()
                        sent.send("new")
                        sent.send(None)
                        assert [each async for each in client.generate(sent, annotated=False)] == ["new"]
                    except (TritonError, TimeoutError):
                        await asyncio.sleep(0.01)
                    else:
                        return

    async def an_event_arrives(self) -> None:
        """From a process that knows nothing yet."""
        number = next(self._numbers)
        async with self.runtime() as runtime, asyncio.timeout(PATIENCE_S):
            component = runtime.namespace("t").component("c")
            while True:
                try:
                    await component.publish("happened", number)
                    while (await self.heard.get(0.05)).data != number:
                        pass
                except TimeoutError:
                    continue
                except TritonError:
                    await asyncio.sleep(0.01)
                else:
                    return

    def listing(self) -> set[str]:
        """What lies in the folder, but for what was put aside."""
        found = [each for each in self.directory.rglob("*") if not each.is_dir()]
        return {str(each.relative_to(self.directory)) for each in found if "aside" not in str(each)}

    def opened(self) -> tuple[int, int]:
        """How many sockets listen and how many records are open in this process."""
        listening = records = 0
        for number, target in descriptors().items():
            records += target.removesuffix(" (deleted)").endswith(".json")
            if target.startswith("socket:"):
                with socket.socket(fileno=os.dup(number)) as copy:
                    listening += copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return listening, records

    async def all_is_well(self) -> None:
        """Within a bounded time everybody meets again, and nothing is there twice."""
        await self.a_new_client_is_answered()
        await self.an_event_arrives()
        await until(lambda: self.listing() == self.files)
        await until(lambda: self.opened() == self.open)
        await self.the_session_goes_on()


# --- harms: each takes the private folder ----------------------------------------------------------------------------

FILES = {
    "record": f"instances/{ENDPOINT}.*.json",
    "socket": "sockets/*.sock",
    "mark": "events/*.mark",
    "event socket": "events/*.sock",
}
FOLDERS = {
    "instances": "instances",
    "sockets": "sockets",
    "events": "events",
    "the folder": ".",
    "the folder above": "..",
}


def aside(path: Path) -> Path:
    """Where a file is put that is moved away."""
    return path.with_name(f"{path.name}.aside")


def delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def move(path: Path) -> None:
    os.rename(path, aside(path))


def move_and_back(path: Path) -> None:
    os.rename(path, aside(path))
    os.rename(aside(path), path)


def replace_by_another(path: Path) -> None:
    """By one of the same kind, as a copy made earlier would be: nobody locks it, nobody listens on it."""
    if path.is_dir():
        copy = path.with_name("copy")
        shutil.copytree(path, copy, copy_function=lambda *_: None, ignore=lambda *_: [])
        copy.chmod(0o700)
        shutil.rmtree(path)
        os.rename(copy, path)
    elif stat.S_ISSOCK(path.stat().st_mode):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
            dead.listen()
    else:
        copy = path.with_name(".copy")
        shutil.copy2(path, copy)
        os.rename(copy, path)


def garble(path: Path) -> None:
    path.write_text("nothing of ours")


def replace_by_garbage(path: Path) -> None:
    copy = path.with_name(".copy")
    copy.write_text("nothing of ours")
    os.rename(copy, path)


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def make_open(path: Path) -> None:
    path.chmod(0o755)


def take_rights(path: Path) -> None:
    path.chmod(0)


def make_read_only(path: Path) -> None:
    path.chmod(0o500 if path.is_dir() else 0o400)


def every(pattern: str, harm: Harm) -> Harm:
    def all_of_them(directory: Path) -> None:
        found = sorted(directory.glob(pattern)) if "*" in pattern else [(directory / pattern).resolve()]
        assert found, pattern
        for each in found:
            harm(each)

    return all_of_them


def one_by_one(directory: Path) -> None:
    """Every file, but no folder."""
    for each in [each for each in directory.rglob("*") if not each.is_dir()]:
        each.unlink()


def harms() -> Iterator[tuple[str, Harm]]:
    """What is done, in words, and the function that does it."""
    for what, pattern in FILES.items():
        for harm in (delete, move, move_and_back, replace_by_another, take_rights, make_read_only, make_open):
            yield f"{harm.__name__} {what}", every(pattern, harm)
    for harm in (garble, replace_by_garbage, replace_by_link):
        yield f"{harm.__name__} record", every(FILES["record"], harm)
    for what, pattern in FOLDERS.items():
        for harm in (delete, move, move_and_back, replace_by_another):
            yield f"{harm.__name__} {what}", every(pattern, harm)
    for what in ("instances", "sockets", "events"):
        yield f"make_open {what}", every(what, make_open)
    for what in ("instances", "sockets", "events", "the folder"):
        for harm in (take_rights, make_read_only):
            yield f"{harm.__name__} {what}", every(FOLDERS[what], harm)
    yield "delete every file", one_by_one

"""`--reload`: a changed file replaces the processes, and a broken one does not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import triton_distributed as trd
from tests.supervisor.supervised import supervised, written
from tests.timing import PATIENCE_S
from triton_distributed.config import Config
from triton_distributed.supervisor import reload
from triton_distributed.supervisor.replicas import Replicas
from triton_distributed.supervisor.supervisor import StartFailed, supervise

pytestmark = pytest.mark.usefixtures("trd_dir")

CODE = """
import triton_distributed as trd

@trd.serve("a.b.version")
async def version(request: object) -> str:
    return "{}"
"""


async def version() -> object:
    async with trd.connect() as here:
        return await asyncio.wait_for(here.call("a.b.version", None), PATIENCE_S)


async def test_a_change_replaces_the_processes_and_a_mistake_keeps_them(tmp_path: Path) -> None:
    written(tmp_path, CODE.format('first"  # not closed: (') + "(")
    (tmp_path / ".venv" / "lib").mkdir(parents=True)
    with supervised(tmp_path, "-m", "triton_distributed.cli.main", "serve", "worker", "--reload") as running:

        async def line(pattern: str) -> None:
            await asyncio.to_thread(running.line, pattern)

        # A program that does not start waits for its developer.
        await line(r".*replica 0: process \d+ ended with status 1; it starts again after a change of a file")
        written(tmp_path, CODE.format("second"))
        await line(r"changed: worker\.py: restarting 1 replica\(s\), one after the other")
        await line(r"restarted: 1 replica\(s\)")
        assert await version() == "second"

        # A syntax error starts nothing.
        pids = running.replicas()
        written(tmp_path, CODE.format("third") + "def\n")
        await line(
            r".*worker\.py cannot be compiled: line \d+: .*; the running processes continue until the file is corrected"
        )
        assert running.replicas() == pids
        # An exception ends the successor.
        written(tmp_path, CODE.format("third") + "raise RuntimeError('no')\n")
        await line(rf".*replica 0: its successor, process \d+, ended with status 1; process {pids[0]} goes on")
        assert await version() == "second"

        # Other files change nothing: the next line is about the file that counts.
        (tmp_path / ".venv" / "lib" / "a.py").touch()
        (tmp_path / "notes.txt").touch()
        before = len(running.lines)
        written(tmp_path, CODE.format("the fourth"))
        await line(r"changed: worker\.py: restarting .*")
        await line(r"restarted: 1 replica\(s\)")
        assert await version() == "the fourth"
        assert [each for each in running.lines[before:] if each.startswith("changed")] == [
            "changed: worker.py: restarting 1 replica(s), one after the other"
        ]
        await asyncio.to_thread(running.stop)


def test_without_the_package_that_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("triton_distributed.supervisor.supervisor.own_command", list)
    with pytest.raises(StartFailed, match=r"needs watchfiles: pip install 'triton-distributed\[cli\]'"):
        supervise(Replicas(1, reload=True), Config())


async def test_a_folder_that_cannot_be_watched(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        async for _ in reload.changes(tmp_path / "gone", asyncio.Event()):
            pass


def test_the_folder_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("raise RuntimeError('it is not imported')")
    (tmp_path / "single.py").touch()
    monkeypatch.chdir(tmp_path)
    assert reload.folder_of("package.module") == tmp_path / "package"
    assert reload.folder_of("single") == tmp_path
    assert reload.folder_of("nowhere_at_all") == tmp_path
    assert reload.folder_of("tests.supervisor") == Path(__file__).parents[1]


def test_which_files_are_broken(tmp_path: Path) -> None:
    sources = {
        "good.py": b"x = 1",
        "null.py": b"\0",
        "coding.py": b"# coding: none\n",
        "late.py": b"return",
        "c.pyx": b"(",
    }
    for name, source in sources.items():
        (tmp_path / name).write_bytes(source)
    found = reload.broken([tmp_path / "gone.py", *map(tmp_path.joinpath, sources)])
    assert {each.name for each in found} == {"null.py", "coding.py", "late.py"}
    assert found[tmp_path / "late.py"] == "line 1: 'return' outside function"


def test_files_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert reload.named([tmp_path / "a" / "b.py"]) == "a/b.py"
    assert reload.named([tmp_path / "a.py", tmp_path / "b.py", tmp_path / "c.py"]) == "a.py and 2 more"

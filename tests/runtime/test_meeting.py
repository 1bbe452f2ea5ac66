"""Workers and clients of one user on one host, whatever started them: they meet, or are told where the other is."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import patiently, until
from tests.runtime.programs import program
from triton_distributed import config as config_module
from triton_distributed.config import Config, usual_directories
from triton_distributed.discovery.file import elsewhere as elsewhere_module
from triton_distributed.discovery.file.elsewhere import Elsewhere
from triton_distributed.errors import NoInstances
from triton_distributed.names import EndpointName
from triton_distributed.runtime import DistributedRuntime

STRANGER = 12345  # a uid that is not ours
SPACE = f"meeting-{os.getpid()}"  # Another run of the tests at the same time must not be found.

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists all file locks")


def made(place: Path, mode: int = 0o700, owner: int | None = None) -> str:
    place.mkdir(mode=0o700)
    place.chmod(mode)
    if owner is not None and os.geteuid() == 0:
        os.chown(place, owner, -1)
    return str(place)


# What starts a process sets, in a folder of the test that stands for the machine.
STARTS: dict[str, Callable[[Path], dict[str, str]]] = {
    "a service": lambda place: {},
    "a login shell": lambda place: {"XDG_RUNTIME_DIR": made(place / "run")},
    "sudo": lambda place: {"XDG_RUNTIME_DIR": made(place / "theirs", owner=STRANGER)},
    "a runtime folder that is gone": lambda place: {"XDG_RUNTIME_DIR": str(place / "none")},
    "a session's TMPDIR": lambda place: {"TMPDIR": made(place / "session")},
    "another user's TMPDIR": lambda place: {"TMPDIR": made(place / "shared", 0o777, STRANGER)},
    "a TMPDIR that is gone": lambda place: {"TMPDIR": str(place / "nowhere")},
    "a relative TMPDIR": lambda place: {"TMPDIR": "."},
    "the same TMPDIR, said": lambda place: {"TMPDIR": str(place / "tmp")},
    "TRD_DIR": lambda place: {"TRD_DIR": str(place / "chosen")},
}
# Those that have a folder of their own by their user's wish; all others meet. Where the tests are not root's, nobody
# can give them a folder of another user.
APART = {"a session's TMPDIR", "TRD_DIR"} | (set() if os.geteuid() == 0 else {"another user's TMPDIR"})
ENVIRONMENT = ("XDG_RUNTIME_DIR", "TMPDIR", "TRD_DIR")


async def echo(request: Any) -> Any:
    return request


@contextmanager
def started_by(what: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for each in ENVIRONMENT:
            patch.delenv(each, raising=False)
        for name, value in STARTS[what](place).items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def place(trd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the machine: its `tmp` is what /tmp is."""
    monkeypatch.setattr(config_module, "TEMPORARY", made(trd_dir / "tmp", 0o1777))
    monkeypatch.setattr("triton_distributed.calling.candidates.SILENCE_S", 0.01)
    return trd_dir


@pytest.mark.parametrize(
    ("worker", "client"), [(a, b) for a, b in itertools.product(STARTS, STARTS) if a != b or a == "a service"]
)
async def test_they_meet_or_are_told(
    worker: str, client: str, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with started_by(worker, place, monkeypatch):
        serves = DistributedRuntime(config=Config.from_env(handle_signals=False))
        serving = serves.endpoint(f"{SPACE}.c.e").serve_endpoint(echo)
        local = await serves.endpoint(f"{SPACE}.c.e").client()
        await patiently(local.wait_for_instances())
    with started_by(client, place, monkeypatch):
        calls = DistributedRuntime(config=Config.from_env(handle_signals=False))
        found = await calls.endpoint(f"{SPACE}.c.e").client()
    try:
        if not {worker, client} & APART:
            assert await patiently(found.call("hello")) == "hello"
            return
        folder = str(serves.config.directory)
        if sys.platform != "linux":
            return
        with pytest.raises(NoInstances) as caught:
            await patiently(found.call("hello"))
        assert f"live instances are registered in {folder}: TRD_DIR={folder} looks there" in str(caught.value)
        waiting = found.wait_for_instances()
        await until(lambda: "no instance yet" in caplog.text)
        assert f"TRD_DIR={folder} looks there" in caplog.text
        waiting.cancel()
        assert "live instances are registered in" in calls.elsewhere(None)
    finally:
        await calls.close()
        await serves.close()
        assert serving.done()


@linux
async def test_who_waits_is_told_when_a_worker_starts_in_another_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("triton_distributed.calling.candidates.ELSEWHERE_S", 0.01)
    monkeypatch.setattr(elsewhere_module, "KEEP_S", 0.0)
    calls = DistributedRuntime(config=Config(directory=place / "one", handle_signals=False))
    serves = DistributedRuntime(config=Config(directory=place / "two", handle_signals=False))
    client = await calls.endpoint(f"{SPACE}.c.late").client()
    waiting = client.wait_for_instances()
    await until(lambda: "no instance yet" in caplog.text)
    assert "live instances" not in caplog.text
    serves.endpoint(f"{SPACE}.c.late").serve_endpoint(echo)
    await until(lambda: f"TRD_DIR={place / 'two'} looks there" in caplog.text)
    waiting.cancel()
    await calls.close()
    assert caplog.text.count("looks there") == 1
    await serves.close()


# --- which folder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", STARTS)
def test_the_folder(what: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"triton-distributed-{os.geteuid()}"
    with started_by(what, place, monkeypatch):
        found = Config.from_env().directory
        usual = usual_directories()
    assert place / "tmp" / name in usual
    if what == "TRD_DIR":
        assert found == place / "chosen"
    elif what == "a session's TMPDIR":
        assert found == place / "session" / name == usual[0]
    elif what not in APART:
        assert found == place / "tmp" / name


def test_two_users_never_share_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRD_DIR")
    mine = Config.from_env().directory
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    assert Config.from_env().directory != mine


# --- what can be found -----------------------------------------------------------------------------------------------

WORKER = f"""
import asyncio, sys
from triton_distributed.runtime import triton_worker

async def echo(request):
    return request

@triton_worker()
async def main(runtime):
    serving = runtime.endpoint("{SPACE}.c.e").serve_endpoint(echo)
    client = await runtime.endpoint("{SPACE}.c.e").client()
    await client.wait_for_instances()
    print("ready", flush=True)
    await serving

asyncio.run(main())
"""
NAME = EndpointName(SPACE, "c", "e")


@linux
@pytest.mark.parametrize("listen", ["", "tcp://127.0.0.1:0"])
async def test_a_worker_of_another_process_is_found_while_it_lives(place: Path, tmp_path: Path, listen: str) -> None:
    other = str(place / "other")
    async with program(tmp_path, WORKER, environment={"TRD_DIR": other, "TRD_LISTEN": listen}) as worker:
        assert await worker.line() == "ready"
        assert other in Elsewhere(str(place)).words(NAME)
        assert Elsewhere(str(place)).words(None)
        assert other not in Elsewhere(str(place)).words(EndpointName(SPACE, "c", "e2"))
        assert other not in Elsewhere(other).words(NAME)
        (place / "link").symlink_to(other)
        assert other not in Elsewhere(str(place / "link")).words(NAME)
    assert other not in Elsewhere(str(place)).words(NAME)


@linux
async def test_a_folder_that_only_its_process_can_see_is_named_so(place: Path, tmp_path: Path) -> None:
    """As with systemd's PrivateTmp=."""
    hidden = place / "private"
    hidden.mkdir()
    code = f"""
import os, subprocess, sys
try:
    os_unshare = __import__("ctypes").CDLL(None, use_errno=True).unshare
    assert os_unshare(0x00020000) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True, capture_output=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", {str(hidden)!r}], check=True, capture_output=True)
except Exception:
    print("unable", flush=True)
    sys.exit()
{WORKER}"""
    async with program(tmp_path, code, environment={"TRD_DIR": str(hidden / "trd")}) as worker:
        if (line := await worker.line()) == "unable":
            pytest.skip("no mount namespace can be had here")
        assert line == "ready"
        words = Elsewhere(str(hidden / "trd")).words(NAME)
        assert f"{hidden}/trd of process {worker.pid}, which has another file system there" in words


async def test_without_a_list_of_locks_the_usual_folders_are_looked_at(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(name: str, **options: Any) -> Any:
        raise FileNotFoundError(name)

    monkeypatch.setattr(elsewhere_module, "open", no_locks, raising=False)
    (usual,) = [each for each in usual_directories() if each.parent == place / "tmp"]
    serves = DistributedRuntime(config=Config(directory=usual, handle_signals=False))
    serves.endpoint(f"{SPACE}.c.e").serve_endpoint(echo)
    client = await serves.endpoint(f"{SPACE}.c.e").client()
    await patiently(client.wait_for_instances())
    assert str(usual) in Elsewhere(str(place)).words(NAME)
    assert Elsewhere(str(usual)).words(NAME) == ""
    await serves.close()
    assert Elsewhere(str(place)).words(NAME) == ""


@linux
async def test_a_program_that_calls_in_a_loop_looks_seldom(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    really = Elsewhere._look

    def look(self: Elsewhere) -> Any:
        looks.append(1)
        return really(self)

    monkeypatch.setattr(Elsewhere, "_look", look)
    monkeypatch.setattr(elsewhere_module, "KEEP_S", 3600.0)
    calls = DistributedRuntime(config=Config(directory=place / "empty", handle_signals=False))
    client = await calls.endpoint(f"{SPACE}.c.e").client()
    for _ in range(50):
        with pytest.raises(NoInstances):
            await patiently(client.call(1))
    assert len(looks) == 1
    await calls.close()

"""The leak checks find what they are for, name it, blame the right test, and let what is fine pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests import leaks
from tests.guards.tree import ROOT

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="descriptors are only looked at through /proc"
)


def run(folder: Path, which: str, scale: str) -> dict[str, str]:
    """What a run of leaky.py says about each of the chosen tests: "" where it passed, else the text of its error."""
    report = folder / f"{which}.xml"
    arguments = [f"--junitxml={report}", "-p", "no:cacheprovider", "-k", which, str(ROOT / "tests/guards/leaky.py")]
    environment = {**os.environ, "TRD_TEST_TIME_SCALE": scale}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert report.exists(), done.stdout + done.stderr
    cases: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        said = [child.get("message", "") + (child.text or "") for child in case if child.tag in ("error", "failure")]
        name = case.get("name", "")
        cases[name] = cases.get(name, "") + "\n".join(said)
    return cases


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(tmp_path_factory.mktemp("leaky"), "leaks", "0.1")  # no need to be patient: what leaks does not go away


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(tmp_path_factory.mktemp("leaky"), "fine", os.environ.get("TRD_TEST_TIME_SCALE", "1"))


@pytest.mark.parametrize(
    ("test", "words"),
    [
        ("task", ["tasks pending", "task 'forgotten' of forever at", "leaky.py", "await asyncio.Event().wait()"]),
        ("task_on[asyncio]", ["task 'forgotten'"]),
        ("task_on[uvloop]", ["task 'forgotten'"]),
        ("thread", ["thread 'forgotten' (daemon) at", "wait"]),
        ("executor", ["thread 'pool_0' at"]),
        ("descriptor", ["fd ", "leaky.py"]),
        ("pipe", ["pipe:["]),
        ("listening_socket", ["listening AF_INET socket ('127.0.0.1', "]),
        ("unix_socket", ["listening AF_UNIX socket /", "socket files behind: s"]),
        ("socket_file", ["socket files behind: stale"]),
        ("server", ["AF_INET"]),
        ("child", ["process ", ", running: ", "sys.stdin.read()"]),
        ("zombie", ["ended but never waited for"]),
        ("unclosed_file", ["ResourceWarning", "leaky.py"]),
        ("unclosed_socket_in_a_cycle", ["unclosed <socket"]),
        ("coroutine", ["coroutine 'forever' was never awaited"]),
        ("error", ["Task exception was never retrieved", "LookupError: nobody asked"]),
        ("unraisable", ["LookupError: in a finaliser"]),
        ("without_a_reason", ["and a reason="]),
    ],
)
def test_a_leak_fails_the_test_that_made_it(leaky: dict[str, str], test: str, words: list[str]):
    said = leaky[f"test_leaks_{test}"]
    assert said, f"nothing was found; all: {leaky}"
    assert [word for word in words if word not in said] == [], said


def test_every_leak_is_looked_for_here(leaky: dict[str, str]):
    looked_for = test_a_leak_fails_the_test_that_made_it.pytestmark[0].args[1]
    assert {f"test_leaks_{name}" for name, _ in looked_for} == set(leaky)


def test_what_is_fine_passes(fine: dict[str, str]):
    assert len(fine) >= 10
    assert {name: said for name, said in fine.items() if said} == {}


def test_children_are_found_without_proc():
    before = leaks.children()  # servers that tests share
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        assert child.pid in leaks._children_by_ps()
        assert child.pid in leaks.children()
        assert child.stdin is not None
        child.stdin.close()
    assert leaks.children() == before


def test_what_hangs_again_or_did_not_hear_that_its_time_is_over_does_not_stop_the_run(tmp_path: Path):
    said = run(tmp_path, "hangs", "0.005")
    assert "Timeout (>" in said["test_hangs_and_then_its_fixture"]
    assert "still hangs" in said["test_hangs_and_then_its_fixture"]
    assert "Timeout (>" in said["test_hangs_and_is_told_so_in_a_callback"]
    assert "LookupError: what the test says" in said["test_hangs_no_more_when_it_is_reported"]
    assert said["test_hangs_no_more"] == ""

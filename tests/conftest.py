"""Fixtures of every test: leak checks, the loops, a private folder for discovery."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import triton_distributed
from tests.marks import allowed
from tests.warm import warm
from tools import compiled
from triton_distributed import is_compiled

ROOT = Path(__file__).resolve().parent.parent

pytest_plugins = [
    "tests.leaks",
    "tests.limits",
    "tests.loops",
    "tests.order",
    "tests.repeats",
    "tests.servers",
    "tests.words",
]

# The profiles of Hypothesis: how many examples a property gets in `make unit`, in `make test`, and once a week. There is no
# limit of time for an example, since that says more about the machine than about the code.
for profile, examples in {"unit": 20, "test": 50, "weekly": 1000}.items():
    settings.register_profile(
        profile, max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
settings.load_profile("test")  # `pytest --hypothesis-profile=unit` loads another one later

# A Unix socket's path has at most 107 bytes on Linux and 103 on macOS, whose own temporary folder takes half of them.
SHORT = "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()


def pytest_report_header() -> str:
    return f"triton_distributed: {'compiled' if is_compiled() else 'pure Python'}"


def pytest_configure() -> None:
    """Refuse to test a build that was compiled from other sources than those in src/."""
    if (
        signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    ):  # Under `nohup`, the programs of the tests would ignore it too.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    found = Path(triton_distributed.__file__).parent
    if next((ROOT / "src").rglob("*.so"), None) is not None:
        raise pytest.UsageError(
            "compiled files in src/ hide the sources: delete them; `make compiled` builds elsewhere"
        )
    if found.parent == compiled.TREE and not compiled.is_current():
        raise pytest.UsageError(f"{found} was compiled from other sources: `make compiled` renews it")


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """In a fresh clone, have each of pytest-xdist's workers compile its share of the files before all of them read all."""
    worker = getattr(session.config, "workerinput", None)
    if worker is None or session.config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    for path in files[int(worker["workerid"].removeprefix("gw")) :: worker["workercount"]]:
        with contextlib.suppress(Exception, pytest.skip.Exception):  # Its collection reports it.
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


@pytest.fixture(scope="session", autouse=True)
def neutral_environment() -> Iterator[None]:
    """Take the developer's own settings away, and give tests that ask for no folder one that is not the user's."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in a script's background, as our programs would be
        signal.signal(signal.SIGINT, signal.default_int_handler)
    private = tempfile.mkdtemp(prefix="trd-all-", dir=SHORT)
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if (
                name.startswith(("TRD_", "ETCD_", "NATS_"))
                and not name.startswith("TRD_TEST_")
                and not name.endswith("_BIN")
            ):
                patch.delenv(name)
        patch.setenv("TRD_DIR", private)
        patch.setenv(
            "OMP_WAIT_POLICY", "passive"
        )  # llama.cpp's threads spin while they wait, also on cores that others need
        yield
        warm.close()
    shutil.rmtree(private)


@pytest.fixture
def trd_dir(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short private folder for file discovery and Unix sockets, in TRD_DIR for this process and those it starts.

    A socket file that is still there at the end fails the test.
    """
    folder = Path(tempfile.mkdtemp(prefix="trd-", dir=SHORT))
    monkeypatch.setenv("TRD_DIR", str(folder))
    yield folder
    left = [str(each.relative_to(folder)) for each in folder.rglob("*") if stat.S_ISSOCK(each.lstat().st_mode)]
    shutil.rmtree(folder)
    if left and not allowed(request.node, "socket files"):
        pytest.fail(f"the test left socket files behind: {', '.join(sorted(left))}", pytrace=False)

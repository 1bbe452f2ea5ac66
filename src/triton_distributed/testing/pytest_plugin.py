"""The plugin of pytest: the fixtures `trd`, `trd_sync` and `trd_fake`, and the marker `virtual_time`.

pytest loads this file in each of its runs. `testing` imports what it names when a test uses it for the first time.
"""

from __future__ import annotations

import inspect
import os
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import pytest

from triton_distributed import testing

if TYPE_CHECKING:
    from triton_distributed.testing import Fake, LocalConnection, LocalNetwork, LocalSyncConnection, VirtualTimeLoop

SCOPES: tuple[Literal["function", "class", "module", "package", "session"], ...]
SCOPES = ("function", "class", "module", "package", "session")
MARKER = "virtual_time"
HOLDER = "triton_distributed_asyncio"
GRACE_S = 2.0  # A test that leaves nothing never waits.
_failed = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "virtual_time(seed=0): run an asynchronous test on a loop that moves its clock forward instead of waiting; "
        "see triton_distributed.testing.run_in_virtual_time",
    )
    if config.pluginmanager.has_plugin("asyncio"):
        import pytest_asyncio  # It is loaded already.

        holder = ModuleType(HOLDER)  # pytest takes fixtures from modules.
        try:
            for scope in SCOPES:
                made = pytest_asyncio.fixture(_new_fixture(), loop_scope=scope, name=_on_asyncio(scope))
                setattr(holder, _on_asyncio(scope), made)
        except TypeError:  # This version is too old. Only a test that uses the fixture has to know.
            return
        config.pluginmanager.register(holder, HOLDER)


def _on_asyncio(scope: str) -> str:
    return f"_trd_on_{scope}_loop"


def _new_fixture() -> Callable[..., AsyncIterator[LocalConnection]]:
    """A new function for a fixture: pytest-asyncio marks the function itself."""

    async def connection(request: pytest.FixtureRequest, _trd_network: LocalNetwork) -> AsyncIterator[LocalConnection]:
        async with _trd_network.first() as made:
            yield made
            await _trd_network.end(_grace_s(request))

    return connection


_trd_on_anyio = pytest.fixture(_new_fixture(), name="_trd_on_anyio")


@pytest.fixture
def _trd_network(request: pytest.FixtureRequest) -> Iterator[LocalNetwork]:
    """The network of one test."""
    folder = _new_folder() if "trd_sync" in request.fixturenames else None
    network = testing.LocalNetwork(folder, _loop_scope(request))
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in network.variables().items():
                patch.setenv(name, value)
            network.begin()
            yield network
            left = network.finish()
            if left and not _has_failed(request):
                pytest.fail(str(testing.LeftOver(left)), pytrace=False)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _has_failed(request: pytest.FixtureRequest) -> bool:
    return bool(request.node.stash.get(_failed, False))


def _grace_s(request: pytest.FixtureRequest) -> float:
    """Seconds for handlers to end. What a failed test has left says nothing."""
    return 0.0 if _has_failed(request) else GRACE_S


def _new_folder() -> Path:
    # The path of a Unix socket has about 100 bytes at most, and those of pytest's own folders are often longer.
    short = "/tmp" if os.access("/tmp", os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="trd-", dir=short))


@pytest.fixture
def trd(request: pytest.FixtureRequest, _trd_network: LocalNetwork) -> LocalConnection:
    """A connection for an `async def` test, on a network of its own: `await trd.serve(…)`, `await trd.call(…)`.

    Needs pytest-asyncio or the plugin of anyio. The test fails if it leaves a handler, a call, a task or a thread.
    """
    if not _is_async(request.function) and "trd" in inspect.signature(request.function).parameters:
        pytest.fail(f"{request.node.name} is a plain function: use the fixture `trd_sync`", pytrace=False)
    if "anyio_backend" in request.fixturenames:
        if request.getfixturevalue("anyio_backend_name") != "asyncio":
            pytest.fail("the fixture `trd` needs asyncio: let anyio_backend return 'asyncio'", pytrace=False)
        found = request.getfixturevalue("_trd_on_anyio")
    elif request.config.pluginmanager.has_plugin(HOLDER):
        found = request.getfixturevalue(_on_asyncio(_loop_scope(request)))
    else:
        pytest.fail(
            "the fixture `trd` needs an event loop: pip install 'triton-distributed[pytest]', which brings "
            "pytest-asyncio 1.5, or mark the test with pytest.mark.anyio; `trd_sync` needs none",
            pytrace=False,
        )
    return found  # type: ignore[no-any-return]


def _is_async(test: Any) -> bool:
    """Whether a test is an `async def`, perhaps decorated by Hypothesis."""
    return inspect.iscoroutinefunction(getattr(getattr(test, "hypothesis", None), "inner_test", test))


def _loop_scope(request: pytest.FixtureRequest) -> str:
    """The scope of the event loop of a test."""
    marker = request.node.get_closest_marker("asyncio")
    if marker is not None and (scope := marker.kwargs.get("loop_scope") or marker.kwargs.get("scope")):
        return str(scope)
    if request.config.pluginmanager.has_plugin(HOLDER):
        return str(request.config.getini("asyncio_default_test_loop_scope"))
    return "function"


@pytest.fixture
def trd_sync(request: pytest.FixtureRequest, _trd_network: LocalNetwork) -> Iterator[LocalSyncConnection]:
    """A connection for a plain test: `trd_sync.serve(…)`, `trd_sync.call(…)`. `connect` reaches it from any loop.

    The test fails if it leaves a handler, a call, a task or a thread.
    """
    if request.node.get_closest_marker(MARKER):
        pytest.fail("trd_sync waits in real time: use the fixture `trd` with virtual_time", pytrace=False)
    if _trd_network.directory is None:
        pytest.fail("request trd_sync as an argument, so that pytest knows it before the test begins", pytrace=False)
    with testing.LocalSyncConnection.first(_trd_network, lambda: _grace_s(request)) as made:
        yield made


@pytest.fixture
def trd_fake(_trd_network: LocalNetwork) -> Fake:
    """Answers of endpoints without a worker: `trd_fake[EMBED].returns(answer)`. Each `connect` uses them.

    The test fails if an endpoint is called that is neither faked nor served by `trd` or `trd_sync`.
    """
    return _trd_network.faked()


# virtual time


@pytest.hookimpl(wrapper=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> Iterator[None]:
    marker = metafunc.definition.get_closest_marker(MARKER)
    if marker is None:
        return (yield)
    if not _is_async(metafunc.function):
        pytest.fail(f"{metafunc.definition.nodeid}: virtual_time needs an `async def` test", pytrace=False)
    seed = marker.kwargs.get("seed", 0)

    def make() -> VirtualTimeLoop:
        return testing.VirtualTimeLoop(seed)

    if "anyio_backend" in metafunc.fixturenames:
        metafunc.parametrize("anyio_backend", [("asyncio", {"loop_factory": make})], ids=[pytest.HIDDEN_PARAM])
        return (yield)
    manager = metafunc.config.pluginmanager
    if not manager.has_plugin("asyncio"):
        pytest.fail("virtual_time needs pytest-asyncio, or the mark pytest.mark.anyio at the test", pytrace=False)
    loops = _VirtualLoops(make)
    manager.register(loops)  # Only while this test is generated: it would decide for all others, too.
    try:
        return (yield)
    finally:
        manager.unregister(loops)


class _VirtualLoops:
    """A plugin that gives a test its loop."""

    def __init__(self, make: Any) -> None:
        self._make = make

    @pytest.hookimpl(tryfirst=True)
    def pytest_asyncio_loop_factories(self) -> dict[str, Any]:
        return {MARKER: self._make}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Seed the module `random` for a test in virtual time."""
    marker = item.get_closest_marker(MARKER)
    if marker is None:
        return (yield)
    state = random.getstate()
    random.seed(marker.kwargs.get("seed", 0))
    try:
        return (yield)
    finally:
        random.setstate(state)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.excinfo is not None and "_trd_network" in getattr(item, "fixturenames", ()):
        item.stash[_failed] = True
    return report

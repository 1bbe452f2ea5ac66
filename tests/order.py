"""In which order pytest-xdist's workers get the tests, so that none of them is left alone with a long one at the end.

The tests of a file run in one worker, as with pytest-xdist's own `--dist loadfile`. But the files that take longest come first,
and where the tests of such a file share nothing, each is handed out alone.
"""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

#: The files that take longest, the longest first; `pytest --durations=60` tells. Those marked True are handed out test by test.
FIRST = {
    "tests/guards/test_readme.py": True,
    "tests/benchmarks/test_instructions.py": False,
    "tests/typing/test_typing.py": False,
    "tests/harness/test_soak.py": True,
    "tests/harness/test_simulated.py": True,
    "tests/hosts/test_deployed_models.py": False,
    "tests/supervisor/test_replicas.py": True,
    "tests/harness/test_phases.py": True,
    "tests/events/test_nats.py": True,
    "tests/harness/test_chaos.py": True,
    "tests/llm/test_llamacpp.py": False,
    "tests/testing/test_pytest_plugin.py": False,
    "tests/hosts/test_half_open.py": False,
    "tests/hosts/test_discovered.py": False,
    "tests/hosts/test_control_plane.py": False,
    "tests/hosts/test_deployed.py": False,
    "tests/api/test_sync_processes.py": False,
    "tests/benchmarks/test_foreign.py": False,
    "tests/benchmarks/test_runner.py": False,
    "tests/supervisor/test_replacement.py": False,
    "tests/llm/test_serve.py": False,
    "tests/llm/test_long_prompts.py": False,
    "tests/runtime/test_cancellation.py": False,
    "tests/runtime/test_self_repair.py": False,
    "tests/runtime/test_cleanup.py": False,
    "tests/runtime/test_first_process.py": False,
    "tests/hostile/test_floods.py": False,
    "tests/cli/test_serve.py": False,
    "tests/examples/test_language_model.py": False,
    "tests/supervisor/test_reload.py": False,
    "tests/supervisor/test_page.py": False,
    "tests/benchmarks/test_plots.py": False,
    "tests/transport/test_host_loss.py": False,
    "tests/runtime/test_silence.py": False,
    "tests/runtime/test_backpressure.py": False,
}


def rank(nodeid: str) -> int:
    """The place of a test's file in `FIRST`; all other files come after those."""
    return _RANKS.get(nodeid.partition("::")[0], len(FIRST))


_RANKS = {name: place for place, name in enumerate(FIRST)}


class LongestFirst(LoadFileScheduling):  # type: ignore[misc]  # it has no types
    """pytest-xdist's scheduling by file, with some files divided. The order is that of the collection."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return nodeid if FIRST.get(file) else file


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: rank(item.nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return LongestFirst(config, log)

"""Repeats a test that is known to be noisy, once, and never in silence.

`@pytest.mark.noisy(reason="…")` is for a test whose result depends on what else the machine does, and that cannot be written in
another way. Where it fails it runs once more, and the second run decides. The end of the output counts the repetitions and
names each with its reason and the first failure.
"""

from __future__ import annotations

import pytest
from _pytest.runner import runtestprotocol

from tests.leaks import failed

REPEATED = "repeated"  # a property of a report: pytest-xdist hands those to the process that prints
REPEATS = pytest.StashKey[list[str]]()


def _reason(item: pytest.Item) -> str:
    """Why the test is marked as noisy; "" if it is not, or if the mark does not say why."""
    mark = item.get_closest_marker("noisy")
    return str(mark.kwargs.get("reason", "")) if mark is not None else ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("noisy") and not _reason(item):
        pytest.fail(f"{item.nodeid}: noisy(…) takes a reason=", pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    reason = _reason(item)
    if not reason:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    if first := next((each for each in reports if each.failed), None):
        item.stash[failed] = False
        item._initrequest()  # type: ignore[attr-defined]  # its fixtures are made anew
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        words = str(first.longrepr).strip().splitlines() or ["no words"]
        reports[0].user_properties.append((REPEATED, f"{item.nodeid}: {reason}\n  {first.when}: {words[-1]}"))
    for each in reports:
        item.ihook.pytest_runtest_logreport(report=each)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPEATS] = []
    config.pluginmanager.register(_Collects(config.stash[REPEATS]), "repeats")


class _Collects:
    """Gathers the repetitions in the process that prints, with the workers of pytest-xdist or without."""

    def __init__(self, repeats: list[str]) -> None:
        self._repeats = repeats

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "setup":
            self._repeats += [str(value) for name, value in report.user_properties if name == REPEATED]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    repeats = terminalreporter.config.stash[REPEATS]
    if repeats:
        terminalreporter.section(f"repeated, as they are known to be noisy: {len(repeats)}")
        for each in repeats:
            terminalreporter.write_line(each)
    else:
        terminalreporter.write_line("no test was repeated")

"""The pages for operators name what exists: commands and options of `trd`, settings, metrics, texts of the log."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tests.deploy.files import OURS, SETTINGS
from tests.deploy.metrics import documented
from tests.guards.tree import ROOT, SRC
from triton_distributed.cli.arguments import Parser
from triton_distributed.cli.main import COMMANDS

PAGES = [ROOT / "docs" / name for name in ("operate.md", "runbooks.md", "stall.md")]
LOGGED = (
    "was lost with",
    "the event loop is",
    "stuck at",
    "held up at",
    "It moves, encodes or decodes much data",
    "and may have held the interpreter",
    "requests of this process wait for each other",
)


def quoted(page: Path) -> list[str]:
    """What stands between backticks, outside of blocks."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_and_metrics_exist(page: Path) -> None:
    words = [word for each in quoted(page) for word in re.findall(r"\w+", each)]
    assert [each for each in words if OURS.match(each) and each not in SETTINGS] == []
    assert [each for each in words if each.startswith("triton_") and each not in documented()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_their_options_exist(page: Path) -> None:
    for each in quoted(page):
        if found := re.match(r"trd (\w+)", each):
            assert found[1] in COMMANDS, each
            parser = Parser(prog="trd")
            importlib.import_module(f"triton_distributed.cli.{found[1]}").configure(parser)
            assert [option for option in re.findall(r"--[\w-]+", each) if option not in parser.format_help()] == []


def test_texts_of_the_log_are_those_that_are_logged() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (SRC / "triton_distributed").rglob("*.py"))
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [each for each in LOGGED if each not in pages or each not in source] == []

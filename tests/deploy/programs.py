"""What the command lines under `deploy/` would do, found out without doing it."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Sequence

import uvicorn

from tests.guards.tree import ROOT
from triton_distributed.cli.arguments import Parser
from triton_distributed.cli.main import COMMANDS
from triton_distributed.config import Config


def check(command: Sequence[str]) -> None:
    """Hold a command line to what `trd` and this project's folder have.

    Raises:
        AssertionError: it could not be run in our image.
    """
    program, *arguments = command
    if program == "python":
        script = arguments[0]
        assert script.startswith("examples/"), f"the image holds examples/ beside the package, not {script}"
        assert (ROOT / script).is_file(), f"there is no {script}"
        return
    if program == "uvicorn":
        folder = next(each.partition("=")[2] for each in arguments if each.startswith("--app-dir="))
        module, _, name = arguments[0].partition(":")
        assert f"\n{name} = " in (ROOT / folder / f"{module}.py").read_text(encoding="utf-8")
        options = uvicorn.main.make_context("uvicorn", arguments).params
        assert options["timeout_graceful_shutdown"], "it would wait for its streams for ever"
        return
    assert program.rpartition("/")[2] == "trd", f"{shlex.join(command)}: none of python, uvicorn and trd"
    name, *rest = arguments
    assert name in COMMANDS, f"trd has no command {name}"
    parser = Parser(prog=f"trd {name}")
    importlib.import_module(f"triton_distributed.cli.{name}").configure(parser)
    try:
        parser.parse_args(rest)
    except SystemExit as end:
        raise AssertionError(f"trd refuses: {shlex.join(command)}") from end


def settings(environment: dict[str, str]) -> Config:
    """The settings that a program with this environment has.

    Raises:
        ConfigError: it has none, because one cannot be used.
    """
    return Config.from_env(environment)

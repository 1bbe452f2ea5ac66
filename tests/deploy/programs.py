"""What the command lines under `deploy/` would do, found out without doing it."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Sequence

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
    assert program.rpartition("/")[2] == "trd", f"{shlex.join(command)}: neither python nor trd"
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

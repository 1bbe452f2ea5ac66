"""Builds the compiled wheel: with `TRD_COMPILE=1`, mypyc compiles the modules in `[tool.mypyc]` of pyproject.toml.

Without it this file does nothing, and the package builds without a compiler. The .py files are in each wheel.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

from setuptools import setup

PROJECT: dict[str, Any] = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))

WORK = Path("build/mypyc").resolve()


def options() -> dict[str, Any]:
    """Return the arguments of `setup` for a compiled build."""
    if {"editable_wheel", "develop"} & set(sys.argv):
        sys.exit("error: TRD_COMPILE=1: an editable install runs the sources; `make compiled` builds next to them")
    extras = PROJECT["project"]["optional-dependencies"]
    # The types of msgspec decide what is compiled, so it is needed as mypy is.
    needed = [
        each for each in PROJECT["project"]["dependencies"] + extras["dev"] if each.startswith(("msgspec", "mypy"))
    ]
    if not {"build", "build_ext", "bdist_wheel"} & set(sys.argv):  # setuptools asks for metadata only
        return {"setup_requires": needed}
    from mypyc.build import mypycify

    # Not the settings of `make check`: a build has only the packages above, so other imports are missing.
    flags = ["--config-file=", "--ignore-missing-imports", "--explicit-package-bases", f"--cache-dir={WORK / 'mypy'}"]
    files = [f"triton_distributed/{each}" for each in PROJECT["tool"]["mypyc"]["modules"]]
    level = os.environ.get("MYPYC_OPT_LEVEL", "3")
    with contextlib.chdir("src"):  # So that tracebacks name files as they lie in the folders of sys.path.
        compiled = mypycify(
            [*flags, *files],
            group_name="triton_distributed",
            opt_level=level,
            debug_level="0",
            target_dir=str(WORK),
        )
    return {"ext_modules": compiled}


setup(**(options() if os.environ.get("TRD_COMPILE") == "1" else {}))

"""`trd model VERB`: language models. One file for each verb."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

VERBS = {
    "serve": "serve a model by an engine",
    "ls": "list the models that are served",
    "run": "serve a model with a front end, in one command",
    "chat": "talk to a model in the terminal",
}

__all__: list[str] = []


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verbs with their arguments."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, text in VERBS.items():
        _module(name).configure(verbs.add_parser(name, help=text, description=text))


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    arguments.command = f"model {arguments.verb}"
    status: int = _module(arguments.verb).run(arguments)
    return status


def _module(name: str) -> Any:
    # A module `run` would replace the function `run` of this one.
    return importlib.import_module(f"triton_distributed.cli.model.{'together' if name == 'run' else name}")

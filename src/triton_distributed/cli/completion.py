"""`trd completion SHELL`: the script that lets a shell complete `trd` commands; and what the arguments complete to."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from triton_distributed.cli.failure import Failure
from triton_distributed.cli.instances import listed
from triton_distributed.config import Config
from triton_distributed.errors import TritonError
from triton_distributed.names import INSPECT, Instance
from triton_distributed.runtime.backends import make_discovery

EPILOG = """\
bash, in ~/.bashrc:                     eval "$(trd completion bash)"
zsh, in ~/.zshrc, after compinit:       eval "$(trd completion zsh)"
fish, in ~/.config/fish/config.fish:    trd completion fish | source

Commands, options, endpoints, instances, requests and modules are completed.
Endpoints come from the discovery that the TRD_* settings of the shell name.
"""

T = TypeVar("T")

PATIENCE_S = 1.0
"""Seconds that a completion may take. After them nothing is completed, because the user waits at the keyboard."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "fish"), help="bash, zsh or fish")


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    if importlib.util.find_spec("argcomplete") is None:
        raise Failure("completion needs argcomplete: pip install 'triton-distributed[cli]'")
    from argcomplete.shell_integration import shellcode

    print(shellcode(["trd"], shell=arguments.shell))
    return 0


def completes(action: argparse.Action, function: Callable[..., list[str]]) -> None:
    """Let an argument be completed by a function, which argcomplete calls with `prefix=` and `parsed_args=`."""
    action.completer = function  # type: ignore[attr-defined]  # argcomplete looks for this attribute.


def endpoint_names(**_: Any) -> list[str]:
    """The endpoints that are served."""
    return sorted({str(each.endpoint) for each in _instances()})


def instance_ids(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """The instances of the endpoint that the command line names; of all endpoints if it names none."""
    endpoint = getattr(parsed_args, "endpoint", None)
    return sorted({str(each.id) for each in _instances() if endpoint in (None, each.endpoint)})


def endpoints_and_ids(**_: Any) -> list[str]:
    """The endpoints that are served, and their instances."""
    return sorted({text for each in _instances() for text in (str(each.endpoint), str(each.id))})


def modules(prefix: str, **_: Any) -> list[str]:
    """The modules and packages of the current folder, or of the package that is typed already."""
    package, dot = prefix.rpartition(".")[:2]
    try:
        found = list(Path(*package.split(".")).iterdir())
    except OSError:
        return []
    names = [path.stem for path in found if path.suffix == ".py" or (path / "__init__.py").is_file()]
    return sorted(package + dot + name for name in names if name.isidentifier() and name != "__init__")


def _instances() -> list[Instance]:
    """The listed instances."""
    return [each for each in quietly(_listed()) if each.endpoint != INSPECT]


def quietly(work: Coroutine[Any, Any, list[T]]) -> list[T]:
    """What the work finds. That is nothing if discovery does not answer in time or a setting is invalid."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # The user is typing a command.
    try:
        return asyncio.run(work)
    except (TritonError, OSError):  # A TimeoutError is an OSError.
        return []
    finally:
        logging.disable(before)


async def _listed() -> list[Instance]:
    async with asyncio.timeout(PATIENCE_S):
        discovery = make_discovery(Config.from_env())
        try:
            return await listed(discovery)
        finally:
            await discovery.close()

"""The engine of a command line: its class by name, made with the options of the command line."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

from triton_distributed.cli.failure import FAILED, USAGE, Failure, one_line
from triton_distributed.llm.contract.engine import Engine
from triton_distributed.llm.contract.errors import InvalidParameter

_ROOM = "triton_distributed.llm.engines"

ENGINES = {
    "mock": f"{_ROOM}.mock.engine:MockEngine",
    "llamacpp": f"{_ROOM}.llamacpp:LlamaCppEngine",
    "openai": f"{_ROOM}.openai:OpenAIEngine",
    "transformers": f"{_ROOM}.transformers:TransformersEngine",
    "vllm": f"{_ROOM}.vllm:VllmEngine",
    "sglang": f"{_ROOM}.sglang:SglangEngine",
}
"""The engines that have a name, as `module:Class`."""

MODEL_PARAMETERS = ("path", "model", "name")
"""The first of these that an engine's class takes gets the model of the command line."""


def make_engine(engine: str, model: str, options: Mapping[str, str], processes: int = 1) -> tuple[Engine, bool]:
    """Make the engine of a command line. It is not started.

    Args:
        engine: a name of `ENGINES`, or `module:Class`. The current directory is searched first.
        model: the model of the command line: a name, or the path of a file.
        options: further keyword arguments of the class, all text.
        processes: how many of them make this engine. The option `threads` of an engine of `ENGINES` then is by default
            the share of the cores.

    Returns:
        the engine, and whether its class took the model.

    Raises:
        Failure: there is no such class, or it does not take these options.
    """
    made = _class(engine)
    try:
        taken = inspect.signature(made).parameters
    except (TypeError, ValueError):
        taken = {}  # type: ignore[assignment]
    keyword = next((each for each in MODEL_PARAMETERS if each in taken), "")
    if keyword and keyword in options:
        raise Failure(f"--option {keyword}=…: the model {model!r} is already given before the options", USAGE)
    named: dict[str, Any] = {keyword: model} if keyword else {}
    open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())
    for name in options:
        if name not in taken and not open_ended:
            known = ", ".join(each for each in taken if each != keyword) or "none"
            text = f"{_shown(name)}=…: the engine {engine} has no such option; its options: {known}"
            raise Failure(text, USAGE)
    for name, parameter in taken.items():
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.KEYWORD_ONLY,
            parameter.POSITIONAL_OR_KEYWORD,
        )
        if required and name not in named and name not in options:
            raise Failure(f"the engine {engine} needs --option {name}=…", USAGE)
    if processes > 1 and engine in ENGINES and "threads" in taken:
        named.setdefault("threads", max(1, _cores() // processes))
    try:
        return made(**{**named, **options}), bool(keyword)
    except InvalidParameter as error:
        raise Failure(f"{_shown(error.param)}: {one_line(error.reason)}", USAGE) from error
    except (TypeError, ValueError) as error:
        given = "".join(f" --option {name}={value}" for name, value in options.items())
        text = f"the engine {engine} cannot be made{' with' if given else ''}{given}: {one_line(error)}"
        raise Failure(text, USAGE if given else FAILED) from error
    except (OSError, ImportError) as error:
        raise Failure(f"the engine {engine} cannot be made: {error}", lines=True) from error


def _shown(option: str) -> str:
    """An option of the engine as a user gives it; `role` is also the option `--role` of the command."""
    return option if option == "role" else f"--option {option}"


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _class(engine: str) -> type[Engine]:
    place = ENGINES.get(engine, engine)
    module, mark, name = place.partition(":")
    if not mark or not all(each.isidentifier() for each in [*module.split("."), name]):
        raise Failure(f"--engine {engine!r}: give module:Class, or one of: {', '.join(ENGINES)}", USAGE)
    if place is engine and sys.path[:1] != [os.getcwd()]:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise Failure(f"the engine {engine} cannot be imported: {one_line(error)}") from error
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise Failure(f"--engine {engine}: {module} has no subclass {name} of triton_distributed.llm.Engine", USAGE)
    return found

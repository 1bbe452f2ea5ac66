"""The routing policies of models on the command line."""

from __future__ import annotations

import importlib
from typing import Any

from triton_distributed.cli.failure import USAGE, Failure
from triton_distributed.cli.target import Target

KNOWN = "kv, kv_linear, prefix_hash, session, least_loaded, p2c, round_robin, random, or MODULE:FUNCTION"


def policy_of(option: str, text: str) -> Any:
    """A policy's name, or the user's own.

    Args:
        option: the option that names it, for errors.
        text: its value.

    Raises:
        Failure: there is no such policy, or the user's own cannot be imported.
    """
    if ":" in text:
        target = Target(text)
        return target.handler(target.load())
    if text not in importlib.import_module("triton_distributed.llm.routing.policies.named").POLICY_NAMES:
        raise Failure(f"{option} {text!r}: give one of {KNOWN}", USAGE)
    return text

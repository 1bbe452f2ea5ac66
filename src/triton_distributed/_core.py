"""The runtime's classes under a module name that some programs import; see `triton_distributed.runtime`.

`KvMetricsPublisher` and `KvRouter` of `triton_distributed.llm` are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from triton_distributed.runtime import (
    Annotated,
    CancellationToken,
    Client,
    Component,
    Context,
    DistributedRuntime,
    Endpoint,
    Namespace,
    ResponseStream,
)

__all__ = [
    "Annotated",
    "CancellationToken",
    "Client",
    "Component",
    "Context",
    "DistributedRuntime",
    "Endpoint",
    "Namespace",
    "ResponseStream",
]


def __getattr__(name: str) -> Any:
    if name not in ("KvMetricsPublisher", "KvRouter"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("triton_distributed.llm"), name)

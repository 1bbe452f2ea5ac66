"""The exceptions of Dynamo's module `llm`. More of that module is in `triton_distributed.llm`."""

from __future__ import annotations

from typing import Any

from triton_distributed.compat.dynamo.llm.exceptions import (
    Cancelled,
    CannotConnect,
    ConnectionTimeout,
    Disconnected,
    DynamoException,
    EngineShutdown,
    HttpError,
    InvalidArgument,
    StreamIncomplete,
    Unknown,
    WorkerUnavailable,
)

__all__ = [
    "Cancelled",
    "CannotConnect",
    "ConnectionTimeout",
    "Disconnected",
    "DynamoException",
    "EngineShutdown",
    "HttpError",
    "InvalidArgument",
    "StreamIncomplete",
    "Unknown",
    "WorkerUnavailable",
]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(
        f"{name}: `triton_distributed.llm` serves models and routes by cache, with names of its own and some of "
        "Dynamo's; docs/dynamo.md lists what moves"
    )

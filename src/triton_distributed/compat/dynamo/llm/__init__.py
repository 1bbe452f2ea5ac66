"""The exceptions of Dynamo's module `llm`. Models, routers and the HTTP service are not in this runtime yet."""

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
        f"{name}: this runtime has no model cards, KV router, KV events or HTTP service yet; docs/dynamo.md lists what "
        "moves"
    )

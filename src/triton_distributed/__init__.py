"""A distributed runtime for Python machine-learning workloads: `import triton_distributed as trd`.

The names below are imported when they are first used, so that a program which needs only a part loads only that part.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton_distributed.api.batching import (
        Batched,
        BatchOptions,
        BatchStatistics,
        QueuePolicy,
        batched,
        batched_arrays,
    )
    from triton_distributed.api.connection import Connection, connect, here
    from triton_distributed.api.contracts import Bidirectional, Contract, ContractMismatch, Stream, Unary
    from triton_distributed.api.declarations import serve
    from triton_distributed.api.here import call, send, stream
    from triton_distributed.api.operating import health_check, route
    from triton_distributed.api.options import ServeOptions, StreamOptions, UnaryOptions
    from triton_distributed.api.running import run
    from triton_distributed.api.served import Served
    from triton_distributed.api.sharing import share
    from triton_distributed.api.sync import SyncConnection, connect_sync
    from triton_distributed.api.sync_items import SyncItemStream
    from triton_distributed.calling.item_stream import ItemStream
    from triton_distributed.compiled import is_compiled
    from triton_distributed.config import Config
    from triton_distributed.context import Context, current_context
    from triton_distributed.errors import (
        AlreadyServed,
        BrokerError,
        ConfigError,
        ConnectionFailed,
        DeadlineExceeded,
        DecodeError,
        DiscoveryError,
        Draining,
        ForkError,
        InstanceNotFound,
        InvalidName,
        InvalidRequest,
        LocalProtocolError,
        MessageTooLarge,
        NoInstances,
        NotServed,
        NotUnary,
        Overloaded,
        Paused,
        ProtocolError,
        RemoteCause,
        RemoteError,
        RemoteProtocolError,
        RequestIncomplete,
        RuntimeClosed,
        SenderClosed,
        StreamClosed,
        StreamIncomplete,
        SubscriptionClosed,
        TooFewInstances,
        TritonError,
        WrongLoop,
    )
    from triton_distributed.names import Instance
    from triton_distributed.observe.observer import CallObserver, Observer, RequestObserver
    from triton_distributed.observe.timing import Timing
    from triton_distributed.observe.traces import Traces
    from triton_distributed.runtime import Affinity, InstanceStatus, LoadBook, LogContext, ReportedLoad, log_requests
    from triton_distributed.serving.sender import Sender
    from triton_distributed.status.metrics import Metrics
    from triton_distributed.status.port import HttpError
    from triton_distributed.supervisor.replicas import Replicas

__version__ = "0.1.0"

_PLACES = {
    "api.batching": ("BatchOptions", "BatchStatistics", "Batched", "QueuePolicy", "batched", "batched_arrays"),
    "api.connection": ("Connection", "connect", "here"),
    "api.contracts": ("Bidirectional", "Contract", "ContractMismatch", "Stream", "Unary"),
    "api.declarations": ("serve",),
    "api.here": ("call", "send", "stream"),
    "api.operating": ("health_check", "route"),
    "api.options": ("ServeOptions", "StreamOptions", "UnaryOptions"),
    "api.running": ("run",),
    "api.served": ("Served",),
    "api.sharing": ("share",),
    "api.sync": ("SyncConnection", "connect_sync"),
    "api.sync_items": ("SyncItemStream",),
    "calling.item_stream": ("ItemStream",),
    "compiled": ("is_compiled",),
    "config": ("Config",),
    "context": ("Context", "current_context"),
    "errors": (
        "AlreadyServed",
        "BrokerError",
        "ConfigError",
        "ConnectionFailed",
        "DeadlineExceeded",
        "DecodeError",
        "DiscoveryError",
        "Draining",
        "ForkError",
        "InstanceNotFound",
        "InvalidName",
        "InvalidRequest",
        "LocalProtocolError",
        "MessageTooLarge",
        "NoInstances",
        "NotServed",
        "NotUnary",
        "Observer",
        "Overloaded",
        "Paused",
        "ProtocolError",
        "RemoteCause",
        "RemoteError",
        "RemoteProtocolError",
        "RequestIncomplete",
        "RequestObserver",
        "RuntimeClosed",
        "SenderClosed",
        "StreamClosed",
        "StreamIncomplete",
        "SubscriptionClosed",
        "TooFewInstances",
        "Traces",
        "TritonError",
        "WrongLoop",
    ),
    "names": ("Instance",),
    "observe.observer": ("CallObserver", "Observer", "RequestObserver"),
    "observe.timing": ("Timing",),
    "observe.traces": ("Traces",),
    "runtime": ("Affinity", "InstanceStatus", "LoadBook", "LogContext", "ReportedLoad", "log_requests"),
    "serving.sender": ("Sender",),
    "status.port": ("HttpError",),
    "status.metrics": ("Metrics",),
    "supervisor.replicas": ("Replicas",),
}
_PLACE = {name: f"{__name__}.{module}" for module, names in _PLACES.items() for name in names}

__all__ = [
    "Affinity",
    "AlreadyServed",
    "BatchOptions",
    "BatchStatistics",
    "Batched",
    "Bidirectional",
    "BrokerError",
    "CallObserver",
    "Config",
    "ConfigError",
    "Connection",
    "ConnectionFailed",
    "Context",
    "Contract",
    "ContractMismatch",
    "DeadlineExceeded",
    "DecodeError",
    "DiscoveryError",
    "Draining",
    "ForkError",
    "HttpError",
    "Instance",
    "InstanceNotFound",
    "InstanceStatus",
    "InvalidName",
    "InvalidRequest",
    "ItemStream",
    "LoadBook",
    "LocalProtocolError",
    "LogContext",
    "MessageTooLarge",
    "Metrics",
    "NoInstances",
    "NotServed",
    "NotUnary",
    "Observer",
    "Overloaded",
    "Paused",
    "ProtocolError",
    "QueuePolicy",
    "RemoteCause",
    "RemoteError",
    "RemoteProtocolError",
    "Replicas",
    "ReportedLoad",
    "RequestIncomplete",
    "RequestObserver",
    "RuntimeClosed",
    "Sender",
    "SenderClosed",
    "ServeOptions",
    "Served",
    "Stream",
    "StreamClosed",
    "StreamIncomplete",
    "StreamOptions",
    "SubscriptionClosed",
    "SyncConnection",
    "SyncItemStream",
    "Timing",
    "TooFewInstances",
    "Traces",
    "TritonError",
    "Unary",
    "UnaryOptions",
    "WrongLoop",
    "__version__",
    "batched",
    "batched_arrays",
    "call",
    "connect",
    "connect_sync",
    "current_context",
    "health_check",
    "here",
    "is_compiled",
    "log_requests",
    "route",
    "run",
    "send",
    "serve",
    "share",
    "stream",
]


def __getattr__(name: str) -> Any:
    place = _PLACE.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(f"{__name__}.system.first_process")  # Signals of process 1 are handled from the start on.
    importlib.import_module(f"{__name__}.supervisor.replica")  # A replica ends with its supervisor from the start on.
    found = globals()[name] = getattr(importlib.import_module(place), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""The names and the semantics of `dynamo.runtime` 1.6: its programs run here once their import lines are changed.

`from triton_distributed.compat.dynamo import DistributedRuntime, dynamo_worker, Context` replaces `from dynamo.runtime
import …`. The modules `runtime`, `runtime.logging`, `llm.exceptions` and `_core` below this one have the same names as
Dynamo's. docs/dynamo.md says what moves by itself, what differs, and what is not here yet.
"""

from triton_distributed.compat.dynamo.client import Client, Instance, RouterMode, TransportType
from triton_distributed.compat.dynamo.contexts import Context, ContextMetadata
from triton_distributed.compat.dynamo.decorators import (
    UnaryClient,
    dynamo_endpoint,
    dynamo_worker,
    serve_unary_endpoint,
)
from triton_distributed.compat.dynamo.endpoints import (
    Component,
    DistributedRuntime,
    Endpoint,
    Namespace,
    RuntimeMetrics,
)
from triton_distributed.compat.dynamo.handlers import PyAsyncRequestStream, ResponseSender
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
from triton_distributed.compat.dynamo.spans import SpanProxy
from triton_distributed.compat.dynamo.streams import Annotated, AsyncResponseStream

__all__ = [
    "Annotated",
    "AsyncResponseStream",
    "Cancelled",
    "CannotConnect",
    "Client",
    "Component",
    "ConnectionTimeout",
    "Context",
    "ContextMetadata",
    "Disconnected",
    "DistributedRuntime",
    "DynamoException",
    "Endpoint",
    "EngineShutdown",
    "HttpError",
    "Instance",
    "InvalidArgument",
    "Namespace",
    "PyAsyncRequestStream",
    "ResponseSender",
    "RouterMode",
    "RuntimeMetrics",
    "SpanProxy",
    "StreamIncomplete",
    "TransportType",
    "UnaryClient",
    "Unknown",
    "WorkerUnavailable",
    "dynamo_endpoint",
    "dynamo_worker",
    "serve_unary_endpoint",
]

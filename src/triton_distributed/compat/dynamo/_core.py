"""The same names under Dynamo's module `_core`, which some of its programs import from."""

from triton_distributed.compat.dynamo.client import Client, Instance, RouterMode, TransportType
from triton_distributed.compat.dynamo.contexts import Context, ContextMetadata, SpanProxy
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
from triton_distributed.compat.dynamo.exceptions import (
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
from triton_distributed.compat.dynamo.handlers import PyAsyncRequestStream, ResponseSender
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

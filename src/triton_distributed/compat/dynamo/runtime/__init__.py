"""The same names under Dynamo's module `runtime`."""

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
from triton_distributed.compat.dynamo.spans import SpanProxy
from triton_distributed.compat.dynamo.streams import Annotated, AsyncResponseStream

__all__ = [
    "Annotated",
    "AsyncResponseStream",
    "Client",
    "Component",
    "Context",
    "ContextMetadata",
    "DistributedRuntime",
    "Endpoint",
    "Instance",
    "Namespace",
    "PyAsyncRequestStream",
    "ResponseSender",
    "RouterMode",
    "RuntimeMetrics",
    "SpanProxy",
    "TransportType",
    "UnaryClient",
    "dynamo_endpoint",
    "dynamo_worker",
    "serve_unary_endpoint",
]

"""The names that programs import: `DistributedRuntime`, the decorators, and the types that calls return."""

# This import comes first because the others take a while, and a container may be stopped meanwhile.
import triton_distributed.system.first_process  # noqa: F401
from triton_distributed.annotated import Annotated
from triton_distributed.calling.response_stream import ResponseStream
from triton_distributed.context import Context, current_context
from triton_distributed.observe.log_context import LogContext, log_requests
from triton_distributed.routing.affinity import Affinity
from triton_distributed.routing.load import LoadBook, ReportedLoad
from triton_distributed.runtime.client import Client
from triton_distributed.runtime.component import Component, Endpoint, Namespace
from triton_distributed.runtime.decorators import triton_endpoint, triton_worker
from triton_distributed.runtime.distributed import DistributedRuntime
from triton_distributed.runtime.instances import InstanceStatus
from triton_distributed.runtime.requests import AwaitedCall, RequestReport
from triton_distributed.runtime.statistics import (
    CallStatistics,
    DiscoveryStatistics,
    EndpointStatistics,
    LoopStatistics,
    QueueStatistics,
    RuntimeStatistics,
    SessionStatistics,
    SubscriptionStatistics,
    ThreadStatistics,
)
from triton_distributed.runtime.token import CancellationToken
from triton_distributed.serving.sender import Sender
from triton_distributed.status.metrics import Metrics

__all__ = [
    "Affinity",
    "Annotated",
    "AwaitedCall",
    "CallStatistics",
    "CancellationToken",
    "Client",
    "Component",
    "Context",
    "DiscoveryStatistics",
    "DistributedRuntime",
    "Endpoint",
    "EndpointStatistics",
    "InstanceStatus",
    "LoadBook",
    "LogContext",
    "LoopStatistics",
    "Metrics",
    "Namespace",
    "QueueStatistics",
    "ReportedLoad",
    "RequestReport",
    "ResponseStream",
    "RuntimeStatistics",
    "Sender",
    "SessionStatistics",
    "SubscriptionStatistics",
    "ThreadStatistics",
    "current_context",
    "log_requests",
    "triton_endpoint",
    "triton_worker",
]

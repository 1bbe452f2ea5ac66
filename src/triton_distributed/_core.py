"""The runtime's classes under a module name that some programs import; see `triton_distributed.runtime`."""

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

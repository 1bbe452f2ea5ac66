"""Dynamic batching: a function that answers a list of requests serves an endpoint of single requests."""

from triton_distributed.api.batching.arrays import batched_arrays
from triton_distributed.api.batching.batcher import BatchStatistics
from triton_distributed.api.batching.decorator import Batched, BatchedMethod, Batching, BatchOptions, batched
from triton_distributed.api.batching.queue import QueuePolicy

__all__ = [
    "BatchOptions",
    "BatchStatistics",
    "Batched",
    "BatchedMethod",
    "Batching",
    "QueuePolicy",
    "batched",
    "batched_arrays",
]

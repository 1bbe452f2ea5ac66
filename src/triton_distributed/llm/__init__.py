"""Serve a language model: the engine contract, and what else programs import.

`Models`, `ServedModel`, `serve_model` and `ServingModel` are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from triton_distributed.llm.contract.cache import BlocksRemoved, BlocksStored, CacheCleared, CacheEvents
from triton_distributed.llm.contract.engine import Engine, EngineMetrics
from triton_distributed.llm.contract.errors import (
    AnswerLost,
    EngineDead,
    EngineStalled,
    InvalidParameter,
    LLMError,
    ModelConflict,
    ModelNotFound,
    NoWorkers,
    PrefillOnly,
    RouterClosed,
)
from triton_distributed.llm.contract.model import Model, ModelCard
from triton_distributed.llm.contract.output import Candidate, Embeddings, FinishReason, Output, TokenLogprob, Usage
from triton_distributed.llm.contract.request import EmbedRequest, Guide, Request, Sampling, packed, unpacked

if TYPE_CHECKING:
    from triton_distributed.llm.models.models import Models
    from triton_distributed.llm.models.served import ServedModel
    from triton_distributed.llm.original.hashes import compute_block_hash_for_seq, compute_block_hash_for_seq_py
    from triton_distributed.llm.original.indexers import ApproxKvIndexer, KvIndexer
    from triton_distributed.llm.original.publishers import KvEventPublisher, KvMetricsPublisher
    from triton_distributed.llm.original.radix_tree import OverlapScores, RadixTree
    from triton_distributed.llm.original.router import KvRouter
    from triton_distributed.llm.worker.serve import ServingModel, serve_model

# `original.clibrary` also lets `ctypes.CDLL` answer for the original's C library, where it is missing.
_PLACES = {
    "ApproxKvIndexer": "original.indexers",
    "KvEventPublisher": "original.clibrary",
    "KvIndexer": "original.indexers",
    "KvMetricsPublisher": "original.clibrary",
    "KvRouter": "original.clibrary",
    "Models": "models.models",
    "OverlapScores": "original.radix_tree",
    "RadixTree": "original.radix_tree",
    "ServedModel": "models.served",
    "ServingModel": "worker.serve",
    "compute_block_hash_for_seq": "original.hashes",
    "compute_block_hash_for_seq_py": "original.hashes",
    "serve_model": "worker.serve",
}

__all__ = [
    "AnswerLost",
    "ApproxKvIndexer",
    "BlocksRemoved",
    "BlocksStored",
    "CacheCleared",
    "CacheEvents",
    "Candidate",
    "EmbedRequest",
    "Embeddings",
    "Engine",
    "EngineDead",
    "EngineMetrics",
    "EngineStalled",
    "FinishReason",
    "Guide",
    "InvalidParameter",
    "KvEventPublisher",
    "KvIndexer",
    "KvMetricsPublisher",
    "KvRouter",
    "LLMError",
    "Model",
    "ModelCard",
    "ModelConflict",
    "ModelNotFound",
    "Models",
    "NoWorkers",
    "Output",
    "OverlapScores",
    "PrefillOnly",
    "RadixTree",
    "Request",
    "RouterClosed",
    "Sampling",
    "ServedModel",
    "ServingModel",
    "TokenLogprob",
    "Usage",
    "compute_block_hash_for_seq",
    "compute_block_hash_for_seq_py",
    "packed",
    "serve_model",
    "unpacked",
]


def __getattr__(name: str) -> Any:
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{place}"), name)
    return found

"""Serve a language model: the engine contract, and what else programs import.

`Models`, `ServedModel`, `serve_model` and `ServingModel` are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from triton_distributed.llm.contract.engine import Engine, EngineMetrics
from triton_distributed.llm.contract.errors import (
    AnswerLost,
    EngineStalled,
    InvalidParameter,
    LLMError,
    ModelConflict,
    ModelNotFound,
)
from triton_distributed.llm.contract.model import Model, ModelCard
from triton_distributed.llm.contract.output import Candidate, Embeddings, FinishReason, Output, TokenLogprob, Usage
from triton_distributed.llm.contract.request import EmbedRequest, Guide, Request, Sampling, packed, unpacked

if TYPE_CHECKING:
    from triton_distributed.llm.models.models import Models
    from triton_distributed.llm.models.served import ServedModel
    from triton_distributed.llm.worker.serve import ServingModel, serve_model

_PLACES = {
    "Models": "models.models",
    "ServedModel": "models.served",
    "ServingModel": "worker.serve",
    "serve_model": "worker.serve",
}

__all__ = [
    "AnswerLost",
    "Candidate",
    "EmbedRequest",
    "Embeddings",
    "Engine",
    "EngineMetrics",
    "EngineStalled",
    "FinishReason",
    "Guide",
    "InvalidParameter",
    "LLMError",
    "Model",
    "ModelCard",
    "ModelConflict",
    "ModelNotFound",
    "Models",
    "Output",
    "Request",
    "Sampling",
    "ServedModel",
    "ServingModel",
    "TokenLogprob",
    "Usage",
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

"""Serve a language model: the engine contract, and what else programs import. See docs/llm.md."""

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
    "Output",
    "Request",
    "Sampling",
    "TokenLogprob",
    "Usage",
    "packed",
    "unpacked",
]

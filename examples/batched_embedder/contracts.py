"""What the worker and the client share."""

from dataclasses import dataclass

import triton_distributed as trd


@dataclass
class EmbedRequest:
    text: str


@dataclass
class EmbedResponse:
    vector: list[float]
    batch_size: int


EMBED = trd.Unary[EmbedRequest, EmbedResponse]("examples.embedder.embed")

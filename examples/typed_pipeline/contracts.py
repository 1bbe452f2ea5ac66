"""What the three workers and the client of this pipeline share: names and types."""

from dataclasses import dataclass

import triton_distributed as trd


@dataclass
class Question:
    text: str


@dataclass
class Prompt:
    token_ids: list[int]


@dataclass
class Token:
    id: int


@dataclass
class Piece:
    text: str


ASK = trd.Stream[Question, Piece]("examples.pipeline.ask")
TOKENIZE = trd.Unary[Question, Prompt]("examples.pipeline.tokenize")
GENERATE = trd.Stream[Prompt, Token]("examples.pipeline.generate")

"""The endpoints, as the worker and the gateway share them."""

from dataclasses import dataclass

import triton_distributed as trd


@dataclass
class Prompt:
    text: str
    words: int = 5


@dataclass
class Token:
    text: str


@dataclass
class Count:
    words: int


COUNT = trd.Unary[Prompt, Count]("examples.gateway.count")
GENERATE = trd.Stream[Prompt, Token]("examples.gateway.generate")

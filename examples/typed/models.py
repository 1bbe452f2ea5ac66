"""The messages: two pydantic models, and two classes that need only the standard library and msgspec."""

from dataclasses import dataclass

import msgspec
from pydantic import BaseModel, Field


class Text(BaseModel):
    """Some text, and how many of its words are wanted."""

    text: str
    max_words: int = Field(default=3, ge=1)


class Word(BaseModel):
    """One word and its place."""

    place: int
    word: str


@dataclass
class Numbers:
    """Some numbers."""

    values: list[float]


class Summary(msgspec.Struct):
    """The summary of some numbers."""

    count: int
    mean: float

"""What is asked and what must come back: every item follows from its request and its place in the answer.

Workers and clients have this page in common and nothing else, so a wrong, missing, repeated or exchanged item shows.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WORK = "survival.fleet.work"
LIMITED = "survival.fleet.limited"  # with max_inflight and a queue


@dataclass(frozen=True)
class Kind:
    """One kind of request in the mix.

    Attributes:
        items: of the answer.
        pause_s: that the handler takes before each of them.
        tail_s: that it takes behind the last.
        every: each so-manieth item carries a token to go on behind it; 0 for none.
        options: of the call.
        unary: made by `client.call`, else by `client.generate`.
        once: its handler must not begin twice, so the call may end with StreamIncomplete where it may have begun.
    """

    name: str
    items: int = 1
    pause_s: float = 0.01
    tail_s: float = 0.0
    every: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    unary: bool = True
    once: bool = False

    def request(self, key: str) -> dict[str, Any]:
        """What is sent; `key` is this request's alone."""
        return {"key": key, "items": self.items, "pause_s": self.pause_s, "tail_s": self.tail_s, "every": self.every}


KINDS = {
    kind.name: kind
    for kind in (
        Kind("unary", once=True),
        Kind("idempotent", tail_s=0.005, options={"idempotent": True}),
        Kind("hedged", options={"idempotent": True, "hedge_after_s": 0.05}),
        Kind("stream", items=20, pause_s=0.005, unary=False, once=True),
        Kind("resumed", items=20, pause_s=0.005, every=4, options={"resume": True}, unary=False),
    )
}


def item(key: str, index: int) -> dict[str, Any]:
    """The item at this place of the answer to the request of this key."""
    return {"key": key, "index": index, "sum": zlib.crc32(f"{key}/{index}".encode())}


def wrong(key: str, items: Sequence[Any]) -> str:
    """What is wrong with the first items of an answer; empty where each is the one that belongs there."""
    for index, found in enumerate(items):
        if found != item(key, index):
            return f"item {index} of {key} is {found!r}"
    return ""


def kind_of(key: str) -> str:
    """The kind of the request that has this key."""
    return key.split("-")[1]

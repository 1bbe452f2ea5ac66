"""Calls without an event loop: what they return, and the slips that checkers must find."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, assert_type

import triton_distributed as trd

EMBED = trd.Unary[list[str], list[float]]("t.typing.embed")
GENERATE = trd.Stream[str, int]("t.typing.generate")
CHAT = trd.Bidirectional[str, int]("t.typing.chat")


def words() -> Iterator[str]:
    yield "a"


async def async_words() -> AsyncIterator[str]:
    yield "a"


def calls() -> None:
    with trd.connect_sync() as here:
        assert_type(here.call(EMBED, ["a"], timeout=2, policy="p2c", hedge_after_s=0.1, idempotent=True), list[float])
        assert_type(here.call("t.typing.embed", ["a"]), Any)
        assert_type(here.stream(GENERATE, "a", resume=True), trd.SyncItemStream[int])
        for token in here.stream(GENERATE, "a"):
            assert_type(token, int)
        with here.stream(CHAT, words()) as items:
            items.accepted()
            assert_type(next(items), int)
            assert_type(items.cancel(), bool)
        assert_type(here.stream(CHAT, ["a"]), trd.SyncItemStream[int])
        assert_type(here.stream("t.typing.generate", "a"), trd.SyncItemStream[Any])
        here.send(GENERATE, "a", priority=1)
        here.send("t.typing.generate", {"any": 1})
        here.wait_for_instances(EMBED, 3, timeout=5)


def slips(here: trd.SyncConnection) -> None:
    here.call(EMBED, ["a"], timout=2)  # refused: call-overload, reportCallIssue
    here.call(EMBED, 1)  # refused: misc, reportArgumentType
    here.call(GENERATE, "a")  # refused: call-overload, reportArgumentType
    here.stream(EMBED, ["a"])  # refused: call-overload, reportArgumentType
    here.stream(CHAT, async_words())  # refused: call-overload, reportArgumentType
    here.stream(GENERATE, "a", resumes=True)  # refused: call-overload, reportCallIssue
    print(here.call(EMBED, ["a"]).vectors)  # refused: attr-defined, reportAttributeAccessIssue
    here.stream(GENERATE, "a").acepted()  # refused: attr-defined, reportAttributeAccessIssue
    here.send(EMBED, ["a"], timeout="soon")  # refused: call-overload, reportArgumentType
    trd.connect_sync("config")  # refused: arg-type, reportArgumentType

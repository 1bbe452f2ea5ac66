"""Handlers that push their items with a `Sender`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_type

import triton_distributed as trd


@dataclass
class Prompt:
    text: str


@dataclass
class Token:
    id: int


GENERATE = trd.Stream[Prompt, Token]("typing.senders.generate")


@trd.serve(GENERATE)
async def pushes(request: Prompt) -> trd.Sender[Token]:
    sender = trd.Sender[Token](on_left=lambda: print("left"))
    sender.send(Token(1))
    assert_type(sender.try_send(Token(2)), bool)
    await sender.asend(Token(3))
    sender.send(3)  # refused: arg-type, reportArgumentType
    sender.sent(Token(1))  # refused: attr-defined, reportAttributeAccessIssue
    sender.close(ValueError("over"))
    return sender


class Service:
    @trd.serve(GENERATE, interrupt=False)
    async def pushes(self, request: Prompt, context: trd.Context) -> trd.Sender[Token]:
        return await pushes(request)


async def reads() -> None:
    async for token in await pushes(Prompt("a")):
        assert_type(token, Token)

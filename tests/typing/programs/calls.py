"""Calls through the original's face: what they return, and the slips that checkers must find."""

from __future__ import annotations

import asyncio
from typing import Any, assert_type

from triton_distributed.runtime import Annotated, Client, Context, ResponseStream


async def every_option(client: Client) -> None:
    client.generate(
        "a", True, policy="p2c", context=Context(id="a"), timeout=2, metadata={"user": "u"}, idempotent=True
    )
    client.round_robin("a", annotated=False, timeout=None, priority=5, resume=True)
    client.random(request="a", annotated=None, idempotent=True)
    client.direct("a", 5, False, priority=None)
    assert_type(await client.call("a", policy=None, hedge_after_s=0.1, idempotent=True, timeout=1.5), Any)


async def items(client: Client) -> None:
    async for item in client.generate("a"):
        assert_type(item, Annotated)
    assert_type(client.random("a"), ResponseStream[Annotated])
    assert_type(client.random("a", annotated=False), ResponseStream[Any])
    assert_type(await anext(client.direct("a", 1)), Annotated)
    stream = await client.round_robin("a")
    assert_type(stream, ResponseStream[Annotated])
    assert_type([each.data() async for each in stream], list[Any])
    alone: ResponseStream = client.generate("a", annotated=False)
    await alone.accepted()
    async with client.generate("a", annotated=False) as inside:
        assert_type(inside, ResponseStream[Any])


async def waiting(client: Client) -> None:
    assert_type(client.wait_for_instances(3, timeout=5), asyncio.Future[list[int]])
    assert_type(await client.wait_for_endpoints(), list[int])


async def slips(client: Client) -> None:
    client.generate("a", timout=3)  # refused: call-overload, reportCallIssue
    client.generate("a", timeout="3")  # refused: call-overload, reportArgumentType
    client.round_robin("a", idempotant=True)  # refused: call-overload, reportCallIssue
    client.round_robin("a", policy="random")  # refused: call-overload, reportCallIssue
    client.random("a", metadata=[1])  # refused: call-overload, reportArgumentType
    client.direct("a", annotated=False)  # refused: call-overload, reportCallIssue
    client.direct("a", "1")  # refused: call-overload, reportArgumentType
    client.generate("a", True, "p2c")  # refused: call-overload, reportCallIssue
    await client.call("a", tiemout=1)  # refused: call-arg, reportCallIssue
    await client.call("a", annotated=False)  # refused: call-arg, reportCallIssue
    await client.call("a", priority="high")  # refused: arg-type, reportArgumentType
    await client.call("a", context="req-1")  # refused: arg-type, reportArgumentType
    await client.call("a", hedge_after=0.1)  # refused: call-arg, reportCallIssue
    async for item in client.generate("a"):
        print(item["text"])  # refused: index, reportIndexIssue
    await client.wait_for_instances("3")  # refused: arg-type, reportArgumentType
    client.generate("a").acepted()  # refused: attr-defined, reportAttributeAccessIssue

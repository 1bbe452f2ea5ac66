"""HTTP apps: the types of answers, items and options follow from the contract."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import assert_type

from fastapi import FastAPI, Response
from starlette.applications import Starlette

import triton_distributed as trd
from triton_distributed import fastapi as trd_fastapi
from triton_distributed import starlette as trd_starlette


@dataclass
class Ask:
    text: str


@dataclass
class Token:
    text: str


@dataclass
class Other:
    number: int


ANSWER = trd.Unary[Ask, Token]("t.http.answer")
TOKENS = trd.Stream[Ask, Token]("t.http.tokens")


@asynccontextmanager
async def own(app: FastAPI) -> AsyncGenerator[None, None]:
    yield


app = FastAPI(lifespan=trd_fastapi.lifespan(own))
trd_fastapi.install(app, show_errors=True)
plain = Starlette(lifespan=trd_starlette.lifespan())
trd_starlette.install(plain)


@app.post("/answer")
async def answer(body: Ask, here: trd_fastapi.Here) -> Token:
    found = await here.call(ANSWER, body, timeout=2)
    assert_type(found, Token)
    return found


@app.post("/wrong")
async def wrong(body: Ask, here: trd_fastapi.Here) -> Other:
    await here.call(ANSWER, body, timout=2)  # refused: call-overload, reportCallIssue
    await here.call(ANSWER, Other(1))  # refused: misc, reportArgumentType
    return await here.call(ANSWER, body)  # refused: arg-type, reportReturnType


def event(token: Token) -> trd_fastapi.Event:
    return trd_fastapi.Event(token.text, event="token")


def other(item: Other) -> object:
    return item.number


@app.post("/tokens")
async def tokens(body: Ask, here: trd_fastapi.Here) -> Response:
    await trd_fastapi.sse(here.stream(TOKENS, body), event=other)  # refused: arg-type, reportArgumentType
    return await trd_fastapi.sse(here.stream(TOKENS, body), event=event, last="[DONE]", heartbeat_s=None)


@app.post("/lines")
async def lines(body: Ask) -> Response:
    return await trd_fastapi.ndjson(trd.stream(TOKENS, body))

"""`trd.run`: how it serves until the end of a drain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import triton_distributed as trd
from triton_distributed.api.declarations import Declaration, declaration_of
from triton_distributed.api.running import serve_until_drained


@trd.serve("a.b.first")
async def first(request: int) -> int:
    return request


@trd.serve("a.b.second")
async def second(request: int) -> int:
    return request


@pytest.mark.parametrize("before", [0, 1])
async def test_a_drain_may_begin_before_all_are_served(before: int, capsys: pytest.CaptureFixture[str]) -> None:
    here = trd.connect(trd.Config(discovery="memory"))

    def handlers() -> Iterator[tuple[Any, Declaration]]:
        for number, each in enumerate([first, second]):
            if number == before:
                here.runtime.shutdown()
            declared = declaration_of(each)
            assert declared is not None
            yield each, declared

    async with here:
        await serve_until_drained(here, handlers())
    assert capsys.readouterr().out.count("ready: ") == before

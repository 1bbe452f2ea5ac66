"""Declared handlers: functions and a method."""

from __future__ import annotations

from collections.abc import AsyncIterator

import triton_distributed as trd

DOUBLE = trd.Unary[int, int]("demo.declared.double")
COUNT = trd.Stream[int, int]("demo.declared.count")
ADD = trd.Unary[int, int]("demo.declared.add")


@trd.serve(DOUBLE, max_inflight=2, metadata={"of": "the decorator"})
def double(request: int) -> int:
    return 2 * request


@trd.serve(COUNT)
async def count(request: int) -> AsyncIterator[int]:
    for each in range(request):
        yield await trd.call(DOUBLE, each)


class Adder:
    def __init__(self) -> None:
        self.sum = 0

    @trd.serve(ADD)
    async def add(self, request: int) -> int:
        self.sum += request
        return self.sum


class Labelled:
    @trd.serve("demo.declared.labelled", metrics_labels={"le": "1"})
    async def labelled(self, request: int) -> int:
        return request


if __name__ == "__main__":
    trd.run()

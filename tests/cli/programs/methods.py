"""A class whose method is declared."""

import triton_distributed as trd


class Adder:
    @trd.serve("demo.methods.add")
    async def add(self, request: int) -> int:
        return request + 1

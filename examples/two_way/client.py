"""Guesses the server's number; each guess is sent after the answer to the previous guess has arrived.

    python examples/two_way/client.py

Start server.py in another shell.
"""

import asyncio
from collections.abc import AsyncIterator

from triton_distributed.runtime import DistributedRuntime, triton_worker


class Player:
    """Halves the remaining range with every guess."""

    def __init__(self) -> None:
        self.low, self.high, self.count = 1, 100, 0
        self.heard = asyncio.Event()

    @property
    def guess(self) -> int:
        return (self.low + self.high) // 2

    async def guesses(self) -> AsyncIterator[int]:
        while True:
            self.count += 1
            yield self.guess
            await self.heard.wait()
            self.heard.clear()

    def hear(self, answer: str) -> None:
        print(f"{self.guess}? {answer}")
        if answer == "higher":
            self.low = self.guess + 1
        elif answer == "lower":
            self.high = self.guess - 1
        self.heard.set()


@triton_worker()
async def worker(runtime: DistributedRuntime):
    client = await runtime.endpoint("examples.game.play").client()
    await client.wait_for_instances()

    player = Player()
    async for answer in client.generate(player.guesses(), annotated=False):
        player.hear(answer)
    print(f"{player.count} guesses")


if __name__ == "__main__":
    asyncio.run(worker())

"""Thinks of a number and answers guesses: requests and answers stream at the same time.

    python examples/two_way/server.py

Then run client.py in another shell.
"""

import random
from collections.abc import AsyncIterator

import uvloop

from triton_distributed.runtime import DistributedRuntime, triton_worker


class Game:
    """A request annotated as an async iterator is a stream of requests."""

    async def play(self, guesses: AsyncIterator[int]) -> AsyncIterator[str]:
        secret = random.randint(1, 100)
        async for guess in guesses:
            if guess == secret:
                yield "yes!"
                return
            yield "higher" if guess < secret else "lower"


@triton_worker()
async def worker(runtime: DistributedRuntime):
    await runtime.endpoint("examples.game.play").serve_endpoint(Game().play)


if __name__ == "__main__":
    uvloop.run(worker())

"""A worker with typed requests and answers, in a few lines.

    trd serve worker                              (in this folder; or: python examples/hello_native/worker.py)

Start it in one shell or in several: the client finds all workers.
"""

from collections.abc import AsyncIterator

import triton_distributed as trd

HELLO = trd.Stream[str, str]("examples.hello.generate")


@trd.serve(HELLO)
async def generate(text: str) -> AsyncIterator[str]:
    for word in text.split():
        yield word


if __name__ == "__main__":
    trd.run()

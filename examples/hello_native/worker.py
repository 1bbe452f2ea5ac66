"""A worker with typed requests and answers, in a few lines.

    trd serve worker                                  (in this folder)

Start it in one shell or in several: the client finds all workers.
"""

from collections.abc import Iterator

import triton_distributed as trd

HELLO = trd.Stream[str, str]("examples.hello.generate")


@trd.serve(HELLO)
def generate(text: str) -> Iterator[str]:
    yield from text.split()

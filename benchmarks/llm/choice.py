"""What the choice of a worker costs: CPU of one request, its keys included. The figures are in decision 9.

python -m benchmarks.llm.choice
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count

from triton_distributed.llm.routing.bookings import Booking
from triton_distributed.llm.routing.keys import block_keys
from triton_distributed.llm.routing.router import Router
from triton_distributed.llm.routing.view import Question
from triton_distributed.names import EndpointName, Instance

PROMPTS = 400
"""Different prompts, of which half share their first half with what a worker holds."""

ROUNDS = 5
"""Repetitions, of which the quickest counts: the others waited for memory that other programs use."""


class Requests:
    """Requests to one router.

    Args:
        tokens: of each prompt.
        workers: how many there are.
    """

    def __init__(self, tokens: int, workers: int) -> None:
        rng = random.Random(1)
        self.tokens = tokens
        self.prompts = [rng.randbytes(4 * tokens) for _ in range(PROMPTS)]
        self.router = Router.named("kv", rng)
        self.booked: deque[Booking] = deque()
        self.now = 0.0
        self._prompts = self._in_turn()
        known = [(number, 0) for number in range(1, workers + 1)]
        for worker in known:
            self.router.add(worker, Instance(EndpointName("b", "m", "generate"), worker[0], (f"memory://{worker[0]}",)))
        for at, prompt in enumerate(self.prompts[::2]):
            keys = block_keys(prompt, 64)
            self.router.index.store(known[at % workers], keys[: len(keys) // 2])

    def _in_turn(self) -> Iterator[bytes]:
        for at in count():
            yield self.prompts[at % PROMPTS]

    def ask(self) -> None:
        """Let a request come, and send what may leave."""
        self.now += 0.03
        keys = block_keys(next(self._prompts), 64)
        self.router.hold(Question(tokens=self.tokens, keys=keys, since=self.now))
        self._send()

    def end(self) -> None:
        """Let the request that was sent first have its first output, and end; send what may leave."""
        booking = self.booked.popleft()
        self.router.first_output(booking, self.now)
        self._send()
        booking.release()

    def _send(self) -> None:
        while (leaves := self.router.leaving(self.now)) is not None:
            self.booked.append(self.router.book(*leaves, self.now))

    def one(self) -> None:
        """A request from the beginning to the end."""
        self.ask()
        self.end()


def cpu_us(work: Callable[[], object], times: int) -> float:
    """Microseconds of CPU of one call."""
    found = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(times):
            work()
        found.append((time.process_time() - began) / times * 1e6)
    return min(found)


def main() -> int:
    """Measure, and print a table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| tokens | workers | keys alone, µs | goes on at once, µs | 100 are held, µs | 2,000 are held, µs |")
    print("|" + " ---: |" * 6)
    for tokens, workers in ((1_000, 8), (12_000, 1), (12_000, 8), (12_000, 64), (60_000, 8)):
        requests = Requests(tokens, workers)
        gc.collect()
        gc.freeze()
        columns = [cpu_us(partial(block_keys, requests.prompts[0], 64), 200)]
        columns.append(cpu_us(requests.one, 400))
        for held in (100, 2_000):
            while requests.router.held < held:
                requests.ask()
            columns.append(cpu_us(requests.one, 400))
        print(f"| {tokens:,} | {workers} | {' | '.join(f'{each:.0f}' for each in columns)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

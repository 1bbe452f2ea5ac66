"""What `python -m benchmarks.llm.index` lets each index do. It needs only the standard library: Dynamo's environment
has no more.
"""

from __future__ import annotations

import gc
import hashlib
import os
import random
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

WORKERS = 8
BLOCKS = 256
"""Of a prompt."""

HOT = 2_000
"""Look-ups of one prompt."""

ASKED = 1_000
"""Prompts that are looked up once each, for `cold` and for the comparison."""

EACH = 400
"""Prompts whose blocks are removed at once, as many in parts, and as many one by one."""

PART = 25
"""Blocks that leave together: what an engine evicts in one of its steps. Workers of both systems join these events."""

SHARED = (32, 32, 32, 32, 32, 32, 128, 256)
"""Blocks of one prompt that the workers hold, as of a conversation that begins as all do."""

STEPS = tuple(range(32, 257, 32))
CASES = 10_000
SEED = 1

Figures = dict[str, float]
Event = Any


class Index(Protocol):
    """An index under test. Its events have the form in which workers send them."""

    def stored(self, keys: Sequence[int]) -> Event:
        """Make the event for the blocks of a prompt."""

    def removed(self, keys: Sequence[int]) -> Event:
        """Make the event for blocks that are removed."""

    def apply(self, worker: int, event: Event) -> None:
        """Take an event."""

    def find(self, keys: list[int]) -> Any:
        """Look a prompt up."""

    def depths(self, found: Any) -> dict[int, int]:
        """Return what was found: how many blocks each worker holds."""

    def clear(self, worker: int) -> Iterator[None]:
        """Forget what a worker holds, in one or more steps."""


def resident() -> int:
    """Bytes of memory of this process."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def random_keys(rng: random.Random, count: int) -> array[int]:
    """Random keys of blocks."""
    found = array("Q")
    found.frombytes(rng.randbytes(8 * count))
    return found


def applied(apply: Callable[[int, Event], None], events: Sequence[tuple[int, Event]], blocks: int) -> Figures:
    """Apply events, and return the blocks a second of CPU."""
    began = time.process_time()
    for worker, event in events:
        apply(worker, event)
    return {"per_s": blocks / (time.process_time() - began)}


def looked_up(find: Callable[[list[int]], Any], prompts: Sequence[list[int]]) -> Figures:
    """Look prompts up, and return the median of the time, and the CPU of one."""
    times, clock = [], time.perf_counter
    began = time.process_time()
    for keys in prompts:
        begin = clock()
        find(keys)
        times.append(clock() - begin)
    cpu_s = time.process_time() - began
    return {"p50_us": statistics.median(times) * 1e6, "cpu_us": cpu_s / len(prompts) * 1e6}


def measured(index: Index, blocks: int) -> dict[str, Any]:
    """Let an index do everything.

    Args:
        index: is empty.
        blocks: to store.

    Returns:
        `figures` by workload, and `depths`: a digest of what many look-ups have found.
    """
    rng = random.Random(SEED)
    prompts = [random_keys(rng, BLOCKS) for _ in range(blocks // BLOCKS)]
    count = len(prompts) * BLOCKS
    figures: dict[str, Figures] = {}
    events = [(at % WORKERS, index.stored(keys)) for at, keys in enumerate(prompts)]
    before = resident()
    figures["store"] = applied(index.apply, events, count)
    figures["memory"] = {"entry_bytes": (resident() - before) / count}
    del events
    for name, depths in (("hot", SHARED), ("steps", STEPS)):
        keys = list(random_keys(rng, BLOCKS))
        for worker, depth in enumerate(depths):
            index.apply(worker, index.stored(keys[:depth]))
        assert index.depths(index.find(keys)) == dict(enumerate(depths))
        figures[name] = looked_up(index.find, [keys] * HOT)
    rng.shuffle(prompts)
    figures["cold"] = looked_up(index.find, [list(each) for each in prompts[:ASKED]])
    digest = hashlib.sha256()
    _note(index, rng, prompts, digest)
    # An event of one worker about blocks that only others hold would not be one.
    workers = [next(iter(index.depths(index.find(list(each))))) for each in prompts]
    gone = [(worker, keys[::-1]) for worker, keys in zip(workers, prompts[: 3 * EACH], strict=False)]
    for at, (name, size) in enumerate({"remove": BLOCKS, "remove parts": PART, "remove each": 1}.items()):
        removed = [
            (worker, index.removed(keys[first : first + size]))
            for worker, keys in gone[at * EACH : (at + 1) * EACH]
            for first in range(0, BLOCKS, size)
        ]
        figures[name] = applied(index.apply, removed, EACH * BLOCKS)
    _note(index, rng, prompts, digest)
    figures["clear"] = _cleared(index)
    _note(index, rng, prompts, digest)
    return {"figures": figures, "depths": digest.hexdigest()}


def _cleared(index: Index) -> Figures:
    longest_s = whole_s = 0.0
    steps = index.clear(0)
    while True:
        began = time.process_time()
        ended = next(steps, ...) is ...
        step_s = time.process_time() - began
        whole_s, longest_s = whole_s + step_s, max(longest_s, step_s)
        if ended:
            return {"cpu_ms": whole_s * 1e3, "longest_ms": longest_s * 1e3}


def _note(index: Index, rng: random.Random, prompts: Sequence[array[int]], digest: Any) -> None:
    """Look up the beginnings of prompts, with other ends."""
    for _ in range(ASKED):
        keys = list(rng.choice(prompts)[: rng.randrange(1, BLOCKS + 1)]) + list(random_keys(rng, 8))
        digest.update(repr(sorted(index.depths(index.find(keys)).items())).encode())


def hashed(hashes: Callable[..., list[int]]) -> dict[str, Any]:
    """Hash random prompts by a function with the parameters of Dynamo's `compute_block_hash_for_seq`.

    Returns:
        `hashes`: how many there were, and `digest` of them.
    """
    rng, digest, count = random.Random(SEED), hashlib.sha256(), 0
    for _ in range(CASES):
        size = rng.choice((1, 2, 4, 8, 16, 32, 64, 128))
        tokens = list(array("I", rng.randbytes(4 * rng.randrange(6 * size))))
        lora, namespace = (rng.choice((None, rng.randbytes(6).hex())) for _ in range(2))
        found = hashes(tokens, size, lora_name=lora, cache_namespace=namespace)
        count += len(found)
        digest.update(array("Q", found).tobytes())
    return {"hashes": count, "digest": digest.hexdigest()}

"""The index of blocks beside Dynamo's: `python -m benchmarks.llm.index`. It writes results/index.json.

Both get the events of eight workers in the form in which workers send them, and look the same prompts up. Each round
has a new process for each index; what all their look-ups have found, and 10,000 random cases of hashes, must be equal.

- `hot`: one prompt of 256 blocks is looked up again and again. All workers hold the beginning, one more, one all of it.
- `steps`: the same, but each of the eight workers holds another part of it.
- `cold`: 1,000 prompts are looked up once each, among a million blocks.
- `store`, `remove`: prompts, an event each. `remove parts` and `remove each`: an event for 25 blocks and for one, from
  the end of a prompt on.
- `clear`: a worker's 125,000 blocks are forgotten. `longest_ms`: ours does that in parts, between which a loop goes on.
- `memory`: resident memory, in bytes for each of the million blocks.
- `worker: …`: the same at a worker, which gets decoded events of an engine, with tokens, and computes the keys. The
  engine's blocks have 64 tokens, and in `worker, small: …` 16. In `remove each`, 25 events come in one batch. In
  `store each`, one block is stored after the others, as after each 64 or 16 tokens of an answer. Dynamo's has no
  interface in Python.

`--events N` is another command: N random events of engines go through all of it, and a naive model tells what must be
found. It writes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks import environments
from benchmarks.llm.index_work import (
    EACH,
    PART,
    SEED,
    WORKERS,
    Figures,
    applied,
    hashed,
    measured,
    random_keys,
    resident,
)
from benchmarks.rounds import RESULTS, Run, rotated
from harness.processes import ROOT, ChildFailed, environment_without_settings
from triton_distributed.llm import packed
from triton_distributed.llm.contract.cache import BlocksRemoved, BlocksStored, CacheCleared, CacheEvent
from triton_distributed.llm.contract.watching import Blocks, keys_of, packed_keys
from triton_distributed.llm.kv_events.held import HeldBlocks
from triton_distributed.llm.original.hashes import compute_block_hash_for_seq
from triton_distributed.llm.routing.index import PrefixIndex
from triton_distributed.llm.routing.keys import block_keys

PEER = "Dynamo"
LIMIT_S = 300
WORKER = {"worker": 64, "worker, small": 16}
"""Tokens in a block of the engine."""

HELD_PROMPTS = 1_000
HELD_BLOCKS = 125


class Ours:
    """`PrefixIndex`, as the router of a model fills it."""

    def __init__(self) -> None:
        self._index: PrefixIndex[int] = PrefixIndex()
        for worker in range(WORKERS):
            self._index.add(worker)
        self.find: Callable[[Sequence[int]], dict[int, int]] = self._index.depths

    def stored(self, keys: Sequence[int]) -> Blocks:
        """Make an event."""
        return Blocks(0, "stored", packed_keys(keys))

    def removed(self, keys: Sequence[int]) -> Blocks:
        """Make an event."""
        return Blocks(0, "removed", packed_keys(keys))

    def apply(self, worker: int, event: Blocks) -> None:
        """Do what `Feed` does with it."""
        if event.change == "stored":
            self._index.store(worker, keys_of(event.keys))
        else:
            self._index.discard(worker, keys_of(event.keys))

    def depths(self, found: dict[int, int]) -> dict[int, int]:
        """Return what was found."""
        return found

    def clear(self, worker: int) -> Iterator[None]:
        """Forget what a worker holds."""
        self._index.clear(worker)
        while self._index.sweep():
            yield


def held(text: str, block_tokens: int) -> dict[str, Any]:
    """What a worker does with the events of an engine."""
    rng = random.Random(SEED)
    count = HELD_PROMPTS * HELD_BLOCKS
    size = 4 * block_tokens * HELD_BLOCKS
    names = [list(random_keys(rng, HELD_BLOCKS)) for _ in range(HELD_PROMPTS)]
    stored = [
        (0, [BlocksStored(hashes=each, parent=None, tokens=rng.randbytes(size), block_tokens=block_tokens)])
        for each in names
    ]
    cache = HeldBlocks()

    def apply(_: int, events: Sequence[CacheEvent]) -> None:
        cache.apply(events)

    before = resident()
    figures = {"store": applied(apply, stored, count)}
    # The names are the event's objects; in a running worker only the cache keeps them.
    of_names = sum(sys.getsizeof(each) + 15 & ~15 for each in names[0]) / HELD_BLOCKS
    figures["memory"] = {"entry_bytes": (resident() - before) / count + of_names}
    rng.shuffle(names)
    whole: list[tuple[int, list[CacheEvent]]] = [(0, [BlocksRemoved(hashes=each[::-1])]) for each in names[:EACH]]
    figures["remove"] = applied(apply, whole, EACH * HELD_BLOCKS)
    singly: list[tuple[int, list[CacheEvent]]] = []
    for each in names[EACH : 2 * EACH]:
        events: list[CacheEvent] = [BlocksRemoved(hashes=[name]) for name in each[::-1]]
        # An engine tells in one batch what it has evicted in one of its steps.
        singly += [(0, events[at : at + PART]) for at in range(0, HELD_BLOCKS, PART)]
    figures["remove each"] = applied(apply, singly, EACH * HELD_BLOCKS)
    assert len(cache) == (HELD_PROMPTS - 2 * EACH) * HELD_BLOCKS
    answers = [(0, decoded(each, at, block_tokens)) for at in range(PART) for each in names[2 * EACH :]]
    figures["store each"] = applied(apply, answers, len(answers))
    return {"figures": {f"{text}: {name}": each for name, each in figures.items()}}


def decoded(prompt: Sequence[int], at: int, block_tokens: int) -> list[CacheEvent]:
    """Make the event of one more block of an answer: the engine has decoded its tokens."""
    name, parent = (prompt[0] ^ at + 1, prompt[0] ^ at) if at else (prompt[0] ^ 1, prompt[-1])
    return [BlocksStored(hashes=[name], parent=parent, tokens=bytes(4 * block_tokens), block_tokens=block_tokens)]


async def child(python: str, *arguments: str) -> dict[str, Any]:
    """Let a process measure, and return what it has printed."""
    process = await asyncio.create_subprocess_exec(
        *(python, "-m", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env=environment_without_settings(),
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), LIMIT_S)
    except TimeoutError as error:
        raise ChildFailed(f"{arguments[0]} took more than {LIMIT_S} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise ChildFailed(f"{arguments[0]} ended with {process.returncode}: {errors.decode()[-500:]}")
    found: dict[str, Any] = json.loads(output)
    return found


async def measure(options: argparse.Namespace) -> Run:
    """Take all rounds."""
    run = Run()
    ours = partial(child, sys.executable, "benchmarks.llm.index", "--blocks", str(options.blocks), "--measure")
    peers: dict[str, Callable[[], Awaitable[dict[str, Any]]]] = {"ours": partial(ours, "index")}
    if not options.alone:
        environments.make("dynamo")
        python = environments.python("dynamo")
        peers[PEER] = partial(child, python, "benchmarks.llm.index_on_dynamo", str(options.blocks))
    for done in range(options.rounds):
        print(f"round {done + 1} of {options.rounds}", flush=True)
        found = {peer: await taken(run, peer, peers[peer]) for peer in rotated(list(peers), done)}
        for kind in WORKER:
            await taken(run, "ours", partial(ours, kind))
        for what in ("depths", "digest"):
            if len({each[what] for each in found.values() if each}) > 1:
                run.fail("index", "ours", ChildFailed(f"{what}: not equal to those of {PEER}"))
    return run


async def taken(run: Run, peer: str, start: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any] | None:
    """Let a process measure, and keep its figures. Returns what it has printed; None if it has failed."""
    try:
        found = await start()
    except ChildFailed as error:
        run.fail("index", peer, error)
        return None
    for workload, figures in found["figures"].items():
        await run.take(workload, peer, partial(given, figures))
    return found


async def given(figures: Figures) -> Figures:
    """Return what is known already."""
    return figures


class Model:
    """What engines hold, without any index: how often each block is there.

    Args:
        rng: chooses.
        nodes: blocks of all prompts. Each is known by its number, and follows another one or begins a prompt.
    """

    def __init__(self, rng: random.Random, nodes: int) -> None:
        self._rng = rng
        self.prompts: list[tuple[int, ...]] = []  # The numbers of the blocks up to each one.
        self.tokens: list[bytes] = []  # Of each block.
        self.keys: list[list[int]] = []
        for number in range(nodes):
            before = rng.randrange(max(0, number - 40), number) if number and rng.random() < 0.97 else -1
            self.prompts.append((*self.prompts[before], number) if before >= 0 else (number,))
            self.tokens.append(packed(array("I", [number] * 4)))
            seed = (self.keys[before][-1],) if before >= 0 else ()
            self.keys.append((self.keys[before] if before >= 0 else []) + block_keys(self.tokens[number], 4, *seed))
        self.held: list[Counter[int]] = [Counter() for _ in range(WORKERS)]

    def event(self, worker: int) -> CacheEvent:
        """Let something happen at a worker, and return how its engine would tell it."""
        rng, held = self._rng, self.held[worker]
        chance = rng.random()
        if chance < 0.0005:
            held.clear()
            return CacheCleared()
        prompt = rng.choice(self.prompts)
        first = rng.randrange(len(prompt))
        if chance < 0.55:
            while first and not held[prompt[first - 1]]:
                first -= 1
            blocks = prompt[first:]
            held.update(blocks)
            return BlocksStored(
                hashes=[*blocks],
                parent=prompt[first - 1] if first else None,
                tokens=b"".join(self.tokens[each] for each in blocks),
                block_tokens=4,
            )
        # Most leave from the end on, some in any order, and a few from the middle of a prompt.
        gone = [each for each in prompt[first:] if held[each]]
        if chance > 0.9:
            rng.shuffle(gone)
            gone = gone[: rng.randrange(4)]
        elif chance < 0.85:
            gone.reverse()
        for each in gone:
            held[each] -= 1
            if not held[each]:
                del held[each]
        return BlocksRemoved(hashes=gone)

    def depths(self, prompt: Sequence[int]) -> dict[int, int]:
        """How many of the first blocks each worker holds."""
        found = {}
        for worker, held in enumerate(self.held):
            depth = next((at for at, each in enumerate(prompt) if each not in held), len(prompt))
            if depth:
                found[worker] = depth
        return found


def compared(count: int) -> int:
    """Let random events happen, and compare. Returns the exit status."""
    rng = random.Random(SEED)
    index: PrefixIndex[int] = PrefixIndex()
    model, caches = Model(rng, 3_000), [HeldBlocks(4) for _ in range(WORKERS)]
    for worker in range(WORKERS):
        index.add(worker)
    began, done, looked = time.monotonic(), 0, 0
    while done < count:
        worker = rng.randrange(WORKERS)
        if rng.random() < 0.0002:  # The worker is gone, and another one comes without any block.
            index.remove(worker)
            index.add(worker)
            model.held[worker].clear()
            caches[worker] = HeldBlocks(4)
        events = [model.event(worker) for _ in range(rng.randrange(1, 4))]
        change = caches[worker].apply(events)
        if change.cleared:
            index.clear(worker)
        index.discard(worker, change.removed)
        index.store(worker, change.stored)
        index.sweep()
        done += len(events)
        for _ in events:
            looked += 1
            number = rng.randrange(len(model.prompts))
            expected = model.depths(model.prompts[number])
            if not index.depths(model.keys[number]) == index.walked_depths(model.keys[number]) == expected:
                print(f"after {done} events: {index.depths(model.keys[number])} for {expected}")
                return 1
    while index.sweep():
        pass
    reached = {number for number, each in enumerate(model.prompts) if len(each) in model.depths(each).values()}
    wrong = [each for each in caches if each.orphans or each.unknown or each.malformed or each.dropped]
    if len(index) != len(reached) or wrong:
        print(f"{len(index)} entries for {len(reached)} blocks, and {len(wrong)} caches have passed events over")
        return 1
    took_s = time.monotonic() - began
    print(f"{done} random events and {looked} look-ups: equal to the naive model, {len(index)} entries, {took_s:.0f} s")
    return 0


def main() -> int:
    """Run the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llm.index", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--blocks", type=int, default=1_000_000, help="in the index (1000000)")
    parser.add_argument("--alone", action="store_true", help="without Dynamo")
    parser.add_argument("--events", type=int, metavar="N", help="compare with a naive model instead")
    parser.add_argument("--measure", choices=("index", *WORKER), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.events:
        return compared(options.events)
    if options.measure == "index":
        print(json.dumps({**measured(Ours(), options.blocks), **hashed(compute_block_hash_for_seq)}))
        return 0
    if options.measure:
        print(json.dumps(held(options.measure, WORKER[options.measure])))
        return 0
    run = asyncio.run(measure(options))
    quick = options.blocks < 1_000_000 or options.rounds < 3 or options.alone
    path = RESULTS / ("partial-index.json" if quick else "index.json")
    versions = {} if options.alone else {"dynamo": environments.versions("dynamo")}
    result = run.write(path, rounds=options.rounds, quick=quick, blocks=options.blocks, versions=versions)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())

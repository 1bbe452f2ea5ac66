"""Traces that follow from a seed."""

import random

from triton_distributed.llm.replay import Trace, TraceRequest


def chats(count=240, seed=7, answer=400, apart_ms=120):
    """Conversations that go on and branch, in Mooncake's format: all begin with the same block."""
    rng = random.Random(seed)
    at, fresh, found = 0, 1, []
    before = [[0]]
    for _ in range(count):
        at += int(rng.expovariate(1 / apart_ms))
        chat = rng.choice(before[-12:]) if rng.random() < 0.7 else before[0]
        ids = [*chat, *range(fresh, fresh + rng.randint(1, 9))]
        fresh = ids[-1] + 1
        before.append(ids)
        tokens = 512 * len(ids) - rng.randint(0, 511)
        found.append(
            {"timestamp": at, "input_length": tokens, "output_length": rng.randint(1, answer), "hash_ids": ids}
        )
    return found


def trace(lines, block_tokens=512):
    """The trace of such lines, whose ids are each at one place only."""
    return Trace(
        [
            TraceRequest(
                at_s=each["timestamp"] / 1000,
                prompt_tokens=each["input_length"],
                answer_tokens=each["output_length"],
                blocks=tuple(each["hash_ids"]),
            )
            for each in lines
        ],
        block_tokens=block_tokens,
        name="chats",
    )

"""The batches of an engine, step by step, as vLLM's scheduler makes them. Pure: the time of a step passes elsewhere.

Sequences wait in the order of their coming. A step computes one token for each sequence that decodes, and pieces of
prompts up to the token budget. If blocks run out, the sequence that began last loses its blocks and is computed anew
later (LIFO preemption).
"""

from __future__ import annotations

import hashlib
from collections import deque

from triton_distributed.llm.engines.mock.cache import Cache


class Sequence:
    """A request in the scheduler.

    Args:
        prompt: the token ids, packed.
        answer: the ids of the answer, packed; they are computed one by one.

    Attributes:
        generated: tokens of the answer so far.
        cached_tokens: tokens of the prompt that were in the cache at its first begin; -1 before it.
    """

    def __init__(self, prompt: bytes, answer: bytes) -> None:
        self.ids = prompt + answer
        self.prompt_tokens, self.answer_tokens = len(prompt) // 4, len(answer) // 4
        self.generated = 0
        self.cached_tokens = -1
        self.running = False
        self.computed = 0  # Tokens whose state is in `blocks`.
        self.blocks: list[int] = []
        self.stored = 0  # The first of `blocks`, which others can share.
        self._keys: list[bytes] = []

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one comes."""
        return self.prompt_tokens + self.generated - self.computed

    @property
    def finished(self) -> bool:
        """Whether the whole answer was generated."""
        return self.generated == self.answer_tokens

    def keys(self, count: int, block_tokens: int) -> list[bytes]:
        """The keys of the first `count` blocks: each follows from all tokens up to its end."""
        size = 4 * block_tokens
        for index in range(len(self._keys), count):
            parent = self._keys[-1] if self._keys else b""
            block = parent + self.ids[index * size : (index + 1) * size]
            self._keys.append(hashlib.blake2b(block, digest_size=8).digest())
        return self._keys[:count]


class Step:
    """What one step computes.

    Attributes:
        work: sequences, and how many tokens of each.
        prefill_tokens: tokens of prompts, and of preempted sequences.
        decoding: sequences that only need their next token.
    """

    def __init__(self) -> None:
        self.work: list[tuple[Sequence, int]] = []
        self.prefill_tokens = self.decoding = 0

    def add(self, sequence: Sequence, tokens: int) -> None:
        """Compute further tokens of a sequence."""
        self.work.append((sequence, tokens))
        if tokens == 1 and sequence.generated and sequence.pending == 1:
            self.decoding += 1
        else:
            self.prefill_tokens += tokens


class Scheduler:
    """Makes batches.

    Args:
        cache: the blocks.
        slots: the most sequences in a batch.
        batch_tokens: the most tokens that a step computes.
    """

    def __init__(self, cache: Cache, slots: int, batch_tokens: int) -> None:
        self.cache = cache
        self._slots, self._batch_tokens = slots, batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # In the order in which they began.
        self.preemptions = self.cached_tokens = self.generated_tokens = 0

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of this many tokens fits in the cache if it is alone."""
        return self._blocks_for(tokens) <= self.cache.total

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its begin. It `fits`."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence at once, wherever it is, and free its blocks. Nothing happens if it has finished."""
        if sequence.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def step(self) -> Step:
        """Choose what to compute next. There is something if a sequence waits or runs."""
        step = Step()
        budget = self._batch_tokens
        preempted = False
        index = 0
        while index < len(self.running) and budget:
            sequence = self.running[index]
            tokens = min(sequence.pending, budget)
            while not self._grow(sequence, tokens):
                preempted = True
                if self._preempt() is sequence:
                    break
            else:
                step.add(sequence, tokens)
                budget -= tokens
            index += 1
        while self.waiting and budget and not preempted and len(self.running) < self._slots:
            tokens = self._begin(self.waiting[0], budget)
            if not tokens:
                break
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            step.add(sequence, tokens)
            budget -= tokens
        return step

    def complete(self, step: Step) -> list[Sequence]:
        """Note that a step is done. Returns the sequences that have a new token; finished ones have left."""
        found = []
        for sequence, tokens in step.work:
            if not sequence.running:  # It was removed meanwhile.
                continue
            sequence.computed += tokens
            self._store(sequence)
            if sequence.pending:
                continue
            sequence.generated += 1
            self.generated_tokens += 1
            found.append(sequence)
            if sequence.finished:
                self.running.remove(sequence)
                self._release(sequence)
        return found

    def _begin(self, sequence: Sequence, budget: int) -> int:
        """Give a waiting sequence its first blocks. Returns how many tokens it computes; 0 if blocks are missing."""
        total = sequence.pending
        # The last token is computed in any case: the next one follows from it.
        cached = self.cache.cached(sequence.keys((total - 1) // self.cache.block_tokens, self.cache.block_tokens))
        computed = len(cached) * self.cache.block_tokens
        tokens = min(total - computed, budget)
        missing = self._blocks_for(computed + tokens) - len(cached)
        if missing > self.cache.available - self.cache.kept(cached):
            return 0
        self.cache.hold(cached)
        sequence.blocks = cached + self.cache.allocate(missing)
        sequence.computed, sequence.stored, sequence.running = computed, len(cached), True
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = computed
            self.cached_tokens += computed
        return tokens

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        missing = self._blocks_for(sequence.computed + tokens) - len(sequence.blocks)
        if missing > self.cache.available:
            return False
        if missing:
            sequence.blocks += self.cache.allocate(missing)
        return True

    def _preempt(self) -> Sequence:
        victim = self.running.pop()
        self._release(victim)
        self.waiting.appendleft(victim)
        self.preemptions += 1
        return victim

    def _release(self, sequence: Sequence) -> None:
        self.cache.release(sequence.blocks)
        sequence.blocks, sequence.running = [], False
        sequence.computed = sequence.stored = 0

    def _store(self, sequence: Sequence) -> None:
        size = self.cache.block_tokens
        first, last = sequence.stored, sequence.computed // size
        if first == last:
            return
        keys = sequence.keys(last, size)
        parent = keys[first - 1] if first else None
        ids = sequence.ids[4 * first * size : 4 * last * size]
        self.cache.store(sequence.blocks[first:last], keys[first:last], parent, ids)
        sequence.stored = last

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.cache.block_tokens)

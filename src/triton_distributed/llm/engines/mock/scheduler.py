"""The batches of an engine, step by step, as vLLM's scheduler makes them. Pure: the time of a step passes elsewhere.

Sequences wait in the order of their coming. A step computes one token for each sequence that decodes, and pieces of
prompts up to the token budget. If blocks run out, the sequence that began last loses its blocks and is computed anew
later (LIFO preemption).

Two workers can share the work on a request. One computes the prompt and one token, and keeps the blocks after that. The
other gets them, and begins with decoding: like vLLM, it computes the last token of the prompt again.

All sequences that decode get a token in each step. So nothing is done for a single one, except in the steps in which
it begins, needs a block, or ends: a step costs the same for one sequence and for 256.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence as Keys

from triton_distributed.llm.engines.mock.cache import Cache
from triton_distributed.llm.engines.mock.kv_events import Key


def block_keys(ids: bytes, block_tokens: int) -> list[Key]:
    """The keys of the whole blocks of packed token ids: each follows from all tokens up to its end."""
    size = 4 * block_tokens
    found: list[Key] = []
    key = b""
    for end in range(size, len(ids) + 1, size):
        key = hashlib.blake2b(key + ids[end - size : end], digest_size=8).digest()
        found.append(key)
    return found


class Sequence:
    """A request in the scheduler.

    Args:
        prompt_tokens: of the prompt, at least 1.
        answer_tokens: of the answer, at least 1; they are computed one by one.
        keys: of the whole blocks of prompt and answer.
        ids: the tokens of prompt and answer, packed; only events need them.
        keeps: its blocks stay after its end, until `Scheduler.remove`.
        fetched: another worker has computed the prompt, and its blocks have come. If they are lost to others, the
            sequence computes the prompt itself.

    Attributes:
        cached_tokens: tokens of the prompt that were in the cache at its first begin; -1 before it.
        blocks: how many it holds.
        running: whether it has begun.
    """

    __slots__ = (
        "_clock",
        "_generated",
        "answer_tokens",
        "began",
        "blocks",
        "cached_tokens",
        "computed",
        "due",
        "fetched",
        "ids",
        "keeps",
        "keys",
        "prompt_tokens",
        "running",
        "since",
        "stored",
    )

    def __init__(
        self,
        prompt_tokens: int,
        answer_tokens: int,
        keys: Keys[Key],
        ids: bytes = b"",
        *,
        keeps: bool = False,
        fetched: bool = False,
    ) -> None:
        self.prompt_tokens, self.answer_tokens, self.keys, self.ids = prompt_tokens, answer_tokens, keys, ids
        self.keeps, self.fetched = keeps, fetched
        self.cached_tokens = -1
        self.running = False
        self.computed = 0  # Tokens that its prefill has computed, those of the present step included.
        self.blocks = self.stored = 0  # The first `stored` of its blocks are held under their keys.
        self.began = 0  # The number of its begin.
        self.due = -1  # The step in which it needs its next block.
        self._generated = 0
        self._clock: Scheduler | None = None  # While it decodes: its tokens are the steps `since`.
        self.since = 0

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        clock = self._clock
        return self._generated if clock is None else clock.steps - self.since

    @property
    def finished(self) -> bool:
        """Whether the whole answer was generated."""
        return self.generated == self.answer_tokens

    def begin_decoding(self, clock: Scheduler) -> None:
        """Get one token in each step from now on."""
        self._clock, self.since = clock, clock.steps - self._generated

    def end_decoding(self) -> bool:
        """Get no more tokens. Returns False if it did not decode."""
        if self._clock is None:
            return False
        self._generated, self._clock = self.generated, None
        return True

    def add_token(self) -> None:
        """Count the token at the end of its prefill."""
        self._generated += 1


class Step:
    """What one step computes.

    Attributes:
        prefill_tokens: tokens of prompts, and of preempted sequences.
        decoding: sequences that only need their next token.
        context_tokens: tokens of all these, prompts included.
        prefilled: sequences whose prefill ends with the step, which gives their next token, too.
    """

    __slots__ = ("context_tokens", "decoding", "prefill_tokens", "prefilled")

    def __init__(self) -> None:
        self.prefilled: list[Sequence] = []
        self.prefill_tokens = self.decoding = self.context_tokens = 0

    @property
    def empty(self) -> bool:
        """Whether it computes nothing: what waits needs blocks that ended sequences keep."""
        return not (self.prefill_tokens or self.decoding)


class Scheduler:
    """Makes batches.

    Args:
        cache: the blocks.
        slots: the most sequences in a batch. A batch has at most `batch_tokens`.
        batch_tokens: the most tokens that a step computes.

    Attributes:
        steps: how many are done.
        preemptions, cached_tokens, generated_tokens: counts since the beginning.
    """

    def __init__(self, cache: Cache, slots: int, batch_tokens: int) -> None:
        self.cache = cache
        self._slots, self._batch_tokens = min(slots, batch_tokens), batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # In the order in which they began. Only the last one can have a piece left.
        self.steps = self.preemptions = self.cached_tokens = self.generated_tokens = 0
        self._begun = 0
        self._piece: Sequence | None = None  # The sequence of whose prompt a piece is left.
        self._decoding = self._context = 0  # Sequences that decode, and the sum of their tokens.
        self._due: dict[int, list[Sequence]] = {}  # By step: those that need a block in it, and others by mistake.
        self._ends: dict[int, list[Sequence]] = {}  # By number of steps: those that end after so many, and others.

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of this many tokens fits in the cache if it is alone."""
        return self._blocks_for(tokens) <= self.cache.total

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its begin. It `fits`. One whose blocks have come is next, as in vLLM."""
        if sequence.fetched:
            self.waiting.appendleft(sequence)
        else:
            self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence at once, wherever it is, and free its blocks. Nothing happens if it holds none."""
        if sequence.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.blocks:  # It has finished, and keeps them.
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def step(self) -> Step:
        """Choose what to compute next. There is something if a sequence waits or runs."""
        step = Step()
        preempted = self._grow_decoding()
        step.decoding, step.context_tokens = self._decoding, self._context
        budget = self._batch_tokens - self._decoding
        if (piece := self._piece) is not None:
            total = piece.prompt_tokens + piece.generated
            tokens = min(total - piece.computed, budget)
            missing = self._blocks_for(piece.computed + tokens) - piece.blocks
            if missing > self.cache.available:
                self._preempt()  # It began last.
                preempted = True
            else:
                self._compute(step, piece, tokens, missing, total)
                budget -= tokens
        while self.waiting and budget and not preempted and len(self.running) < self._slots:
            tokens = self._begin(step, self.waiting[0], budget)
            if not tokens:
                break
            budget -= tokens
        return step

    def complete(self, step: Step) -> list[Sequence]:
        """Note that a step is done. Returns the sequences that have finished; they have left."""
        self.steps += 1
        self._context += self._decoding
        self.generated_tokens += self._decoding
        for sequence in step.prefilled:
            if sequence.running:  # It was not removed meanwhile.
                self.generated_tokens += 1
                sequence.add_token()
                self._decode(sequence)
        finished = [each for each in self._ends.pop(self.steps, ()) if each.running and each.finished]
        if len(finished) > 1:
            finished.sort(key=_order)
        for sequence in finished:
            self.running.remove(sequence)
            self._store(sequence, sequence.prompt_tokens + sequence.answer_tokens - 1)
            if sequence.keeps:
                self._stop(sequence)
            else:
                self._release(sequence)
        return finished

    def _grow_decoding(self) -> bool:
        """Give blocks to the sequences that decode and need one. Returns whether others lost theirs."""
        due = self._due.pop(self.steps, None)
        if due is None:
            return False
        preempted = False
        due.sort(key=_order)
        cache = self.cache
        for sequence in due:
            if sequence.due != self.steps:
                continue
            while not cache.available:
                preempted = True
                if self._preempt() is sequence:
                    break
            else:
                self._store(sequence, sequence.blocks * cache.block_tokens)
                cache.allocate(1)
                sequence.blocks += 1
                self._plan(sequence)
        return preempted

    def _begin(self, step: Step, sequence: Sequence, budget: int) -> int:
        """Begin the first waiting sequence. Returns how many tokens it computes; 0 if blocks are missing."""
        cache = self.cache
        total = sequence.prompt_tokens + sequence.generated
        # The last token is computed in any case: the next one follows from it.
        most = (total - 1) // cache.block_tokens
        keys = sequence.keys[: min(most, cache.depth(sequence.keys))]
        computed = len(keys) * cache.block_tokens
        # As vLLM does: it begins when all of it has room, even if only a piece is computed now.
        if self._blocks_for(total) - len(keys) > cache.available - cache.kept(keys):
            return 0
        self.waiting.popleft()
        cache.hold(keys)
        sequence.blocks = sequence.stored = len(keys)
        sequence.computed, sequence.running = computed, True
        self._begun += 1
        sequence.began = self._begun
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = computed
            self.cached_tokens += computed
        self.running.append(sequence)
        if sequence.fetched:
            self._fetch(step, sequence, total)
            return 1
        tokens = min(total - computed, budget)
        self._compute(step, sequence, tokens, self._blocks_for(computed + tokens) - len(keys), total)
        return tokens

    def _fetch(self, step: Step, sequence: Sequence, total: int) -> None:
        """Take the blocks that have come, and compute the last token as one that decodes."""
        missing = self._blocks_for(total) - sequence.blocks
        self.cache.allocate(missing)
        sequence.blocks += missing
        sequence.computed = total
        self._store(sequence, total)
        step.decoding += 1
        step.context_tokens += total
        step.prefilled.append(sequence)

    def _compute(self, step: Step, sequence: Sequence, tokens: int, missing: int, total: int) -> None:
        if missing:
            self.cache.allocate(missing)
            sequence.blocks += missing
        sequence.computed += tokens
        # As in vLLM, later sequences of the same step can share these blocks: they are computed before or together.
        self._store(sequence, sequence.computed)
        step.prefill_tokens += tokens
        if sequence.computed == total:
            self._piece = None
            step.prefilled.append(sequence)
        else:
            self._piece = sequence

    def _decode(self, sequence: Sequence) -> None:
        sequence.begin_decoding(self)
        self._decoding += 1
        self._context += sequence.prompt_tokens + sequence.generated
        self._ends.setdefault(sequence.since + sequence.answer_tokens, []).append(sequence)
        self._plan(sequence)

    def _plan(self, sequence: Sequence) -> None:
        """Note when a sequence that decodes needs its next block: when it computes the token after its last block."""
        generated = sequence.blocks * self.cache.block_tokens - sequence.prompt_tokens + 1
        if generated < sequence.answer_tokens:
            sequence.due = sequence.since + generated
            self._due.setdefault(sequence.due, []).append(sequence)
        else:
            sequence.due = -1

    def _preempt(self) -> Sequence:
        victim = self.running.pop()
        self._release(victim)
        victim.fetched = False
        self.waiting.appendleft(victim)
        self.preemptions += 1
        return victim

    def _stop(self, sequence: Sequence) -> None:
        if self._piece is sequence:
            self._piece = None
        if sequence.end_decoding():
            self._decoding -= 1
            self._context -= sequence.prompt_tokens + sequence.generated
        sequence.running, sequence.due = False, -1

    def _release(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self.cache.release(sequence.keys[: sequence.stored], sequence.blocks - sequence.stored)
        sequence.computed = sequence.blocks = sequence.stored = 0

    def _store(self, sequence: Sequence, computed: int) -> None:
        size = self.cache.block_tokens
        first, last = sequence.stored, computed // size
        if first == last:
            return
        keys = sequence.keys
        parent = keys[first - 1] if first else None
        self.cache.store(keys[first:last], parent, sequence.ids[4 * first * size : 4 * last * size])
        sequence.stored = last

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.cache.block_tokens)


def _order(sequence: Sequence) -> int:
    return sequence.began

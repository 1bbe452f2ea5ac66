"""Which blocks of prompts a cache holds, from the events of its engine. Pure.

The engine names its blocks in its own way. Here each block also gets its place in the prompt, so that the keys of the
router's index follow: from the engine's names to keys, and from small blocks to joined ones.

Blocks that follow one another are kept as one run, and a run is known by its parent and its place there. An engine may
remove a block in the middle of a prompt and keep those after it, which no request can use then. They stay known, are
reported as removed, and are reported as stored again when the engine has computed the missing block anew.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from xxhash import xxh3_64_intdigest

from triton_distributed.llm.contract.cache import BlockHash, BlocksRemoved, BlocksStored, CacheCleared, CacheEvent
from triton_distributed.llm.kv_events.change import Change, keys_array
from triton_distributed.llm.routing.keys import JOINED_TOKENS, block_keys, seed_of

logger = logging.getLogger("triton_distributed.llm")

MAX_BLOCKS = 8_000_000
"""Blocks of the engine that are known at most. A block takes 110 bytes, 170 if it is joined with others, and 500 if no
other block follows it in its prompt. An engine with small blocks has about a million."""

SLICE_KEYS = 10_000
"""Keys in a slice of a snapshot."""


class _Run:
    """Blocks that follow one another.

    Attributes:
        parent: the run before this one; None at the beginning of a prompt.
        at: how many blocks of the parent come before this run.
        block_tokens: tokens in a block.
        key_tokens: tokens in a block of the index.
        lead: tokens before the first block that belong to its key.
        seed: of the first key.
        hashes: the engine's names of the blocks.
        keys: of the whole index blocks that end in this run.
        tokens: the leading tokens and those of the blocks, where a key may begin in the middle of the run; else None.
        reach: how many of the first blocks are held together with all before them.
        missing: places of blocks that the engine has removed, while it holds later ones.
        further: for blocks that the engine holds more than once, how often beyond the first time.
        children: the runs after this one, by their `at`.
    """

    __slots__ = (
        "at",
        "block_tokens",
        "children",
        "further",
        "hashes",
        "key_tokens",
        "keys",
        "lead",
        "missing",
        "parent",
        "reach",
        "seed",
        "tokens",
    )

    def __init__(
        self, parent: _Run | None, at: int, block_tokens: int, key_tokens: int, lead: bytes, seed: int
    ) -> None:
        self.parent, self.at = parent, at
        self.block_tokens, self.key_tokens = block_tokens, key_tokens
        self.lead, self.seed = len(lead) // 4, seed
        self.hashes: list[int] = []
        self.keys = keys_array()
        self.tokens = bytearray(lead) if lead or block_tokens % key_tokens else None
        self.reach = 0
        self.missing: set[int] | None = None
        self.further: dict[int, int] | None = None
        self.children: dict[int, dict[_Run, None]] | None = None

    def keys_of(self, blocks: int) -> int:
        """How many keys end in the first blocks."""
        return (self.lead + blocks * self.block_tokens) // self.key_tokens

    def place(self, name: int, likely: int) -> int:
        """The place of a block of this run."""
        hashes = self.hashes
        if likely < len(hashes) and hashes[likely] == name:
            return likely
        if hashes[-1] == name:
            return len(hashes) - 1
        return hashes.index(name)

    def open_end(self, blocks: int) -> tuple[int, bytes]:
        """After this many blocks, the seed of the next key and the tokens that already belong to it."""
        whole = self.keys_of(blocks)
        seed = self.keys[whole - 1] if whole else self.seed
        if self.tokens is None:
            return seed, b""
        first = 4 * whole * self.key_tokens
        return seed, bytes(self.tokens[first : 4 * (self.lead + blocks * self.block_tokens)])

    def has_children_at(self, blocks: int) -> bool:
        return self.children is not None and blocks in self.children

    def reachable(self) -> bool:
        """Whether all blocks before this run are held."""
        return self.parent is None or self.parent.reach >= self.at


class HeldBlocks:
    """The blocks that one cache holds.

    Args:
        key_tokens: tokens in a block of the index; see `indexed_tokens`. The engine's blocks may have any size. Where
            it does not divide `key_tokens`, two blocks may have one key, which is removed with the first of them.
        max_blocks: the most blocks of the engine that are known. Further ones are passed over; `dropped` counts them.

    Attributes:
        orphans: stored blocks that were passed over because the block before them is not known.
        unknown: removed blocks that were not known.
        dropped: stored blocks that were passed over because too many are known.
        malformed: events that contradict themselves, and were passed over.
        ignored: events of cache groups that do not tell what is cached.
        ambiguous: the engine has several cache groups and does not tell their kinds, so that nothing is known.
    """

    def __init__(self, key_tokens: int = JOINED_TOKENS, max_blocks: int = MAX_BLOCKS) -> None:
        self.key_tokens = key_tokens
        self.orphans = self.unknown = self.dropped = self.malformed = self.ignored = 0
        self.ambiguous = False
        self._max = max_blocks
        self._warned: set[str] = set()
        self._clear()

    def __len__(self) -> int:
        """The blocks of the engine that are known."""
        return len(self._of)

    def apply(self, events: Iterable[CacheEvent]) -> Change:
        """Note what an engine tells. Nothing is raised: what cannot be used is counted, and logged once.

        Returns:
            What has changed in all. No key is both stored and removed.
        """
        self._stored, self._removed, self._cleared = keys_array(), keys_array(), False
        single: list[int] = []  # Names of removed blocks that came one in an event, as vLLM tells them.
        for event in events:
            if isinstance(event, BlocksRemoved):
                if event.group is not None and event.group != self._group:
                    self.ignored += 1
                elif len(event.hashes) == 1:
                    name = event.hashes[0]
                    single.append(name if isinstance(name, int) else hash(name))
                else:
                    names = _names(event.hashes)
                    if names and (run := self._of.get(names[-1])) is not None and run.hashes[-1] == names[-1]:
                        names = names[::-1]  # From the end of a run on, all go together.
                    self._remove(names)
                continue
            if single:
                self._remove(single)
                single = []
            if isinstance(event, BlocksStored):
                if self._counts(event):
                    self._store(event)
                else:
                    self.ignored += 1
            elif isinstance(event, CacheCleared):
                self._clear()
        if single:
            self._remove(single)
        stored, removed = self._stored, self._removed
        if stored and removed:
            stored, removed = _net(stored, removed)
        return Change(stored, removed, self._cleared)

    def snapshot(self, slice_keys: int = SLICE_KEYS) -> Iterator[array[int]]:
        """The keys of all held blocks, in slices. Events may be applied between two slices.

        A copy is right if it takes all slices, and the changes in between, in their order. A key may come twice. A
        slice is small, or empty, if many short prompts have few keys: it ends after as many runs of blocks as keys.
        """
        found, looked = keys_array(), 0
        for run in list(self._runs):
            done = 0
            while done < (held := run.keys_of(run.reach)):
                further = run.keys[done : min(held, done + slice_keys - len(found))]
                found.extend(further)
                done += len(further)
                if len(found) >= slice_keys:
                    yield found
                    found, looked = keys_array(), 0
            looked += 1
            if looked >= slice_keys:
                yield found
                found, looked = keys_array(), 0
        if found:
            yield found

    def _clear(self) -> None:
        self._of: dict[int, _Run] = {}  # By the engine's name of a block; the names of missing ones, too.
        self._runs: dict[_Run, None] = {}  # Parents come before their children.
        self._group: int | None = None
        self._group_is_full = False
        self._stored, self._removed, self._cleared = keys_array(), keys_array(), True

    def _counts(self, event: BlocksStored) -> bool:
        """Whether the blocks are evidence that a prompt is cached.

        All groups name the blocks of a prompt alike. One group with full attention speaks for the cache. The first
        versions that told groups did not tell their kinds: one group alone then counts, and of several none.
        """
        group, full = event.group, event.full
        if full is False or (self.ambiguous and not full):
            return False
        if group is None:
            return True
        if group == self._group or self._group is None:
            self._group, self._group_is_full = group, self._group_is_full or full is True
            self.ambiguous = False
            return True
        if self._group_is_full:
            return False
        self._clear()
        if full:
            self._group, self._group_is_full = group, True
            return True
        self.ambiguous = True
        self._warn("the engine has several cache groups and does not tell which has full attention: no block counts")
        return False

    def _store(self, event: BlocksStored) -> None:
        names, size = _names(event.hashes), event.block_tokens
        if not names:
            return
        count = len(names)
        if size < 1 or len(event.tokens) != 4 * size * count or (count > 1 and len(set(names)) != count):
            self.malformed += 1
            self._warn(
                f"{count} blocks of {size} tokens came with {len(event.tokens) // 4} tokens, or with a name twice"
            )
            return
        blocks = self._of
        run: _Run | None = None
        at, parent = 0, event.parent
        if parent is not None:
            if not isinstance(parent, int):
                parent = hash(parent)
            run = blocks.get(parent)
            if run is None:
                self.orphans += count
                self._warn("blocks were stored after one that is not known: they do not count")
                return
            at = len(run.hashes) if run.hashes[-1] == parent else run.place(parent, 0) + 1
        extra = event.extra
        if not extra and blocks.keys().isdisjoint(names):
            self._add(event, run, at, names, 0)
            return
        first = 0
        while first < count:
            if names[first] in blocks:
                run, at = self._again(names[first], run, at)
                first += 1
                continue
            end = first + 1
            while end < count and names[end] not in blocks and not (extra and end in extra):
                end += 1
            run = self._add(event, run, at, names[first:end], first)
            if run is None:
                return
            at, first = len(run.hashes), end

    def _add(self, event: BlocksStored, run: _Run | None, at: int, names: Sequence[int], first: int) -> _Run | None:
        """Add new blocks after the first `at` blocks of a run. Returns their run; None if there are too many."""
        if len(self._of) + len(names) > self._max:
            self.dropped += len(names)
            self._warn(f"more than {self._max} blocks are stored: further ones do not count")
            return None
        size, extra = event.block_tokens, event.extra.get(first) if event.extra else None
        if run is None or at != len(run.hashes) or size != run.block_tokens or extra or run.has_children_at(at):
            seed, lead = (seed_of(event.lora, event.namespace), b"") if run is None else run.open_end(at)
            if extra:
                seed = xxh3_64_intdigest(extra, seed)
            made = _Run(run, at, size, self.key_tokens, lead, seed)
            self._runs[made] = None
            if run is not None:
                if run.children is None:
                    run.children = {}
                run.children.setdefault(at, {})[made] = None
            run = made
        hashes, keys = run.hashes, run.keys
        held = run.reach == len(hashes) and run.reachable()
        self._of.update(dict.fromkeys(names, run))
        hashes += names
        known, whole = len(keys), run.keys_of(len(hashes))
        tokens = event.tokens if len(names) == len(event.hashes) else _part(event.tokens, first, len(names), size)
        if run.tokens is not None:
            run.tokens += tokens
            tokens = bytes(run.tokens[4 * known * self.key_tokens : 4 * whole * self.key_tokens])
        if whole > known:
            found = array("Q", block_keys(tokens, self.key_tokens, keys[-1] if keys else run.seed))
            keys += found
            if held:
                self._stored += found
        if held:
            run.reach = len(hashes)
        return run

    def _again(self, name: int, near: _Run | None, at: int) -> tuple[_Run, int]:
        """Note that a known block was stored. Returns its run, and how many blocks of it come up to it."""
        run = self._of[name]
        place = run.place(name, at if run is near else 0)
        if run.missing is not None and place in run.missing:
            run.missing.discard(place)
            if run.reach == place and run.reachable():
                self._show(run)
        else:
            if run.further is None:
                run.further = {}
            run.further[place] = run.further.get(place, 0) + 1
        return run, place + 1

    def _remove(self, names: Sequence[int]) -> None:
        blocks = self._of
        near, likely = None, 0
        at, count = 0, len(names)
        while at < count:
            name = names[at]
            run = blocks.get(name)
            at += 1
            if run is None:
                self.unknown += 1
                continue
            hashes, children = run.hashes, run.children
            left = len(hashes)
            if hashes[-1] == name and not run.further and (children is None or left not in children):
                # From the end of a run on, all that follow go together.
                while True:
                    hashes.pop()
                    del blocks[name]
                    left -= 1
                    if not left or at == count or hashes[-1] != names[at] or run.missing:
                        break
                    if children is not None and left in children:
                        break
                    name = names[at]
                    at += 1
                self._cut(run, left)
                continue
            place = run.place(name, likely if run is near else 0)
            near, likely = run, place + 1
            if run.missing is not None and place in run.missing:
                self.unknown += 1
            elif run.further is not None and place in run.further:
                run.further[place] -= 1
                if not run.further[place]:
                    del run.further[place]
            else:
                if place < run.reach:
                    self._hide(run, place)
                if run.missing is None:
                    run.missing = set()
                run.missing.add(place)
                self._trim(run)

    def _cut(self, run: _Run, left: int) -> None:
        """Only the first blocks of a run are left: forget what there is besides their names."""
        keys, size, reached = run.keys, run.block_tokens, run.reach
        whole = told = (run.lead + left * size) // run.key_tokens
        if left < reached:
            run.reach = left
            told = (run.lead + reached * size) // run.key_tokens
        ended = len(keys) - whole
        if ended == 1:
            key = keys.pop()
            if told > whole:
                self._removed.append(key)
        elif ended:
            gone = keys[whole:told]
            gone.reverse()
            self._removed += gone
            del keys[whole:]
        if run.tokens is not None:
            del run.tokens[4 * (run.lead + left * size) :]
        if not left or run.missing:
            self._trim(run)

    def _hide(self, run: _Run, place: int) -> None:
        """A block is missing: it and all after it do not count any more."""
        work = [(run, place)]
        while work:
            run, place = work.pop()
            reached, run.reach = run.reach, place
            self._removed += run.keys[run.keys_of(place) : run.keys_of(reached)]
            for at, children in (run.children or {}).items():
                if place < at <= reached:
                    work += [(child, 0) for child in children if child.reach]

    def _show(self, run: _Run) -> None:
        """The block after the ones that count is there: all up to the next missing one count."""
        work = [run]
        while work:
            run = work.pop()
            before = run.reach
            after = min((each for each in run.missing or () if each >= before), default=len(run.hashes))
            run.reach = after
            self._stored += run.keys[run.keys_of(before) : run.keys_of(after)]
            for at, children in (run.children or {}).items():
                if before < at <= after:
                    work += children

    def _trim(self, run: _Run | None) -> None:
        """Forget missing blocks after which nothing is held, and runs without a block."""
        while run is not None:
            hashes, missing = run.hashes, run.missing
            while missing and len(hashes) - 1 in missing and not run.has_children_at(len(hashes)):
                missing.discard(len(hashes) - 1)
                del self._of[hashes.pop()]
                del run.keys[run.keys_of(len(hashes)) :]
                if run.tokens is not None:
                    del run.tokens[4 * (run.lead + len(hashes) * run.block_tokens) :]
            if hashes:
                return
            del self._runs[run]
            parent = run.parent
            if parent is not None:
                assert parent.children is not None
                siblings = parent.children[run.at]
                del siblings[run]
                if siblings:
                    return
                del parent.children[run.at]
            run = parent

    def _warn(self, text: str) -> None:
        """Log a text once."""
        kind = text.split(":")[-1]
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("KV events: %s; the metrics count them", text)


def _names(hashes: Sequence[BlockHash]) -> Sequence[int]:
    """Names as numbers. Those in bytes are often long, and there are a million."""
    return list(map(hash, hashes)) if hashes and isinstance(hashes[0], bytes) else hashes  # type: ignore[return-value]


def _part(tokens: bytes, first: int, count: int, size: int) -> bytes:
    return tokens[4 * first * size : 4 * (first + count) * size]


def _net(stored: array[int], removed: array[int]) -> tuple[array[int], array[int]]:
    """Take out the keys that changed and changed back."""
    both = set(stored) & set(removed)
    if not both:
        return stored, removed
    left = Counter(each for each in stored if each in both)
    left.subtract(each for each in removed if each in both)
    return (
        array("Q", (each for each in dict.fromkeys(stored) if each not in both or left[each] > 0)),
        array("Q", (each for each in dict.fromkeys(removed) if each not in both or left[each] < 0)),
    )

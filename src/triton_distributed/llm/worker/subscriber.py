"""What one router gets next. Pure: no I/O, no clock."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal, Protocol

from triton_distributed.llm.contract.watching import Begun, Blocks, Computed, WatchUpdate, packed_keys
from triton_distributed.llm.kv_events.change import Change

UPDATE_KEYS: Final = 4096
"""Keys in an update at most: 32 KB. A router needs about 1 ms for them."""

LEAST_WAITING: Final = 1 << 17
"""Keys and requests that may wait for any router: 1 MB of keys. Twice the blocks of the cache may, if that is more."""

Kind = Literal["stored", "removed", "cleared"]


class Cache(Protocol):
    """The blocks of one rank."""

    def __len__(self) -> int: ...

    def snapshot(self, slice_keys: int) -> Iterator[array[int]]: ...


class Entry:
    """A request that runs.

    Attributes:
        number: names it.
        router, rank: as in `Request`.
        tokens: of its prompt.
        keys: of the whole blocks of its prompt.
        at: when it came, on the worker's clock.
        computed: it has had its first output.
    """

    __slots__ = ("at", "computed", "keys", "number", "rank", "router", "tokens")

    def __init__(self, number: int, router: int, rank: int, tokens: int, keys: Sequence[int], at: float) -> None:
        self.number, self.router, self.rank, self.tokens, self.keys, self.at = number, router, rank, tokens, keys, at
        self.computed = False


class Source(Protocol):
    """What a subscriber reads for its snapshot."""

    @property
    def caches(self) -> Mapping[int, Cache]:
        """By rank."""

    @property
    def entries(self) -> Mapping[int, Entry]:
        """The requests that run, by number."""


class Subscriber:
    """Collects what a router gets next.

    Nothing waits before the first update is taken, nor after too much has waited: then the next update begins a
    snapshot.

    Args:
        router: its id. It does not get its own requests.
        source: what there is to tell.

    Attributes:
        snapshots: how many were begun.
        due: there is something to take.
    """

    __slots__ = ("_begun", "_computed", "_ended", "_runs", "_slices", "_source", "_stale", "_waiting", "due",
                 "router", "snapshots")  # fmt: skip

    def __init__(self, router: int, source: Source) -> None:
        self.router, self._source = router, source
        self.snapshots = 0
        self.due = True
        self._stale = True
        self._runs: deque[tuple[int, Kind, array[int]]] = deque()
        self._slices: dict[int, Iterator[array[int]]] = {}  # Of the snapshot, by rank.
        self._begun: dict[int, Entry] = {}
        self._computed: list[Computed] = []
        self._ended: list[int] = []
        self._waiting = 0  # Keys and requests.

    def changed(self, rank: int, change: Change) -> None:
        """Note a change of the blocks."""
        if self._stale:
            return
        if change.cleared:
            self._slices.pop(rank, None)
            self._add(rank, "cleared", array("Q"))
        if change.removed:
            self._add(rank, "removed", change.removed)
        if change.stored:
            self._add(rank, "stored", change.stored)

    def begun(self, entry: Entry) -> None:
        """Note a new request."""
        if not self._stale and entry.router != self.router:
            self._begun[entry.number] = entry
            self._grown(1 + len(entry.keys))

    def computed(self, entry: Entry, cached_tokens: int) -> None:
        """Note a request's first output."""
        if not self._stale and entry.router != self.router and entry.number not in self._begun:
            self._computed.append(Computed(entry.number, cached_tokens))
            self._grown(1)

    def ended(self, entry: Entry) -> None:
        """Note a request's end."""
        if not self._stale and entry.router != self.router and self._begun.pop(entry.number, None) is None:
            self._ended.append(entry.number)
            self._grown(1)

    def take(self, update: WatchUpdate, now: float) -> bool:
        """Fill in the next update.

        Args:
            update: has the worker's present state.
            now: seconds, on the worker's clock.

        Returns:
            Whether there is more to take.
        """
        if self._stale:
            self._stale = False
            self._drop()
            self.snapshots += 1
            update.begins = True
            source = self._source
            self._slices = {rank: cache.snapshot(UPDATE_KEYS) for rank, cache in source.caches.items()}
            self._begun = {number: each for number, each in source.entries.items() if each.router != self.router}
        room = self._take_runs(update.blocks)
        # A slice is taken only when all changes before it have been taken: it has the state after them.
        while room > 0 and not self._runs and self._slices:
            rank, slices = next(iter(self._slices.items()))
            keys = next(slices, None)
            if keys is None:
                del self._slices[rank]
            else:
                if keys:
                    update.blocks.append(Blocks(rank, "stored", packed_keys(keys)))
                room -= max(len(keys), UPDATE_KEYS // 4)  # To make a small slice takes time, too.
        update.begun = [
            Begun(each.number, each.rank, each.tokens, b"" if each.computed else packed_keys(each.keys),
                  now - each.at, each.computed)
            for each in self._begun.values()
        ]  # fmt: skip
        update.computed, update.ended = self._computed, self._ended
        self._begun, self._computed, self._ended = {}, [], []
        update.more = bool(self._slices)
        self._waiting = sum(len(keys) for _, _, keys in self._runs) if self._runs else 0
        self.due = bool(self._runs or self._slices)
        return self.due

    def restart(self) -> None:
        """Drop what waits, and begin a snapshot with the next update."""
        self._stale = self.due = True
        self._drop()

    def _take_runs(self, blocks: list[Blocks]) -> int:
        """Move waiting changes into an update. Returns how many further keys fit."""
        room, runs = UPDATE_KEYS, self._runs
        while runs and room > 0:
            rank, kind, keys = runs[0]
            if len(keys) <= room:
                runs.popleft()
            else:
                runs[0] = rank, kind, keys[room:]
                keys = keys[:room]
            blocks.append(Blocks(rank, kind, packed_keys(keys)))
            room -= len(keys)
        return room

    def _add(self, rank: int, kind: Kind, keys: array[int]) -> None:
        runs = self._runs
        if runs and runs[-1][:2] == (rank, kind) and len(runs[-1][2]) < UPDATE_KEYS:
            runs[-1][2].extend(keys)
        else:
            runs.append((rank, kind, keys[:]))
        self._grown(len(keys))

    def _grown(self, count: int) -> None:
        self.due = True
        self._waiting += count
        if self._waiting > LEAST_WAITING and self._waiting > 2 * sum(map(len, self._source.caches.values())):
            self.restart()

    def _drop(self) -> None:
        self._runs.clear()
        self._slices, self._begun, self._computed, self._ended = {}, {}, [], []
        self._waiting = 0

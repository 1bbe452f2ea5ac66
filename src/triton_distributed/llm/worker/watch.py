"""The endpoint `watch`: what a worker knows of its engine's cache and of its requests, which each router gets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final

from triton_distributed.llm.contract.cache import CacheEvents
from triton_distributed.llm.contract.engine import Engine
from triton_distributed.llm.contract.model import ModelCard
from triton_distributed.llm.contract.output import Usage
from triton_distributed.llm.contract.request import Request, packed
from triton_distributed.llm.contract.watching import CacheMode, WatchRequest, WatchUpdate
from triton_distributed.llm.kv_events.approximate import CACHE_TOKENS, Asked, AssumedBlocks
from triton_distributed.llm.kv_events.change import Change
from triton_distributed.llm.kv_events.held import HeldBlocks
from triton_distributed.llm.routing.keys import block_keys, indexed_tokens, seed_of
from triton_distributed.llm.worker.subscriber import Cache, Entry, Subscriber

logger = logging.getLogger("triton_distributed.llm")

SILENT_S: Final = 10.0
"""Seconds after the first output of a request in which the engine reports its blocks, if it reports any."""

GAP_S: Final = 0.002
"""Seconds between two updates for a router, so that thousands of requests a second are not thousands of updates."""

USED_S: Final = 0.5
"""Seconds between two looks at how full the cache is, while a router watches."""

USED_STEP: Final = 0.01
"""A change of the used part that routers learn of."""

MAX_WATCHERS: Final = 256
"""Routers that may watch one worker."""


class Watching:
    """What a worker tells routers.

    Args:
        engine: computes. It has not been started.

    Attributes:
        mode: how the cache is known.
        silent: the engine should report its blocks, and has not. Then the mode is `approximate` until it does.
        entries: the requests that run.
        events: how many events of the engine have come.
        snapshots: how many snapshots were begun for routers.
    """

    def __init__(self, engine: Engine) -> None:
        self.mode: CacheMode = "off"
        self.silent = False
        self.entries: dict[int, Entry] = {}
        self.events = self.snapshots = 0
        self._engine, self._name, self._block_tokens = engine, "", 0
        self._adapters: frozenset[str] = frozenset()
        self._early: list[CacheEvents] | None = []  # What comes before `open`.
        self._held: dict[int, HeldBlocks] = {}
        self._assumed: dict[int, AssumedBlocks] = {}
        self._loop = asyncio.get_running_loop()
        self._number = 0
        self._subscribers: dict[Subscriber, asyncio.Event] = {}
        self._tells_cached = False  # The engine has once reported cached tokens.
        self._used = 0.0
        self._used_timer: asyncio.TimerHandle | None = None
        self._silence: asyncio.TimerHandle | None = None
        self._exact = engine.kv_events(self.publish)

    def open(self, card: ModelCard) -> None:
        """Begin, after the engine has started and its model is known."""
        self._name, self._block_tokens = card.name, indexed_tokens(card.kv_block_tokens)
        self._adapters = frozenset(card.adapters)
        if card.tokenizer:
            self.mode = "exact" if self._exact else "approximate"
        early, self._early = self._early or [], None
        for each in early:
            self.publish(each)

    @property
    def caches(self) -> Mapping[int, Cache]:
        """The known blocks, by rank."""
        return self._held if self.mode == "exact" else self._assumed

    # What metrics show. Any thread may read it.

    @property
    def exact(self) -> bool:
        """Whether the cache is known by the engine's events."""
        return self.mode == "exact"

    @property
    def known(self) -> int:
        """The blocks that are known."""
        return sum(len(each) for each in list(self.caches.values()))

    @property
    def unusable(self) -> int:
        """Blocks in events that could not be used."""
        held = list(self._held.values())
        return sum(each.orphans + each.unknown + each.dropped + each.malformed for each in held)

    @property
    def asked(self) -> int:
        """Tokens of prompts for which the engine has told the cached tokens."""
        return sum(each.asked_tokens for each in list(self._assumed.values()))

    @property
    def believed(self) -> int:
        """Those of them that were believed to be cached."""
        return sum(each.believed_tokens for each in list(self._assumed.values()))

    @property
    def measured(self) -> int:
        """Those of them that were."""
        return sum(each.measured_tokens for each in list(self._assumed.values()))

    @property
    def watchers(self) -> int:
        """How many routers watch."""
        return len(self._subscribers)

    def publish(self, events: CacheEvents) -> None:
        """Take events of the engine. Called on the event loop."""
        if self._early is not None:
            self._early.append(events)
            return
        self.events += len(events.events)
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None
        if self.silent:
            logger.info("the engine of model %r reports its KV cache now", self._name)
            self._switch("exact", silent=False)
        if self.mode != "exact":
            return
        held = self._held.get(events.rank)
        if held is None:
            held = self._held[events.rank] = HeldBlocks(self._block_tokens)
        change = held.apply(events.events)
        if held.ambiguous:  # It has logged why its events do not count.
            self._switch("approximate", silent=False)
        elif change:
            self._changed(events.rank, change)

    # Requests.

    def begun(self, request: Request) -> Running:
        """Note that the engine begins with a request."""
        self._number += 1
        rank, router, prompt = request.rank, request.router, request.prompt
        tokens = max(1, len(prompt) // 4 or len(request.text or "") // 4)
        keys: Sequence[int] = ()
        told = any(each.router != router for each in self._subscribers)
        seed = 0
        if prompt and (told or self.mode == "approximate"):
            seed = seed_of(request.model if request.model in self._adapters else "", request.cache_salt)
            keys = block_keys(prompt, self._block_tokens, seed)
        entry = Entry(self._number, router, rank, tokens, keys, self._loop.time())
        entry.computed = request.kv_transfer is not None
        self.entries[entry.number] = entry
        running = Running(entry, self.events)
        if self.mode == "approximate":
            assumed = self._assumed.get(rank)
            if assumed is None:
                assumed = self._assumed[rank] = AssumedBlocks(self._block_tokens, self._cache_tokens())
            running.asked = assumed.request(keys, tokens)
            if prompt:
                running.chain, running.answer = (prompt, keys, seed), []
            if running.asked.change:
                self._changed(rank, running.asked.change)
        if told:
            for subscriber in self._subscribers:
                subscriber.begun(entry)
            self._wake()
        return running

    def computed(self, running: Running, usage: Usage | None) -> None:
        """Note a request's first output."""
        entry = running.entry
        fetched, entry.computed = entry.computed, True
        entry.keys = ()
        cached = -1 if usage is None else usage.cached_tokens
        self._tells_cached = self._tells_cached or cached > 0
        for subscriber in self._subscribers:
            subscriber.computed(entry, cached)
        self._wake()
        if self.mode == "exact" and self._silence is None and not fetched and self.events == running.events_before:
            # A prompt whose whole blocks were cached leads to no event. 0 may mean that the engine does not tell.
            whole = entry.tokens // self._block_tokens * self._block_tokens
            if (whole > cached + self._block_tokens) if self._tells_cached else (whole and not self.events):
                self._silence = self._loop.call_later(SILENT_S, self._heard_nothing)

    def used(self, running: Running, usage: Usage) -> None:
        """Note what the engine tells of a request's cached tokens."""
        asked, running.asked = running.asked, None
        assumed = self._assumed.get(running.entry.rank)
        if asked is not None and assumed is not None and (change := assumed.usage(asked, usage.cached_tokens)):
            self._changed(running.entry.rank, change)

    def ended(self, running: Running) -> None:
        """Note a request's end."""
        entry = running.entry
        if running.answer:
            self._answered(running)
        del self.entries[entry.number]
        for subscriber in self._subscribers:
            subscriber.ended(entry)
        self._wake()

    # Routers.

    async def watch(self, request: WatchRequest) -> AsyncIterator[WatchUpdate]:
        """Tell a router what there is, and then what changes."""
        subscriber, woken = Subscriber(request.router, self), asyncio.Event()
        self._subscribers[subscriber] = woken
        if self._used_timer is None:
            self._look_at_use()
        try:
            while True:
                while not subscriber.due:
                    woken.clear()
                    await woken.wait()
                update = WatchUpdate(
                    mode=self.mode,
                    silent=self.silent,
                    block_tokens=self._block_tokens,
                    ranks=max(self.caches, default=0) + 1,
                    kv_used=self._used,
                )
                before = subscriber.snapshots
                more = subscriber.take(update, self._loop.time())
                self.snapshots += subscriber.snapshots - before
                yield update
                await asyncio.sleep(0 if more else GAP_S)
        finally:
            del self._subscribers[subscriber]

    def close(self) -> None:
        """End the timers."""
        for timer in (self._used_timer, self._silence):
            if timer is not None:
                timer.cancel()
        self._used_timer = self._silence = None

    def problem(self) -> str | None:
        """What is wrong, for `/health`. May be called from any thread."""
        if not self.silent:
            return None
        return (
            f"the engine of model {self._name!r} should report its KV cache and does not: routing is approximate. "
            "Is its prefix cache on, and does it publish events?"
        )

    def _answered(self, running: Running) -> None:
        """Note that the assumed cache holds an answer too, as the next turn of a conversation contains it."""
        assumed = self._assumed.get(running.entry.rank)
        (prompt, keys, seed), answer, size = running.chain, running.answer or [], self._block_tokens
        rest = prompt[4 * size * len(keys) :]
        if assumed is None or len(rest) // 4 + len(answer) <= size:
            return
        try:
            rest += packed(answer[:-1])  # The engine has not read the last token: its block is not complete.
        except (OverflowError, TypeError):  # Invalid token ids, of which the front end complains.
            return
        keys = [*keys, *block_keys(rest, size, keys[-1] if keys else seed)]
        if change := assumed.request(keys, 0).change:
            self._changed(running.entry.rank, change)

    def _changed(self, rank: int, change: Change) -> None:
        for subscriber in self._subscribers:
            subscriber.changed(rank, change)
        self._wake()

    def _wake(self) -> None:
        for subscriber, woken in self._subscribers.items():
            if subscriber.due:
                woken.set()

    def _switch(self, mode: CacheMode, *, silent: bool) -> None:
        self.mode, self.silent = mode, silent
        self._held, self._assumed = {}, {}
        for subscriber in self._subscribers:
            subscriber.restart()
        self._wake()

    def _heard_nothing(self) -> None:
        self._silence = None
        self._switch("approximate", silent=True)
        logger.warning("%s", self.problem())

    def _look_at_use(self) -> None:
        self._used_timer = None
        if not self._subscribers:
            return
        metrics = self._engine.metrics()
        if metrics is not None and metrics.kv_blocks_total:
            used = metrics.kv_blocks_used / metrics.kv_blocks_total
            if abs(used - self._used) >= USED_STEP:
                self._used = used
                for subscriber in self._subscribers:
                    subscriber.due = True
                self._wake()
        self._used_timer = self._loop.call_later(USED_S, self._look_at_use)

    def _cache_tokens(self) -> int:
        metrics = self._engine.metrics()
        return (metrics and metrics.kv_blocks_total * metrics.kv_block_tokens) or CACHE_TOKENS


class Running:
    """A request that runs.

    Attributes:
        entry: what routers learn of it.
        events_before: how many events of the engine had come before it.
        asked: what was believed of the cache when it came; None in another mode, or when the engine has told.
        chain: the prompt, the keys of its whole blocks, and the seed of the first one, in the mode `approximate`.
        answer: takes the tokens of the answer in that mode; None in another one.
    """

    __slots__ = ("answer", "asked", "chain", "entry", "events_before")

    def __init__(self, entry: Entry, events_before: int) -> None:
        self.entry, self.events_before = entry, events_before
        self.asked: Asked | None = None
        self.chain: tuple[bytes, Sequence[int], int] = (b"", (), 0)
        self.answer: list[int] | None = None

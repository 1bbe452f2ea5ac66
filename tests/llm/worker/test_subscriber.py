"""What a router is told: applied in order it gives the state of the worker, however slowly the router reads."""

from __future__ import annotations

import random
from array import array

import pytest

from triton_distributed.llm.contract.cache import BlocksStored
from triton_distributed.llm.contract.watching import WatchUpdate, keys_of
from triton_distributed.llm.kv_events.change import Change
from triton_distributed.llm.kv_events.held import HeldBlocks
from triton_distributed.llm.worker import subscriber as module
from triton_distributed.llm.worker.subscriber import Entry, Subscriber


class Blocks(dict[int, None]):
    """A cache whose snapshot reads what is there at each slice, as the real ones do."""

    def snapshot(self, slice_keys):
        keys = list(self)
        while keys:
            yield array("Q", (each for each in keys[:slice_keys] if each in self))
            del keys[:slice_keys]


class Source:
    def __init__(self):
        self.caches = {0: Blocks(), 1: Blocks()}
        self.entries = {}


class Copy:
    """What a router makes of the updates."""

    def __init__(self):
        self.blocks, self.requests, self.whole = {}, {}, False

    def apply(self, update):
        if update.begins:
            self.blocks, self.requests = {}, {}
        for each in update.blocks:
            held = self.blocks.setdefault(each.rank, set())
            if each.change == "cleared":
                held.clear()
            elif each.change == "stored":
                held.update(keys_of(each.keys))
            else:
                held.difference_update(keys_of(each.keys))
        for each in update.begun:
            assert each.number not in self.requests
            self.requests[each.number] = each.computed
        for each in update.computed:
            assert self.requests[each.number] is False
            self.requests[each.number] = True
        for number in update.ended:
            del self.requests[number]
        self.whole = not update.more


def take(subscriber, now=0.0):
    update = WatchUpdate()
    subscriber.take(update, now)
    return update


@pytest.mark.parametrize("seed", range(6))
def test_what_is_told_gives_the_state_of_the_worker(seed, monkeypatch):
    chance = random.Random(seed)
    monkeypatch.setattr(module, "UPDATE_KEYS", 7)
    monkeypatch.setattr(module, "LEAST_WAITING", 60)
    source, fresh = Source(), iter(range(1, 10**9))
    pairs = [(Subscriber(5, source), Copy(), patience) for patience in (0.9, 0.3, 0.03)]

    def tell(rank, **change):
        kinds = {"stored": array("Q"), "removed": array("Q"), **change}
        for subscriber, _, _ in pairs:
            subscriber.changed(rank, Change(**kinds))

    for _ in range(800):
        kind, rank = chance.random(), chance.randrange(2)
        blocks = source.caches[rank]
        if kind < 0.4:
            keys = array("Q", (next(fresh) for _ in range(chance.randrange(1, 12))))
            blocks.update(dict.fromkeys(keys))
            tell(rank, stored=keys)
        elif kind < 0.6 and blocks:
            keys = array("Q", chance.sample(list(blocks), min(len(blocks), 9)))
            for each in keys:
                del blocks[each]
            tell(rank, removed=keys)
        elif kind < 0.61:
            blocks.clear()
            key = next(fresh)
            blocks[key] = None
            tell(rank, cleared=True, stored=array("Q", [key]))
        elif kind < 0.75:
            entry = Entry(next(fresh), chance.choice((5, 6)), rank, 100, (1, 2, 3), 0.0)
            source.entries[entry.number] = entry
            for subscriber, _, _ in pairs:
                subscriber.begun(entry)
        elif kind < 0.9 and source.entries:
            entry = chance.choice(list(source.entries.values()))
            if not entry.computed:
                entry.computed = True
                for subscriber, _, _ in pairs:
                    subscriber.computed(entry, 64)
            else:
                del source.entries[entry.number]
                for subscriber, _, _ in pairs:
                    subscriber.ended(entry)
        for subscriber, copy, patience in pairs:
            if subscriber.due and chance.random() < patience:
                update = take(subscriber)
                assert sum(len(each.keys) // 8 for each in update.blocks) <= 2 * 7
                copy.apply(update)
    for subscriber, copy, _ in pairs:
        while subscriber.due:
            copy.apply(take(subscriber))
        assert copy.whole
        for rank, blocks in source.caches.items():
            assert copy.blocks.get(rank, set()) == set(blocks)
        assert copy.requests == {n: each.computed for n, each in source.entries.items() if each.router != 5}
    quick, _, slow = (subscriber.snapshots for subscriber, _, _ in pairs)
    assert quick < slow


def test_what_waits_for_a_router_that_does_not_read_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "LEAST_WAITING", 100)
    source = Source()
    subscriber = Subscriber(5, source)
    take(subscriber)
    most = 0
    for first in range(0, 10_000, 10):
        keys = array("Q", range(first, first + 10))
        source.caches[0].update(dict.fromkeys(keys[:1]))
        subscriber.changed(0, Change(keys, array("Q")))
        most = max(most, subscriber._waiting)
    assert most < 2 * 1000 + 100
    assert subscriber.due


def test_a_request_that_has_ended_before_it_was_told_is_not_told():
    source = Source()
    subscriber = Subscriber(5, source)
    take(subscriber)
    one, two = Entry(1, 6, 0, 100, (1, 2), 10.0), Entry(2, 6, 0, 50, (), 11.0)
    for each in (one, two):
        subscriber.begun(each)
    two.computed = True
    subscriber.computed(two, 0)
    subscriber.ended(one)
    update = take(subscriber, 12.5)
    assert [(each.number, each.tokens, each.age_s, each.computed) for each in update.begun] == [(2, 50, 1.5, True)]
    assert (update.computed, update.ended, subscriber.due) == ([], [], False)


def test_a_snapshot_of_prompts_that_are_shorter_than_a_key_takes_several_updates(monkeypatch):
    monkeypatch.setattr(module, "UPDATE_KEYS", 8)
    source, held = Source(), HeldBlocks(64)
    source.caches = {0: held}  # type: ignore[dict-item]
    for name in range(100):
        held.apply([BlocksStored(hashes=[name], parent=None, tokens=bytes(64), block_tokens=16)])
    subscriber = Subscriber(5, source)
    updates: list[WatchUpdate] = []
    while not updates or updates[-1].more:
        updates.append(take(subscriber))
    assert len(updates) > 2  # A loop would else stand still while a million of them are looked at.
    assert not any(each.blocks for each in updates)

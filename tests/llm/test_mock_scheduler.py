"""The mock engine's KV cache and scheduler: hits, eviction, preemption, events, and no block lost."""

import asyncio
import sys

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_distributed.llm import InvalidParameter, Request, packed
from triton_distributed.llm.contract.cache import BlocksRemoved, BlocksStored, CacheCleared
from triton_distributed.llm.engines.mock.cache import Cache
from triton_distributed.llm.engines.mock.engine import MockEngine
from triton_distributed.llm.engines.mock.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, encoded
from triton_distributed.llm.engines.mock.scheduler import Scheduler, Sequence, block_keys
from triton_distributed.llm.kv_events.held import HeldBlocks
from triton_distributed.llm.routing.keys import block_keys as index_keys
from triton_distributed.testing import run_in_virtual_time

FREE = "tcp://127.0.0.1:*"
KEYS = [bytes([number]) * 8 for number in range(9)]


def ids(count, first=0):
    return packed(range(first, first + count))


async def answered(engine, prompt, **fields):
    found = [each async for each in engine.generate(Request(prompt=prompt, **fields))]
    usage = found[-1].usage
    told = found[0].usage.cached_tokens if found[0].usage is not None else 0
    assert told == usage.cached_tokens, "the first output says it too: the last one may be lost with the worker"
    return [token for each in found for token in each.token_ids], usage


def sequence(prompt, answer, block_tokens=4):
    return Sequence(len(prompt) // 4, len(answer) // 4, block_keys(prompt + answer, block_tokens), prompt + answer)


def stored(cache, keys, parent=None):
    cache.allocate(len(keys))
    cache.store(keys, parent, ids(len(keys) * cache.block_tokens))


def test_prefixes_are_shared_and_the_longest_unused_block_is_evicted_first():
    cache = Cache(4, 2, record=True)
    stored(cache, KEYS[:2])
    stored(cache, KEYS[2:4])
    cache.hold(KEYS[:1])
    assert (cache.used, cache.available) == (4, 0)
    cache.release(KEYS[:2], 0)
    assert (cache.used, cache.available) == (3, 1), "the first block has a second holder"
    cache.release(KEYS[2:4], 0)
    cache.release(KEYS[:1], 0)
    cache.take_events()
    cache.allocate(3)
    assert cache.take_events() == [BlockRemoved(block_hashes=[KEYS[1], KEYS[3], KEYS[2]])]
    assert cache.depth(KEYS[:2]) == 1


def test_events_tell_what_is_in_the_cache():
    cache = Cache(6, 2, record=True)
    stored(cache, KEYS[:1])
    stored(cache, KEYS[:3])
    found = [msgspec.structs.astuple(each)[:3] for each in cache.take_events()]
    assert found == [
        (KEYS[:1], None, packed([0, 1])),
        (KEYS[1:3], KEYS[0], packed([2, 3, 4, 5])),
    ]
    assert cache.used == 3, "a block that is there already is held instead of the new one"
    assert not cache.clear(), "blocks are held"
    cache.release(KEYS[:3], 0)
    cache.release(KEYS[:1], 0)
    assert cache.clear()
    assert cache.take_events() == [AllBlocksCleared()]
    assert cache.depth(KEYS[:1]) == 0
    assert cache.available == 6


def test_events_have_the_forms_of_vllm():
    event = BlockStored(block_hashes=[b"key"], parent_block_hash=None, tokens=packed([1, 2]), block_size=2)
    assert msgspec.msgpack.decode(encoded(2.5, [event, AllBlocksCleared()])) == {
        "ts": 2.5,
        "events": [
            {
                "type": "BlockStored",
                "block_hashes": [b"key"],
                "parent_block_hash": None,
                "token_ids": [1, 2],
                "block_size": 2,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
            },
            {"type": "AllBlocksCleared"},
        ],
        "data_parallel_rank": None,
    }
    removed = BlockRemoved(block_hashes=[b"key"])
    assert msgspec.msgpack.decode(encoded(2.5, [event, removed], "array", 3)) == [
        2.5,
        [["BlockStored", [b"key"], None, [1, 2], 2, None, "GPU", None], ["BlockRemoved", [b"key"], "GPU"]],
        3,
    ]


def test_cached_tokens_are_counted_exactly():
    async def program():
        engine = MockEngine(itl_ms="1", block_tokens="4")
        found = []
        for prompt in (ids(10), ids(10), ids(8), ids(14), ids(10, first=1)):
            found.append((await answered(engine, prompt, max_tokens=2))[1].cached_tokens)
        state = engine.metrics()
        assert (state.cached_tokens, state.prompt_tokens, state.generated_tokens) == (sum(found), 52, 10)
        assert state.kv_blocks_used == 0
        assert engine.clear_cache()
        assert (await answered(engine, ids(10)))[1].cached_tokens == 0
        await engine.close()
        return found

    # The last token of a prompt is always computed, so a prompt of 8 tokens has one block from the cache.
    assert run_in_virtual_time(program()) == [0, 8, 4, 8, 0]


def test_a_long_prompt_is_computed_in_pieces_beside_others():
    scheduler = Scheduler(Cache(99, 4), slots=8, batch_tokens=10)
    short, long = sequence(ids(3), ids(9)), sequence(ids(25, 100), ids(1))
    scheduler.add(short)
    scheduler.add(long)
    steps = []
    while long.generated < 1:
        step = scheduler.step()
        steps.append((step.prefill_tokens, step.decoding))
        scheduler.complete(step)
    assert steps == [(10, 0), (9, 1), (9, 1)]
    assert short.generated == 3


def test_preempted_requests_answer_the_same_and_later():
    async def program(blocks):
        engine = MockEngine(ttft_ms="5", itl_ms="1", blocks=blocks, block_tokens="4")
        both = await asyncio.gather(*(answered(engine, ids(20, 100 * n), max_tokens=30) for n in range(4)))
        state = engine.metrics()
        assert (state.active, state.waiting, state.kv_blocks_used) == (0, 0, 0)
        await engine.close()
        return [tokens for tokens, _ in both], state.preemptions, asyncio.get_running_loop().time()

    tokens, none, quick = run_in_virtual_time(program("1000"))
    same, some, slow = run_in_virtual_time(program("26"))
    assert same == tokens
    assert none == 0 < some
    assert slow > quick


def test_a_preempted_request_begins_again_before_those_that_wait():
    scheduler = Scheduler(Cache(6, 4), slots=2, batch_tokens=4)
    oldest, victim, last = (sequence(ids(size, 100 * size), ids(6, 50)) for size in (8, 11, 3))
    for each in (oldest, victim, last):
        scheduler.add(each)
    for _ in range(6):
        scheduler.complete(scheduler.step())
    assert scheduler.preemptions == 0
    step = scheduler.step()
    assert (step.decoding, step.prefill_tokens) == (1, 0), "a step that takes blocks from a request begins no other"
    assert (scheduler.running, list(scheduler.waiting)) == ([oldest], [victim, last])
    assert scheduler.preemptions == 1
    scheduler.complete(step)
    for _ in range(50):
        if scheduler.running or scheduler.waiting:
            scheduler.complete(scheduler.step())
    assert all(each.finished for each in (oldest, victim, last))
    assert scheduler.cached_tokens == 0, "what a preempted request finds of its own does not count"


def test_a_request_removed_during_a_step_gets_no_token():
    scheduler = Scheduler(Cache(5, 4), slots=2, batch_tokens=20)
    stays, goes = sequence(ids(4), ids(4)), sequence(ids(4, 50), ids(4))
    scheduler.add(stays)
    scheduler.add(goes)
    step = scheduler.step()
    scheduler.remove(goes)
    scheduler.complete(step)
    assert (stays.generated, goes.generated, scheduler.generated_tokens, scheduler.cache.used) == (1, 0, 1, 1)
    scheduler.remove(goes)
    assert scheduler.running == [stays]


def test_a_request_begins_when_all_of_it_has_room():
    scheduler = Scheduler(Cache(5, 4), slots=2, batch_tokens=8)
    first, second = sequence(ids(8), ids(8)), sequence(ids(12, 50), ids(1))
    scheduler.add(first)
    scheduler.add(second)
    scheduler.complete(scheduler.step())
    step = scheduler.step()
    assert (step.decoding, step.prefill_tokens) == (1, 0), "a piece of the second would have room, not all of it"
    scheduler.remove(first)
    scheduler.complete(step)
    assert scheduler.step().prefill_tokens == 8


def test_a_step_costs_the_same_for_one_sequence_and_for_many():
    def lines(count):
        scheduler = Scheduler(Cache(9000, 64), slots=256, batch_tokens=8192)
        for number in range(count):
            scheduler.add(Sequence(32, 999, [1000 * number + each for each in range(16)]))
        scheduler.complete(scheduler.step())
        done = 0

        def trace(frame, event, argument):
            nonlocal done
            done += event == "line"
            return trace

        sys.settrace(trace)
        try:
            for _ in range(30):  # No sequence needs a block or ends in these.
                scheduler.complete(scheduler.step())
        finally:
            sys.settrace(None)
        assert scheduler.generated_tokens == 31 * count
        return done

    before = sys.gettrace()
    try:
        assert lines(1) == lines(200)
    finally:
        sys.settrace(before)


def test_what_never_fits_in_the_cache_is_refused():
    engine = MockEngine(itl_ms="1", blocks="4", block_tokens="4")
    with pytest.raises(InvalidParameter, match="with its answer it has 17 tokens, and the KV cache has room for 16"):
        run_in_virtual_time(answered(engine, ids(10), max_tokens=7))
    assert len(run_in_virtual_time(answered(engine, ids(10), max_tokens=6))[0]) == 6


def test_a_cancelled_request_frees_its_blocks_at_once():
    async def program():
        engine = MockEngine(itl_ms="10", slots="1", block_tokens="4")
        running = asyncio.create_task(answered(engine, ids(8), max_tokens=100))
        waiting = asyncio.create_task(answered(engine, ids(8), max_tokens=100))
        await asyncio.sleep(0.035)
        state = engine.metrics()
        assert (state.active, state.waiting, state.kv_blocks_used) == (1, 1, 3)
        waiting.cancel()
        running.cancel()
        await asyncio.gather(waiting, running, return_exceptions=True)
        state = engine.metrics()
        assert (state.active, state.waiting, state.kv_blocks_used) == (0, 0, 0)
        assert len((await answered(engine, ids(8), max_tokens=3))[0]) == 3
        await engine.close()
        assert len(asyncio.all_tasks()) == 1

    run_in_virtual_time(program())


def test_the_events_of_an_engine_are_reported_when_the_step_begins():
    async def program():
        engine = MockEngine(ttft_ms="10", block_tokens="4")
        loop, found = asyncio.get_running_loop(), []
        began = loop.time()
        assert engine.kv_events(lambda events: found.append((loop.time() - began, events)))
        await answered(engine, ids(9), max_tokens=1)
        assert engine.clear_cache()
        await engine.close()
        return found

    (at, first), (_, last) = run_in_virtual_time(program())
    assert at == 0, "as in vLLM, when the step begins that computes the blocks"
    (stored,) = first.events
    assert (stored.tokens, stored.block_tokens, stored.parent) == (ids(8), 4, None)
    assert last.events == [CacheCleared()]


def test_an_eviction_is_reported_before_the_step_that_needs_the_block():
    async def program():
        engine = MockEngine(ttft_ms="10", blocks="3", block_tokens="4")
        loop = asyncio.get_running_loop()
        found: list[tuple[float, type]] = []
        engine.kv_events(lambda events: found.extend((loop.time(), type(each)) for each in events.events))
        await answered(engine, ids(8), max_tokens=1)
        began = loop.time()
        await answered(engine, ids(8, 50), max_tokens=1)
        await engine.close()
        return [(round(at - began, 6), kind) for at, kind in found]

    assert run_in_virtual_time(program()) == [(-0.01, BlocksStored), (0, BlocksRemoved), (0, BlocksStored)]


def test_a_failing_receiver_of_events_fails_the_request():
    async def program():
        def fail(events):
            raise OSError("no receiver")

        engine = MockEngine(itl_ms="1", block_tokens="4")
        engine.kv_events(fail)
        with pytest.raises(OSError, match="no receiver"):
            await answered(engine, ids(9))
        assert engine.metrics().kv_blocks_used == 0
        await engine.close()

    run_in_virtual_time(program())


def test_an_engine_without_a_cache_or_with_events_off_reports_none():
    assert not MockEngine().kv_events(lambda events: None)
    assert not MockEngine(itl_ms="1", kv_events="off").kv_events(lambda events: None)
    with pytest.raises(InvalidParameter, match="kv_replay"):
        MockEngine(itl_ms="1", kv_replay="tcp://127.0.0.1:1")
    with pytest.raises(InvalidParameter, match="kv_event_form"):
        MockEngine(itl_ms="1", kv_event_form="text")  # type: ignore[arg-type]
    with pytest.raises(InvalidParameter, match="no KV cache"):
        MockEngine(kv_events="tcp://127.0.0.1:1")


@pytest.mark.parametrize("form", ["map", "array"])
def test_events_over_zeromq_give_what_the_cache_holds(form):
    async def program():
        engine = MockEngine(
            ttft_ms="1", block_tokens="4", blocks="8", kv_events=FREE, kv_replay=FREE, kv_event_form=form
        )
        held, key = HeldBlocks(4), asyncio.Event()
        found: set[int] = set()

        def publish(events):
            change = held.apply(events.events)
            found.difference_update(change.removed)
            found.update(change.stored)
            key.set()

        assert engine.kv_events(publish)
        await engine.start()
        for first in range(5):
            await answered(engine, ids(17, 10 * first), max_tokens=1)
        # The last prompt needs five of eight blocks, and the one before keeps three.
        expected = {*index_keys(ids(17, 30), 4)[:3], *index_keys(ids(17, 40), 4)}
        async with asyncio.timeout(20):
            while found != expected:
                key.clear()
                await key.wait()
        assert (held.orphans, held.unknown) == (0, 0)
        await engine.close()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(program())


def test_the_preset_dynamo_has_its_times():
    async def program():
        engine = MockEngine(speed="dynamo")
        loop = asyncio.get_running_loop()
        began, found = loop.time(), []
        async for _ in engine.generate(Request(prompt=ids(1000), max_tokens=2)):
            found.append(loop.time() - began)
        await engine.close()
        return found

    first, second = run_in_virtual_time(program())
    assert first * 1000 == pytest.approx(4.209989e-07 * 1000**2 + 1.518344e-02 * 1000 + 16.50142)
    used = 1001 / (16_384 * 64)
    assert (second - first) * 1000 == pytest.approx(-25.74 * used**2 + 54.01 * used + 5.74)


def test_a_prompt_that_another_worker_has_computed_costs_a_step_of_decoding():
    there, here = Scheduler(Cache(16, 4), 4, 100), Scheduler(Cache(16, 4, record=True), 4, 100)
    prompt, answer = ids(18), ids(5, 1000)
    first = sequence(prompt, answer[:4])
    first.keeps = True
    there.add(first)
    assert there.complete(there.step()) == [first]
    assert (there.cache.used, there.running) == (5, []), "the blocks stay until they are fetched"
    there.remove(first)
    assert there.cache.used == 0

    long, rest = sequence(ids(40, 500), ids(1, 900)), sequence(prompt, answer)
    rest.fetched = True
    here.add(long)
    here.add(rest)
    step = here.step()
    assert (step.prefilled, step.prefill_tokens, step.decoding) == ([rest, long], 40, 1), "it goes before a prefill"
    told = here.cache.take_events()[0]
    assert isinstance(told, BlockStored)
    assert told.tokens == prompt[: 4 * 16], "others learn that the blocks are here, too"
    here.complete(step)
    assert (rest.generated, rest.cached_tokens) == (1, 0)
    while here.running:
        here.complete(here.step())
    assert (rest.generated, here.cache.used) == (5, 0)


KINDS = st.sampled_from(["whole", "whole", "keeps", "fetched"])
REQUESTS = st.tuples(st.integers(1, 24), st.integers(1, 12), st.integers(0, 2), KINDS)
ACTIONS = st.lists(st.one_of(REQUESTS, st.just("step"), st.integers(0, 5)), max_size=40)


@settings(max_examples=150, deadline=None)
@given(ACTIONS, st.integers(9, 14), st.integers(1, 4), st.integers(1, 30))
def test_no_block_is_lost_or_freed_twice(actions, blocks, slots, batch_tokens):
    cache = Cache(blocks, 4)
    scheduler = Scheduler(cache, slots, batch_tokens)
    alive: list[Sequence] = []
    ended: list[Sequence] = []  # They keep their blocks.

    def check():
        holding = [*scheduler.running, *ended]
        shared = {key for each in holding for key in each.keys[: each.stored]}
        own = sum(each.blocks - each.stored for each in holding)
        assert cache.used == len(shared) + own <= blocks, "exactly the blocks of these sequences are held"
        for each in scheduler.running:
            if each is not scheduler._piece:  # A preempted sequence may be computed anew in pieces.
                assert each.blocks * 4 >= each.prompt_tokens + each.generated - 1 or each.generated == 0
        assert not any(each.blocks for each in scheduler.waiting)

    def step():
        before = {each: each.generated for each in alive}
        found = scheduler.step()
        assert not found.empty or ended, "there is always progress"
        if found.empty:
            scheduler.remove(ended.pop(0))
        assert found.prefill_tokens + found.decoding <= batch_tokens
        assert len(scheduler.running) <= slots
        check()
        finished = scheduler.complete(found)
        assert [each for each in alive if each.finished] == [each for each in alive if each in finished]
        for each in finished:
            alive.remove(each)
            if each.keeps:
                ended.append(each)
        for each in alive:
            assert each.generated - before[each] in (0, 1)
        check()

    for action in actions:
        if isinstance(action, tuple):
            prompt, answer, first, kind = action
            alive.append(sequence(ids(prompt, first), ids(answer, 1000)))
            alive[-1].keeps, alive[-1].fetched = kind == "keeps", kind == "fetched"
            scheduler.add(alive[-1])
        elif action == "step" and alive:
            step()
        elif action != "step" and action < len(alive):
            scheduler.remove(alive.pop(action))
            check()
    for _ in range(20_000):
        if not alive:
            break
        step()
    assert not alive, "each sequence comes to its end"
    for each in ended:
        scheduler.remove(each)
    ended.clear()
    check()
    assert not scheduler.running
    assert not scheduler.waiting
    assert cache.clear()
    assert cache.available == blocks

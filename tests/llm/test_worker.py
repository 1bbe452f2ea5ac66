"""An engine as endpoints: what callers get, admission, cancellation, its end, and which models there are."""

import asyncio

import pytest

import triton_distributed as trd
from triton_distributed.discovery.base import Added, Removed, Snapshot
from triton_distributed.llm import (
    Embeddings,
    EmbedRequest,
    Engine,
    EngineDead,
    EngineMetrics,
    InvalidParameter,
    LLMError,
    Model,
    ModelCard,
    ModelConflict,
    Models,
    Output,
    Request,
)
from triton_distributed.llm.contract.records import metadata_of
from triton_distributed.llm.models.table import ModelTable
from triton_distributed.llm.worker import serve
from triton_distributed.llm.worker.serve import serve_model
from triton_distributed.names import EndpointName, Instance


class Echo(Engine):
    """Answers with the tokens of the prompt. `hold` lets it wait."""

    def __init__(self, name="echo", script=None, tokenizer="bytes", **card):
        self.model = Model(card=ModelCard(name=name, **card), tokenizer=tokenizer)
        self.script, self.hold, self.seen = script, None, []
        self.running, self.started, self.closed = 0, 0, 0

    async def start(self):
        self.started += 1

    async def generate(self, request):
        self.running += 1
        self.seen.append(request)
        try:
            if self.script is not None:
                for each in self.script:
                    if isinstance(each, Exception):
                        raise each
                    yield each
                return
            for each in request.token_ids:
                yield Output([each])
            if self.hold is not None:
                await self.hold.wait()
            yield Output(finish_reason="stop")
        finally:
            self.running -= 1

    async def embed(self, request):
        return Embeddings([bytes(4) for _ in request.texts], len(request.texts))

    def metrics(self):
        return EngineMetrics(active=self.running, generated_tokens=7)

    async def close(self):
        assert not self.running
        self.closed += 1


def connect():
    return trd.connect(trd.Config(discovery="memory", handle_signals=False, watchdog_s=0))


def generate(card):
    return trd.Stream[Request, Output](f"models.{card.component}.generate")


async def test_it_answers_embeds_gives_its_assets_and_closes_the_engine_after_the_drain():
    content = bytes(range(256)) * 10_000
    engine = Echo(tokenizer=content, embeddings=True)
    async with connect() as worker, connect() as here:
        served = await serve_model(worker, engine)
        assert served.instance.metadata == metadata_of(served.card)
        found = [each async for each in here.stream(generate(served.card), Request(prompt=b"\1\0\0\0\2\0\0\0"))]
        assert [each.token_ids for each in found] == [[1], [2], []]
        place = f"models.{served.card.component}"
        embed = trd.Unary[EmbedRequest, Embeddings](f"{place}.embed")
        assert len((await here.call(embed, EmbedRequest(texts=["a", "b"]))).vectors) == 2
        assets = trd.Stream[str, bytes](f"{place}.assets")
        parts = [each async for each in here.stream(assets, served.card.tokenizer)]
        assert len(parts) == 3
        assert b"".join(parts) == content
        with pytest.raises(InvalidParameter, match="nothing with the digest"):
            await anext(aiter(here.stream(assets, "other")))
        page = await asyncio.to_thread(worker.metrics.text)
        assert 'triton_llm_generated_tokens_total{model="echo"} 7.0' in page
        engine.hold = asyncio.Event()
        last = aiter(here.stream(generate(served.card), Request(prompt=b"\1\0\0\0")))
        await anext(last)
        closing = asyncio.ensure_future(worker.close())
        await asyncio.sleep(0)
        assert engine.closed == 0
        engine.hold.set()
        assert (await anext(last)).finish_reason == "stop"
        await closing
        await served.until_drained()
    assert (engine.started, engine.closed) == (1, 1)


async def test_workers_of_one_model_differ_in_their_role():
    engines = {role: Echo(role=role, embeddings=True) for role in ("both", "prefill", "decode")}
    told = {"blocks": [1]}
    async with connect() as both, connect() as prefill, connect() as decode, connect() as here:
        workers = {"both": both, "prefill": prefill, "decode": decode}
        served = {role: await serve_model(workers[role], engines[role]) for role in engines}
        (place,) = {each.card.component for each in served.values()}
        with pytest.raises(ModelConflict, match=r"context_tokens: 9 here, 0 there\n") as found:
            await serve_model(both, Echo(role="prefill", context_tokens=9))
        assert "role" not in str(found.value)
        listed = {}
        (await here.runtime.discovery.watch(None, lambda change: listed.update(vars_of(change)))).close()
        assert listed == {
            "generate": {served["both"].instance.id, served["decode"].instance.id},
            "embed": {served["both"].instance.id, served["decode"].instance.id},
            "prefill": {served["prefill"].instance.id},
            "assets": {each.instance.id for each in served.values()},
            "watch": {each.instance.id for each in served.values()},
        }
        got: list[Request] = []
        for role, endpoint in (("both", "generate"), ("decode", "generate"), ("prefill", "prefill")):
            engines[role].seen, own = got, served[role].instance.id
            contract = trd.Stream[Request, Output](f"models.{place}.{endpoint}")

            def mine(request, instances, load, own=own):
                return next(each for each in instances if each.id == own)

            async for _ in here.stream(contract, Request(kv_transfer=told), policy=mine):
                pass
        assert [each.kv_transfer for each in got] == [None, told, None], "only a decode worker fetches blocks"
        async with Models(here) as models:
            await models.wait_for("echo", 10)
            assert [each.card.name for each in models.list()] == ["echo"]


def vars_of(change):
    """The instances of a snapshot, by endpoint."""
    found: dict[str, set[int]] = {}
    for each in change.instances:
        found.setdefault(each.endpoint.endpoint, set()).add(each.id)
    return found


async def test_a_caller_that_leaves_ends_the_engines_work_and_a_full_engine_refuses():
    engine = Echo()
    engine.hold = asyncio.Event()
    async with connect() as worker, connect() as here:
        served = await serve_model(worker, engine, max_queue=0)
        stream = here.stream(generate(served.card), Request(prompt=b"\1\0\0\0"))
        await anext(aiter(stream))
        assert engine.running == 1
        with pytest.raises(trd.Overloaded):
            await anext(aiter(here.stream(generate(served.card), Request())))
        stream.cancel()
        async with asyncio.timeout(10):
            while engine.running:
                await asyncio.sleep(0)
        await served.stop()
        assert engine.closed == 1


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        ([Output([1])], LLMError, "ended without a finish reason"),
        ([Output(finish_reason="stop"), Output([1])], LLMError, "came after the one with the finish reason"),
        ([7], LLMError, "yielded int, not Output"),
        ([InvalidParameter("stop", "too many")], InvalidParameter, "stop: too many"),
        ([KeyError("lost")], KeyError, "lost"),
    ],
)
async def test_what_is_wrong_with_an_answer_reaches_the_caller(script, kind, words):
    async with connect() as worker, connect() as here:
        served = await serve_model(worker, Echo(script=script))
        with pytest.raises(kind, match=words) as caught:
            async for _ in here.stream(generate(served.card), Request()):
                pass
        if kind is InvalidParameter:
            assert caught.value.param == "stop"


async def test_an_engine_that_cannot_serve_is_closed_and_leaves_nothing():
    class NoModel(Echo):
        async def start(self):
            del self.model

    class Coroutine(Echo):
        async def generate(self, request):  # type: ignore[override]
            return None

    async with connect() as worker, connect() as other, connect() as here:
        for engine in (NoModel(), Echo(name="")):
            with pytest.raises(LLMError, match="model"):
                await serve_model(worker, engine)
            assert engine.closed == 1
        await serve_model(worker, Echo(context_tokens=4))
        engine = Echo(context_tokens=8)
        with pytest.raises(ModelConflict, match="context_tokens: 8 here, 4 there") as caught:
            await serve_model(other, engine)
        assert engine.closed == 1
        assert "generation 1" in str(caught.value)
        await serve_model(other, Echo(context_tokens=8, generation=1))
        served = await serve_model(other, Coroutine("coroutine"))
        with pytest.raises(LLMError, match="returned coroutine"):
            await anext(aiter(here.stream(generate(served.card), Request())))


async def test_of_two_cards_that_are_served_at_the_same_moment_the_older_one_stays(monkeypatch):
    async with connect() as first, connect() as second:
        nothing = asyncio.Future[None]()
        nothing.set_result(None)
        monkeypatch.setattr(serve, "_check_before", lambda *_: nothing)  # Both have looked before the other registered.
        engines = [Echo(context_tokens=each) for each in (4, 8)]
        found = await asyncio.gather(
            *(serve_model(c, e) for c, e in zip((first, second), engines, strict=True)), return_exceptions=True
        )
        (conflict,) = [each for each in found if isinstance(each, ModelConflict)]
        (stays,) = [each for each in found if isinstance(each, serve.ServingModel)]
        assert found.index(stays) == 0
        assert conflict.served_by.startswith(f"instance {stays.instance.id} ")
        assert [each.closed for each in engines] == [0, 1]


async def test_the_older_one_withdraws_if_the_younger_one_stays(monkeypatch):
    monkeypatch.setattr(serve, "YIELD_S", 0.05)
    async with connect() as first, connect() as second:
        await serve_model(first, Echo(context_tokens=4))
        nothing = asyncio.Future[None]()
        nothing.set_result(None)
        monkeypatch.setattr(serve, "_check_before", lambda *_: nothing)
        with monkeypatch.context() as clock, pytest.raises(ModelConflict, match="context_tokens: 8 here, 4 there"):
            clock.setattr("time.time", lambda: 1.0)  # Its clock is late: it seems to be the older one.
            await serve_model(second, Echo(context_tokens=8))


async def test_a_worker_whose_engine_is_dead_leaves_and_ends_with_that_error(caplog):
    dead, other = Echo(script=[Output([1]), EngineDead("out of memory")]), Echo()
    dead.hold = asyncio.Event()
    async with connect() as worker, connect() as here:
        served = await serve_model(worker, dead)
        found = aiter(here.stream(generate(served.card), Request()))
        await anext(found)
        with pytest.raises(EngineDead, match="the engine is dead: out of memory"):
            await anext(found)
        with pytest.raises(EngineDead, match="out of memory"):
            await served.until_drained()
        assert dead.closed == 1
        assert "the model 'echo' is not served any more: the engine is dead: out of memory" in caplog.text
        await serve_model(worker, other)  # The process may serve something else.
        found = [each async for each in here.stream(generate(served.card), Request(prompt=b"\1\0\0\0"))]
        assert [each.token_ids for each in found] == [[1], []]


async def test_a_dead_engine_may_say_so_when_it_embeds():
    class Dead(Echo):
        async def embed(self, request):
            raise EngineDead("gone")

    async with connect() as worker, connect() as here:
        served = await serve_model(worker, Dead(embeddings=True))
        embed = trd.Unary[EmbedRequest, Embeddings](f"models.{served.card.component}.embed")
        with pytest.raises(EngineDead, match="gone"):
            await here.call(embed, EmbedRequest(texts=["a"]))
        with pytest.raises(EngineDead, match="gone"):
            await served.until_drained()


async def test_an_invalid_request_is_one_line_in_the_log_of_the_worker(caplog):
    caplog.set_level("INFO", "triton_distributed.runtime")
    async with connect() as worker, connect() as here:
        served = await serve_model(worker, Echo(script=[InvalidParameter("stop", "too many")]))
        for _ in range(2):
            with pytest.raises(InvalidParameter):
                await anext(aiter(here.stream(generate(served.card), Request())))
    found = [each for each in caplog.records if "stop: too many" in each.getMessage()]
    assert [each.levelname for each in found] == ["INFO", "INFO"]
    assert not any(each.exc_text or each.exc_info for each in found)
    assert "an invalid request" in found[0].getMessage()


def record(card, id=1, since=10.0, component=""):
    name = EndpointName("models", component or card.component, "generate")
    return Instance(name, id, ("memory://x",), metadata=metadata_of(card), since=since)


def test_the_table_ranks_generations_and_a_model_leaves_with_its_last_instance(caplog):
    table = ModelTable("models")
    old, new = ModelCard(name="m", aliases=("a",)), ModelCard(name="m", generation=1)
    table.apply(Snapshot((record(old), record(old, 2), record(ModelCard(name="a"), 3))))
    assert table.ranked()["a"][0].card.name == "a", "a name goes before an alias"
    table.apply(Added(record(new, 4)))
    assert [each.card for each in table.ranked()["m"]] == [new, old]
    table.apply(Removed(record(old).endpoint, 1))
    assert old.component in table.entries
    table.apply(Removed(record(old).endpoint, 2))
    assert old.component not in table.entries
    assert not table.conflicts()
    later = ModelCard(name="m", generation=1, context_tokens=9)
    table.apply(Added(record(later, 5, since=20.0)))
    assert [(a.card, b.card) for a, b in table.conflicts()] == [(new, later)]
    table.apply(Added(record(later, 6, component="m-00000000")))
    assert "cannot be read" in caplog.text
    table.apply(Snapshot(()))
    assert not table.entries

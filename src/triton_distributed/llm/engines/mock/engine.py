"""The mock engine: an `Engine` whose answers follow from their requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from triton_distributed.llm.contract.cache import Publish
from triton_distributed.llm.contract.engine import Engine, EngineMetrics
from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.contract.model import Model, ModelCard
from triton_distributed.llm.contract.output import Embeddings, Output, Usage
from triton_distributed.llm.contract.request import EmbedRequest, Request, packed
from triton_distributed.llm.engines.mock.cache import Cache
from triton_distributed.llm.engines.mock.driver import Driver
from triton_distributed.llm.engines.mock.kv_events import Form, encoded, reported
from triton_distributed.llm.engines.mock.options import Text, timing
from triton_distributed.llm.engines.mock.publisher import EventPublisher
from triton_distributed.llm.engines.mock.scheduler import Scheduler, Sequence, block_keys
from triton_distributed.llm.engines.mock.tokens import EOS, MAX_LOGPROBS, Answer, answer, embedding, logprobs
from triton_distributed.llm.engines.mock.transfer import Keeper, fetch
from triton_distributed.llm.engines.options import read_role, whole
from triton_distributed.llm.kv_events.subscriber import EventSubscriber

DIMENSIONS = 64
_TURN = 16  # Outputs after which an engine without timing lets others run.
_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class MockEngine(Engine):
    """Simulates an engine. Its tokens are bytes, and its text is words without sense.

    Args:
        name: the model's name.
        speed: `instant` takes no time at all; `dynamo` has the timing of the mocker of NVIDIA Dynamo.
        ttft_ms, prefill_token_ms, itl_ms: instead of `speed`: the ms of a prefill, of each token of a prefill, and of a
            step of decoding.
        transfer_token_ms: the ms to hand over each token of a prompt to another engine, which is what a token has in
            the KV cache divided by the bandwidth.
        role: `prefill` computes prompts for engines with the role `decode`; see `ModelCard.role`.
        hold_s: seconds for which a computed prompt is kept if no engine fetches it.
        slots: the most requests that generate at once.
        blocks, block_tokens: the KV cache: how many blocks, and how many tokens a block has. With the speed `instant`
            there is no cache.
        batch_tokens: the most tokens that a step computes.
        context_tokens: the most tokens of prompt and answer together.
        answer_tokens: an answer ends after this many tokens, if not before; 0: it goes on up to `max_tokens`.
        tokens_per_output: how many tokens come at a time; 0 for the whole answer at once.
        seed: other seeds give other answers.
        kv_events: `on` reports the cache's events to the worker; `off` does not. With an endpoint of ZeroMQ, e.g.
            `tcp://127.0.0.1:5557`, they are published there as vLLM publishes them, and heard from there.
        kv_replay: with such an endpoint, another one that answers with earlier events.
        kv_event_form: `map` or `array`: how they are published; see `kv_events.encoded`.

    Raises:
        InvalidParameter: an option is invalid.
    """

    def __init__(
        self,
        *,
        name: str = "mock",
        speed: str = "",
        ttft_ms: Text = "",
        prefill_token_ms: Text = "",
        itl_ms: Text = "",
        slots: Text = 256,
        blocks: Text = 16_384,
        block_tokens: Text = 64,
        batch_tokens: Text = 8192,
        context_tokens: Text = 131_072,
        answer_tokens: Text = 256,
        tokens_per_output: Text = 1,
        seed: Text = 0,
        transfer_token_ms: Text = "",
        role: str = "both",
        hold_s: Text = 30,
        kv_events: str = "on",
        kv_replay: str = "",
        kv_event_form: Form = "map",
    ) -> None:
        if not name:
            raise InvalidParameter("name", "it is empty")
        paced = timing(speed, ttft_ms, prefill_token_ms, itl_ms, transfer_token_ms)
        part = read_role(role)
        if part != "both" and paced is None:
            reason = "the speed instant has no KV cache to hand over; give the option speed=dynamo, or times"
            raise InvalidParameter("role", reason)
        self._keeper = Keeper(paced) if paced is not None and part == "prefill" else None
        self._hold_s = whole("hold_s", hold_s, 1)
        self.slots = whole("slots", slots, 1)
        self._context_tokens = whole("context_tokens", context_tokens, 2)
        self._answer_tokens = whole("answer_tokens", answer_tokens, 0)
        self._tokens_per_output = whole("tokens_per_output", tokens_per_output, 0)
        self._seed = whole("seed", seed, 0)
        self._active = self._prompt_tokens = self._generated_tokens = 0
        cache = Cache(whole("blocks", blocks, 1), whole("block_tokens", block_tokens, 1))
        scheduler = Scheduler(cache, self.slots, whole("batch_tokens", batch_tokens, 1))
        over_zmq = kv_events not in ("on", "off")
        if over_zmq and paced is None:
            raise InvalidParameter("kv_events", "with the speed instant there is no KV cache")
        if kv_replay and not over_zmq:
            raise InvalidParameter("kv_replay", "kv_events is not an endpoint")
        if kv_event_form not in ("map", "array"):
            raise InvalidParameter("kv_event_form", f"expected map or array, got {kv_event_form!r}")
        self._driver = None if paced is None else Driver(scheduler, paced)
        self._reports, self._form = kv_events != "off", kv_event_form
        self._publisher = EventPublisher(kv_events, kv_replay) if over_zmq else None
        self._publish: Publish | None = None
        self._subscriber: EventSubscriber | None = None
        self.model = Model(
            card=ModelCard(
                name=name,
                context_tokens=self._context_tokens,
                eos_token_ids=(EOS,),
                embeddings=True,
                dimensions=DIMENSIONS,
                max_logprobs=MAX_LOGPROBS,
                guides=("json", "choice"),
                continues="always",
                kv_block_tokens=0 if paced is None else cache.block_tokens,
                engine="mock",
                role=part,
            ),
            tokenizer="bytes",
            template=_TEMPLATE,
        )

    def kv_events(self, publish: Publish) -> bool:
        """Report the cache's events. See `Engine.kv_events`."""
        if self._driver is None or not self._reports:
            return False
        self._publish = publish
        if self._publisher is None:
            self._driver.listen(lambda _, events: publish(reported(events)))
        return True

    async def start(self) -> None:
        """Publish the cache's events, if that was asked for, and hear them; and let other engines fetch prompts.

        Raises:
            ImportError: the extra `kv` is not installed.
            InvalidParameter: an endpoint is invalid, or in use.
        """
        if self._keeper is not None:
            await self._keeper.start()
        publisher, driver, form = self._publisher, self._driver, self._form
        if publisher is None or driver is None:
            return
        publisher.start()
        driver.listen(lambda at_s, events: publisher.publish(encoded(at_s, events, form)))
        if self._publish is not None:
            self._subscriber = EventSubscriber(publisher.endpoint, self._publish, replay=publisher.replay)
            self._subscriber.start()

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Answer a request. See `Engine.generate`.

        Raises:
            InvalidParameter: the prompt is empty, not token ids, or too long, or a field is out of its range.
        """
        prompt_tokens, planned = self._plan(request)
        end = len(planned.tokens)
        size = self._tokens_per_output or end
        driver, keeper, sequence = self._driver, self._keeper, None
        kv_transfer = None if keeper is None else keeper.keep()
        self._active += 1
        self._prompt_tokens += prompt_tokens
        sent = 0
        try:
            if driver is not None:
                sequence = _sequence(driver.scheduler, request, planned)
                sequence.keeps = keeper is not None
                if request.kv_transfer is not None:
                    here = driver.scheduler.cache.depth(sequence.keys) * driver.scheduler.cache.block_tokens
                    sequence.fetched = await fetch(request.kv_transfer, max(0, prompt_tokens - here))
                driver.scheduler.add(sequence)
            while sent < end:
                after = min(sent + size, end)
                if driver is not None and sequence is not None:
                    await driver.reach(sequence, after)
                else:
                    if sent and sent % (_TURN * size) == 0:
                        await asyncio.sleep(0)
                    self._generated_tokens += after - sent
                output = _output(request, planned, sent, after)
                if after == end or (sent == 0 and sequence is not None and sequence.cached_tokens > 0):
                    output.usage = Usage(prompt_tokens, after, 0 if sequence is None else sequence.cached_tokens)
                sent = after
                if keeper is not None and kv_transfer is not None and after == end:
                    output.kv_transfer, finish_reason = kv_transfer, output.finish_reason
                    output.finish_reason = None
                    yield output
                    await keeper.until_fetched(kv_transfer, self._hold_s)
                    output = Output(finish_reason=finish_reason, usage=output.usage)
                yield output
        finally:
            self._active -= 1
            if driver is not None and sequence is not None:
                driver.scheduler.remove(sequence)
            if keeper is not None and kv_transfer is not None:
                keeper.forget(kv_transfer)

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Make up vectors that follow from the texts. See `Engine.embed`.

        Raises:
            InvalidParameter: the inputs are not token ids, or there are too many dimensions.
        """
        dimensions = DIMENSIONS if request.dimensions is None else request.dimensions
        if not 1 <= dimensions <= DIMENSIONS:
            raise InvalidParameter("dimensions", f"expected 1 to {DIMENSIONS}, got {dimensions}")
        if request.texts:
            raise InvalidParameter("input", "the mock engine takes token ids, not text")
        if any(len(each) % 4 for each in request.prompts):
            raise InvalidParameter("input", "the token ids are not 4 bytes each")
        tokens = sum(len(each) // 4 for each in request.prompts)
        return Embeddings([embedding(each, dimensions, DIMENSIONS) for each in request.prompts], tokens)

    def metrics(self) -> EngineMetrics:
        """The state of the engine now."""
        if self._driver is None:
            return EngineMetrics(
                active=self._active, prompt_tokens=self._prompt_tokens, generated_tokens=self._generated_tokens
            )
        scheduler = self._driver.scheduler
        return EngineMetrics(
            active=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_blocks_used=scheduler.cache.used,
            kv_blocks_total=scheduler.cache.total,
            kv_block_tokens=scheduler.cache.block_tokens,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            generated_tokens=scheduler.generated_tokens,
            preemptions=scheduler.preemptions,
            kv_unread=0 if self._subscriber is None else self._subscriber.unread,
            kv_lost=0 if self._subscriber is None else self._subscriber.lost,
        )

    def clear_cache(self) -> bool:
        """Forget the KV cache. Returns False, and does nothing, while a request uses it. Call it on the event loop."""
        if self._driver is None:
            return True
        cleared = self._driver.scheduler.cache.clear()
        self._driver.publish()
        return cleared

    async def close(self) -> None:
        """Stop the steps, and the publishing."""
        if self._driver is not None:
            await self._driver.close()
        for each in (self._keeper, self._subscriber, self._publisher):
            if each is not None:
                await each.close()

    def _plan(self, request: Request) -> tuple[int, Answer]:
        """The number of the prompt's tokens, and the whole answer."""
        if request.text is not None or request.messages is not None:
            raise InvalidParameter("prompt", "the mock engine takes token ids, not text or messages")
        prompt_tokens, odd = divmod(len(request.prompt), 4)
        if odd:
            raise InvalidParameter("prompt", "the token ids are not 4 bytes each")
        if not prompt_tokens:
            raise InvalidParameter("prompt", "it is empty")
        if not 0 <= request.continued <= prompt_tokens:
            raise InvalidParameter("continued", f"expected 0 to {prompt_tokens}, got {request.continued}")
        if prompt_tokens >= self._context_tokens:
            reason = f"it has {prompt_tokens} tokens, and the context has room for {self._context_tokens}"
            raise InvalidParameter("prompt", reason, "context_length_exceeded")
        if request.max_tokens < 1:
            raise InvalidParameter("max_tokens", f"expected at least 1, got {request.max_tokens}")
        if request.tools:
            raise InvalidParameter("tools", "the mock engine takes none")
        guide = request.guide
        if guide is not None and not (guide.json or guide.choice):
            raise InvalidParameter(guide.field, "the mock engine takes json and choice only")
        if not -1 <= (-1 if request.sampling.logprobs is None else request.sampling.logprobs) <= MAX_LOGPROBS:
            raise InvalidParameter("logprobs", f"expected 0 to {MAX_LOGPROBS}, got {request.sampling.logprobs}")
        max_tokens = min(request.max_tokens, self._context_tokens - prompt_tokens)
        return prompt_tokens, answer(request, seed=self._seed, answer_tokens=self._answer_tokens, max_tokens=max_tokens)


def _output(request: Request, planned: Answer, first: int, last: int) -> Output:
    """The tokens from `first` to before `last` of an answer."""
    output = Output(list(planned.tokens[first:last]))
    if request.sampling.logprobs is not None:
        output.logprobs = logprobs(planned, first, last, request.sampling.logprobs)
    if last == len(planned.tokens):
        output.finish_reason, output.stop_reason = planned.finish_reason, planned.stop_reason
    return output


def _sequence(scheduler: Scheduler, request: Request, planned: Answer) -> Sequence:
    """A request as the scheduler needs it."""
    tokens = len(request.prompt) // 4 + len(planned.tokens)
    if not scheduler.fits(tokens):
        room = scheduler.cache.total * scheduler.cache.block_tokens
        reason = f"with its answer it has {tokens} tokens, and the KV cache has room for {room}"
        raise InvalidParameter("prompt", reason, "context_length_exceeded")
    ids = request.prompt + packed(list(planned.tokens))
    keys = block_keys(ids, scheduler.cache.block_tokens)
    return Sequence(len(request.prompt) // 4, len(planned.tokens), keys, ids)

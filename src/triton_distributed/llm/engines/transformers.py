"""Hugging Face's transformers as an engine: any decoder of its library, on CPU or GPU, with torch."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from triton_distributed.llm.contract.engine import Engine, EngineMetrics
from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.contract.output import Embeddings, Output
from triton_distributed.llm.contract.request import EmbedRequest, Request
from triton_distributed.llm.engines.checkpoint import Checkpoint, imported, read_checkpoint
from triton_distributed.llm.engines.options import whole, yes
from triton_distributed.llm.engines.transformers_batch import Batch, Job

__all__: list[str] = []

_DTYPES = ("auto", "float32", "bfloat16", "float16")


class TransformersEngine(Engine):
    """Serves a decoder with transformers: several answers at once, in one batch that requests join and leave.

    It is for models that no faster engine has. Each answer's prompt is computed anew: there is no prompt cache.

    Args:
        model: a folder, or a model of the Hugging Face hub.
        name: the name to serve it under; by default the folder's name, or `model`.
        slots: how many answers are generated at once.
        context_tokens: the most tokens of prompt and answer together; 0 for the model's own.
        device: where the model is, as torch names it, e.g. `cpu`, `cuda:1`; by default the accelerator if there is one.
        dtype: the type of the weights: `float32`, `bfloat16`, `float16`, or `auto` for that of the checkpoint.
        embeddings: `true` also serves embeddings: the mean of the last layer's states, with the length 1.

    Raises:
        InvalidParameter: an option is invalid.
    """

    def __init__(
        self,
        *,
        model: str,
        name: str = "",
        slots: str | int = 16,
        context_tokens: str | int = 0,
        device: str = "",
        dtype: str = "auto",
        embeddings: str | bool = False,
    ) -> None:
        self.slots = whole("slots", slots, 1)
        self._context = whole("context_tokens", context_tokens, 0)
        self._embeddings = yes("embeddings", embeddings)
        if dtype not in _DTYPES:
            raise InvalidParameter("dtype", f"expected one of {', '.join(_DTYPES)}, got {dtype!r}")
        folder = Path(model).expanduser()
        self._path = str(folder) if folder.is_dir() else model
        self._name = name or (folder.resolve().name if folder.is_dir() else model)
        self._device, self._dtype = device, dtype
        self._batch: Batch | None = None

    async def start(self) -> None:
        """Load the model.

        Raises:
            ImportError: transformers or torch is not installed.
            InvalidParameter: there is no such model or device, or the model cannot be served.
        """
        torch, transformers = imported("torch", "transformers"), imported("transformers", "transformers")
        files, loaded = await asyncio.to_thread(self._load, torch, transformers)
        own = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", 0) or 0
        self._context = self._context or own
        if not 1 < self._context <= (own or self._context):
            raise InvalidParameter("context_tokens", f"the model has {own or 'no length of its own: give one'}")
        self._batch = Batch(torch, transformers, loaded, slots=self.slots, eos=files.eos_token_ids)
        self.model = files.model(
            name=self._name,
            context_tokens=self._context,
            embeddings=self._embeddings,
            dimensions=self._batch.dimensions if self._embeddings else 0,
            engine="transformers",
        )

    def _load(self, torch: Any, transformers: Any) -> tuple[Checkpoint, Any]:
        files = read_checkpoint(self._path)
        try:
            found = torch.accelerator.current_accelerator(check_available=True)
            device = torch.device(self._device or found or "cpu")
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InvalidParameter("device", str(error).partition("\n")[0]) from error
        try:  # Code from the checkpoint is never run.
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                self._path, dtype=self._dtype, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise InvalidParameter("model", f"transformers cannot load {self._path!r}: {error}") from error
        return files, loaded.to(device).eval()

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Answer a request. See `Engine.generate`."""
        if request.guide is not None:
            raise InvalidParameter(request.guide.field, "this engine cannot hold an answer to a form")
        if len(request.prompt) // 4 + request.max_tokens > self._context:
            raise InvalidParameter("max_tokens", f"prompt and answer have more than {self._context} tokens")
        job = self._job(request.prompt, "prompt", request)
        try:
            while True:
                output = await job.next()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            job.cancelled = True

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Embed texts, one after the other."""
        if not self._embeddings:
            raise InvalidParameter("model", "it makes no embeddings: start the engine with the option embeddings=true")
        if request.dimensions not in (None, self.model.card.dimensions):
            raise InvalidParameter("dimensions", f"the model has {self.model.card.dimensions} dimensions")
        vectors = []
        for prompt in request.prompts:
            job = self._job(prompt, "input")
            try:
                vector = await job.next()
            finally:
                job.cancelled = True
            vectors.append(struct.pack(f"<{len(vector)}f", *vector))
        return Embeddings(vectors, sum(map(len, request.prompts)) // 4)

    def _job(self, prompt: bytes, param: str, request: Request | None = None) -> Job:
        if not prompt:
            raise InvalidParameter(param, "it is empty")
        if len(prompt) // 4 > self._context:
            raise InvalidParameter(param, f"it has {len(prompt) // 4} tokens, and the model at most {self._context}")
        assert self._batch is not None
        return self._batch.submit(Job(prompt, request))

    def metrics(self) -> EngineMetrics:
        """The answers that are generated now, the prompts that wait, and the tokens since the start."""
        batch = self._batch
        if batch is None:
            return EngineMetrics()
        return EngineMetrics(
            active=batch.active,
            waiting=batch.waiting,
            prompt_tokens=batch.prompt_tokens,
            generated_tokens=batch.generated_tokens,
        )

    async def close(self) -> None:
        """End the thread that generates, after its step, and free the model."""
        if self._batch is not None:
            await asyncio.to_thread(self._batch.close)

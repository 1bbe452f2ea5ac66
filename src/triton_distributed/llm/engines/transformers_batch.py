"""One thread that runs a model of transformers for several requests at once, a token of each in a step.

A prompt is computed alone, in parts. Then its request joins the batch: one tensor of keys and one of values for each
layer, in which shorter requests are filled up on the left, as `generate` of transformers does with several prompts.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import queue
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any

from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.contract.output import Output, TokenLogprob, Usage
from triton_distributed.llm.contract.request import Request, unpacked
from triton_distributed.llm.engines.transformers_choice import Choice

__all__: list[str] = []

_log = logging.getLogger(__name__)

STEP_TOKENS = 512
"""Tokens of prompts that are computed between two steps of the batch."""


class Job:
    """A prompt to compute. Its results come to the loop in `items`: outputs, a list of numbers, or an error.

    Args:
        prompt: token ids, as in `Request.prompt`.
        request: the answer to generate; None for an embedding.
    """

    def __init__(self, prompt: bytes, request: Request | None = None) -> None:
        self.prompt, self.request = prompt, request
        self.items: asyncio.Queue[Any] = asyncio.Queue()
        self.cancelled = False
        # The thread's own:
        self.ids: Any = None
        self.cache: Any = None
        self.length = 0  # of what the cache has
        self.hidden: Any = None  # the sum of the last layer's states
        self.choice: Choice | None = None
        self.ends: frozenset[int] = frozenset()
        self.last = -1  # the token that is not in the cache yet
        self.generated = 0

    async def next(self) -> Any:
        """The next result, on the loop.

        Raises:
            InvalidParameter: the request is invalid. Other errors are failures of the model.
        """
        found = await self.items.get()
        if isinstance(found, Exception):
            raise found
        return found

    def output(self, token: int, logprob: TokenLogprob | None) -> Output:
        """The output for a new token; it has a finish reason if the answer ends with it."""
        assert self.request is not None
        request, self.last = self.request, token
        self.generated += 1
        made = Output(token_ids=[token], logprobs=None if logprob is None else [logprob])
        if token in self.ends:
            made.finish_reason, made.stop_reason = "stop", token if token in request.stop_token_ids else None
        elif self.generated == request.max_tokens:
            made.finish_reason = "length"
        if made.finish_reason is not None:
            made.usage = Usage(len(request.prompt) // 4, self.generated)
        return made


class Batch:
    """The thread, and what it works on. `submit` and the numbers are for the loop.

    Args:
        torch, transformers: the modules.
        model: the model, on its device.
        slots: how many answers are generated at once.
        eos: the model's end tokens.

    Attributes:
        active: answers that generate.
        waiting: prompts that are not computed yet.
        dimensions: of an embedding.
        prompt_tokens, generated_tokens: counted since the start.

    Raises:
        InvalidParameter: the model keeps another state than keys and values of all tokens.
    """

    def __init__(self, torch: Any, transformers: Any, model: Any, *, slots: int, eos: Iterable[int]) -> None:
        self._torch, self._transformers, self._model = torch, transformers, model
        self._slots, self._eos = slots, frozenset(eos)
        self._vocabulary = int(model.get_input_embeddings().num_embeddings)
        takes = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5
        self._takes = {name for name in ("position_ids", "logits_to_keep") if name in takes}
        plain = ("DynamicLayer", "DynamicSlidingWindowLayer")
        layers = {type(each).__name__ for each in transformers.DynamicCache(config=model.config).layers}
        if model.config.is_encoder_decoder or not layers.issubset(plain) or self._cache_name not in takes:
            kinds = ", ".join(sorted(layers.difference(plain))) or type(model).__name__
            raise InvalidParameter("model", f"not a decoder that keeps only keys and values: {kinds}")
        self.dimensions = int(model.config.get_text_config(decoder=True).hidden_size)
        self._cache: Any = None
        self._rows: list[Job] = []
        self._waiting: deque[Job] = deque()
        self._arrived: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._results: list[tuple[Job, object]] = []
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self.prompt_tokens = self.generated_tokens = 0
        self._thread = threading.Thread(target=self._run, name="trd-transformers", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + self._arrived.qsize()

    def submit(self, job: Job) -> Job:
        """Compute a job. A job whose `cancelled` is set is dropped at the next step."""
        self._arrived.put(job)
        return job

    def close(self) -> None:
        """End the thread, at its next step, and wait for it. Jobs that are left get nothing more."""
        self._arrived.put(None)
        self._thread.join()
        self._rows, self._cache, self._model = [], None, None
        self._waiting.clear()

    def _run(self) -> None:
        with self._torch.inference_mode():
            while self._take():
                self._prefill()
                self._decode()
                if self._results:
                    try:
                        self._loop.call_soon_threadsafe(_deliver, self._results)
                    except RuntimeError:  # The loop was closed without closing the engine: no caller is left.
                        return
                    self._results = []

    def _take(self) -> bool:
        """Take what has arrived; wait for it if there is no work. False after `close`."""
        wait = not self._rows and not self._waiting
        while not self._closed:
            try:
                job = self._arrived.get(block=wait)
            except queue.Empty:
                break
            wait = False
            if job is None:
                self._closed = True
            else:
                self._waiting.append(job)
        return not self._closed

    def _prefill(self) -> None:
        """Compute parts of prompts, and choose the first token after those that are complete."""
        left = STEP_TOKENS
        self._waiting = deque(each for each in self._waiting if not each.cancelled)
        while left > 0:
            room = len(self._rows) < self._slots
            job = next((each for each in self._waiting if room or each.request is None), None)
            if job is None:
                return
            try:
                if job.ids is None:
                    self._open(job)
                part = job.ids[job.length : job.length + left]
                left -= len(part)
                found = self._forward(part[None], [job.length + len(part)], job.cache, hidden=job.request is None)
                job.length += len(part)
                if job.request is None:
                    total = found.hidden_states[-1][0].float().sum(0)
                    job.hidden = total if job.hidden is None else job.hidden + total
                if job.length < len(job.ids):
                    return
                self.prompt_tokens += job.length
                if job.request is None:
                    self._results.append((job, self._torch.nn.functional.normalize(job.hidden, dim=0).tolist()))
                elif not self._next(job, found.logits[0, -1], int(found.logits[0, -1].argmax())):
                    self._join(job)
                job.ids = job.cache = None
            except Exception as error:
                self._fail(job, error)
            self._waiting.remove(job)

    def _decode(self) -> None:
        """Compute the next token of each row."""
        try:
            self._keep([at for at, row in enumerate(self._rows) if not row.cancelled])
            if not self._rows:
                return
            ids = self._torch.tensor([[row.last] for row in self._rows], device=self._model.device)
            lengths = [row.length + 1 for row in self._rows]
            logits = self._forward(ids, lengths, self._cache).logits[:, -1]
            best = logits.argmax(-1).tolist()
            kept = []
            for at, row in enumerate(self._rows):
                row.length += 1
                try:
                    if not self._next(row, logits[at], best[at]):
                        kept.append(at)
                except Exception as error:
                    self._fail(row, error)
            self._keep(kept)
        except Exception as error:  # Memory is used up, for example. What comes next may work.
            for row in self._rows:
                self._fail(row, error)
            self._rows, self._cache = [], None

    def _open(self, job: Job) -> None:
        torch, request = self._torch, job.request
        found = torch.frombuffer(unpacked(job.prompt), dtype=torch.int32).long()
        if not 0 <= int(found.min()) <= int(found.max()) < self._vocabulary:
            raise InvalidParameter("prompt", f"a token id is not below {self._vocabulary}, the model's vocabulary")
        job.ids, job.cache = found.to(self._model.device), self._transformers.DynamicCache()
        if request is not None:
            job.ends = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else self._eos)
            job.choice = Choice(torch, self._transformers, request, job.ids, job.ends, self._vocabulary)

    def _forward(self, ids: Any, lengths: list[int], cache: Any, hidden: bool = False) -> Any:
        """Run the model.

        Args:
            ids: new tokens, of shape [rows, tokens].
            lengths: tokens of each row with the new ones. The longest row has no padding.
            cache: gets the keys and values of the new tokens.
            hidden: whether the states of all layers are wanted.
        """
        torch = self._torch
        total = torch.tensor(lengths, device=ids.device)[:, None]
        arguments = {
            "input_ids": ids,
            "attention_mask": (torch.arange(max(lengths), device=ids.device) >= max(lengths) - total).long(),
            "position_ids": total - ids.shape[1] + torch.arange(ids.shape[1], device=ids.device),
            "logits_to_keep": 1,
        }
        for name in {"position_ids", "logits_to_keep"} - self._takes:
            del arguments[name]
        arguments[self._cache_name] = cache
        return self._model(**arguments, use_cache=True, output_hidden_states=hidden)

    def _next(self, job: Job, logits: Any, best: int) -> bool:
        """Choose the next token of an answer. True if the answer ends with it."""
        assert job.choice is not None
        output = job.output(*job.choice.choose(logits, best))
        self.generated_tokens += 1
        self._results.append((job, output))
        return output.finish_reason is not None

    def _join(self, job: Job) -> None:
        """Make a new row of an answer whose prompt is computed."""
        if self._rows:
            width = max(job.length, *(row.length for row in self._rows))
            pad, cat = self._torch.nn.functional.pad, self._torch.cat

            def joined(ours: Any, new: Any) -> Any:
                return cat([pad(each, (0, 0, width - each.shape[2], 0)) for each in (ours, new)])

            self._cache = self._made(
                (joined(ours.keys, new.keys), joined(ours.values, new.values))
                for ours, new in zip(self._cache.layers, job.cache.layers, strict=True)
            )
        else:
            self._cache = job.cache
        self._rows.append(job)

    def _keep(self, kept: list[int]) -> None:
        """Leave out the other rows, and the padding that no row needs any more."""
        if len(kept) == len(self._rows):
            return
        rows = [self._rows[at] for at in kept]
        cache = None
        if rows:
            index = self._torch.tensor(kept, device=self._model.device)
            width = max(row.length for row in rows)
            cache = self._made(
                (each.keys[:, :, -width:].index_select(0, index), each.values[:, :, -width:].index_select(0, index))
                for each in self._cache.layers
            )
        self._rows, self._cache = rows, cache

    def _made(self, pairs: Iterable[tuple[Any, Any]]) -> Any:
        cache = self._transformers.DynamicCache()
        for layer, (keys, values) in enumerate(pairs):
            cache.update(keys, values, layer)
        return cache

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, InvalidParameter):
            _log.warning("a request failed: %s", error)
        job.ids = job.cache = None
        self._results.append((job, error))


def _deliver(results: list[tuple[Job, object]]) -> None:
    """On the loop: one wake-up for all results of a step."""
    for job, result in results:
        job.items.put_nowait(result)

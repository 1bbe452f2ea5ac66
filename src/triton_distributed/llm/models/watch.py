"""Follows the models of a namespace, and loads the tokenizer and the template of each new one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from triton_distributed.api.connection import Connection
from triton_distributed.api.contracts import Stream
from triton_distributed.discovery.base import Change, Watch
from triton_distributed.errors import TritonError
from triton_distributed.llm.contract.errors import LLMError
from triton_distributed.llm.contract.model import Model, ModelCard
from triton_distributed.llm.contract.records import ASSETS
from triton_distributed.llm.models.prompts import Prompts, TokenizerThreads
from triton_distributed.llm.models.table import ModelTable

logger = logging.getLogger("triton_distributed.llm")

READ_TIMEOUT_S = 60.0
"""Seconds to read the contents of one digest from a worker. A tokenizer has up to some tens of megabytes."""

RETRY_S = (0.1, 30.0)
"""Seconds until a failed loading is tried again: the first wait and the longest one. They double."""


class ModelWatch:
    """The models whose prompts can be made.

    Args:
        connection: reads discovery and calls the workers.
        namespace: of the models.
        left: called with the component of a model that was loaded, when its last worker has left.
        loaded: called when a model was loaded.

    Attributes:
        table: all models that are served.
        prompts: those of each model that is loaded, by component.
        unusable: why a model cannot be loaded at all, by component.
    """

    def __init__(
        self,
        connection: Connection,
        namespace: str,
        left: Callable[[str], None] = lambda component: None,
        loaded: Callable[[], object] = lambda: None,
    ) -> None:
        self.table = ModelTable(namespace)
        self.prompts: dict[str, Prompts] = {}
        self.unusable: dict[str, str] = {}
        self._connection, self._namespace, self._left, self._loaded = connection, namespace, left, loaded
        self._threads = TokenizerThreads()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._contents: dict[str, asyncio.Task[bytes]] = {}  # By digest; models may share one.
        self._warned: set[tuple[str, str]] = set()
        self._watch: Watch | None = None
        self.changed = asyncio.Event()

    async def open(self) -> None:
        """Begin to follow.

        Raises:
            DiscoveryError: discovery cannot be read.
        """
        self._watch = await self._connection.runtime.discovery.watch(None, self._apply)

    async def until_loaded(self, timeout_s: float) -> None:
        """Wait until no known model is being loaded, or until the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._loading:
                    await self.changed.wait()

    async def close(self) -> None:
        """End the tasks and the threads."""
        if self._watch is not None:
            self._watch.close()
        tasks = [*self._loading.values(), *self._contents.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.close()

    def notify(self) -> None:
        """Wake what waits for `changed`."""
        self.changed.set()
        self.changed = asyncio.Event()

    def _apply(self, change: Change) -> None:
        self.table.apply(change)
        entries = self.table.entries
        for component in [each for each in (*self.prompts, *self.unusable) if each not in entries]:
            self.unusable.pop(component, None)
            if self.prompts.pop(component, None) is not None:
                self._left(component)
        for component in [each for each in self._loading if each not in entries]:
            self._loading.pop(component).cancel()
        used = {digest for entry in entries.values() for digest in (entry.card.tokenizer, entry.card.template)}
        for digest in [each for each in self._contents if each not in used]:
            self._contents.pop(digest).cancel()
        for component, entry in entries.items():
            if component not in self._loading and component not in self.prompts and component not in self.unusable:
                self._loading[component] = asyncio.create_task(self._load(component, entry.card))
        for used_entry, other in self.table.conflicts():
            pair = (used_entry.card.component, other.card.component)
            if pair not in self._warned:
                self._warned.add(pair)
                logger.warning(
                    "two workers serve the model %r, generation %d, with different cards: requests go to %s, not to %s",
                    other.card.name, other.card.generation, *pair,
                )  # fmt: skip
        self.notify()

    async def _load(self, component: str, card: ModelCard) -> None:
        """Load a model's prompts. A worker that is lost meanwhile is not the last word: it is tried again."""
        wait_s = RETRY_S[0]
        while True:
            try:
                tokenizer: bytes | str | None = card.tokenizer or None
                if tokenizer is not None and tokenizer != "bytes":
                    tokenizer = await self._content(component, card.tokenizer)
                template = (await self._content(component, card.template)).decode() if card.template else None
                self._check(card, tokenizer, template)
                prompts = await Prompts.load(card, tokenizer, template, self._threads)  # type: ignore[arg-type]
            except TritonError as error:
                if isinstance(error, LLMError):
                    self._give_up(component, card, str(error))
                    return
                logger.warning("the model %r cannot be loaded now: %s", card.name, error)
                await asyncio.sleep(wait_s)
                wait_s = min(RETRY_S[1], 2 * wait_s)
            except Exception as error:  # The tokenizer's file may be damaged in any way, or a library is missing.
                self._give_up(component, card, f"{type(error).__name__}: {error}")
                return
            else:
                self.prompts[component] = prompts
                self._loading.pop(component, None)
                self._loaded()
                self.notify()
                return

    def _give_up(self, component: str, card: ModelCard, reason: str) -> None:
        logger.error("the model %r cannot be used in this process: %s", card.name, reason)
        self.unusable[component] = reason
        self._loading.pop(component, None)
        self.notify()

    async def _content(self, component: str, digest: str) -> bytes:
        """The contents of a digest, read once for all models that have it."""
        task = self._contents.get(digest)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._contents[digest] = asyncio.create_task(self._read(component, digest))
        return await asyncio.shield(task)

    async def _read(self, component: str, digest: str) -> bytes:
        endpoint = Stream[str, bytes](f"{self._namespace}.{component}.{ASSETS}")
        stream = self._connection.stream(endpoint, digest, timeout=READ_TIMEOUT_S, idempotent=True)
        return b"".join([each async for each in stream])

    @staticmethod
    def _check(card: ModelCard, tokenizer: bytes | str | None, template: str | None) -> None:
        read = Model(card=card, tokenizer=tokenizer, template=template).published  # type: ignore[arg-type]
        if read != card:
            raise LLMError("a worker sent contents that do not have the digest of the card")

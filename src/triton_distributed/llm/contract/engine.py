"""The engine: the class that users write to serve a model of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from triton_distributed.llm.contract.cache import Publish
from triton_distributed.llm.contract.model import Model
from triton_distributed.llm.contract.output import Embeddings, Output
from triton_distributed.llm.contract.request import EmbedRequest, Request


class EngineMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """The state of an engine now.

    Attributes:
        active: requests that generate.
        waiting: requests that wait inside the engine.
        kv_blocks_used, kv_blocks_total: blocks of its KV cache; 0 if the engine has none or does not tell.
        kv_block_tokens: the size of a block.
        prompt_tokens, cached_tokens, generated_tokens: counted since the start.
        preemptions: requests that lost their blocks to others, counted since the start.
        kv_unread: events of its KV cache that could not be read, counted since the start.
        kv_lost: how often events were lost, so that its KV cache became unknown, counted since the start.
    """

    active: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    kv_block_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    kv_unread: int = 0
    kv_lost: int = 0


class Engine:
    """Generates answers. Subclass it, set `model`, and write `generate`; the other methods are optional.

    All methods run on the event loop of the worker, so blocking work belongs in a thread. `trd model serve` makes the
    engine with the options of its command line as keyword arguments, all of them text.

    Attributes:
        model: what the engine serves. Set it in `__init__`, or in `start` at the latest.
        slots: how many requests generate at once. The worker holds the others back or refuses them.
    """

    model: Model
    slots: int = 1

    def kv_events(self, publish: Publish) -> bool:
        """Report what the KV cache stores and removes, so that requests go where their prompts are cached.

        It is called once, before `start`. Later the engine calls `publish` on the event loop with each batch of events.

        Args:
            publish: takes events.

        Returns:
            Whether it will report. Without that, the worker assumes what the cache holds from the requests.
        """
        return False

    async def start(self) -> None:
        """Load the model. The worker registers when this has returned."""

    def generate(self, request: Request) -> AsyncIterator[Output]:
        """Answer a request with a stream of outputs, usually as an async generator.

        With the role `prefill`, compute the prompt and one token, and say in `Output.kv_transfer` where the blocks are.

        A caller that leaves cancels it: the iteration raises `asyncio.CancelledError` at the next `await`, or the
        generator is closed at its `yield`. It then releases the request's slot, in `finally`.

        Raises:
            InvalidParameter: the engine cannot do what the request asks. Other errors are failures of the engine.
        """
        raise NotImplementedError

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Embed texts, for a model whose card says `embeddings`."""
        raise NotImplementedError

    def metrics(self) -> EngineMetrics | None:
        """The state of the engine now; None if it does not tell. It is cheap, and may be asked from any thread."""
        return None

    async def close(self) -> None:
        """Release everything. No request runs any more. A failed `start` is followed by it too."""

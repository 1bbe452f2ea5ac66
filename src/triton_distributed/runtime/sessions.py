"""The sessions of one runtime, made from its settings: those that it dials, and those that it accepts."""

from __future__ import annotations

import asyncio
import os
import platform
import random
from collections.abc import Callable
from typing import Any

from triton_distributed import __version__
from triton_distributed.config import Config
from triton_distributed.transport.fairness import FairShare
from triton_distributed.transport.session import Session
from triton_distributed.transport.shared_pool import SharedPool
from triton_distributed.wire.authentication import CHALLENGE_BYTES, Authentication
from triton_distributed.wire.frames import LARGE_FRAME
from triton_distributed.wire.hello import LOAD_REPORTS, SHARED_MEMORY, TIMES, Hello
from triton_distributed.wire.window import ByteBudget

AGENT = f"triton-distributed/{__version__} python/{platform.python_version()}"


class Sessions:
    """Makes the sessions of one runtime.

    Args:
        loop: the running loop.
        config: settings.
        rng: source of each session's nonce.

    Attributes:
        share: the loop's time and the bytes of all sessions.
        held: the bytes that clients have sent and this process holds in memory, over all sessions.
        shared: the shared memory that this process lends to its peers.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, config: Config, rng: random.Random) -> None:
        self._loop, self._config, self._rng = loop, config, rng
        self.share = FairShare(loop)
        self.held = ByteBudget(max(config.max_held_bytes, config.max_message_bytes))
        self.shared = SharedPool(loop, config.shared_memory_bytes)

    def dialled(self, address: str, on_lost: Callable[[Session, str], None]) -> Session:
        """A session to a worker."""
        return self._session(None, on_lost, address)

    def accepted(self, on_request: Callable[..., None], on_lost: Callable[[Session, str], None]) -> Session:
        """A session from a client."""
        return self._session(on_request, on_lost, "")

    def _hello(self) -> Hello:
        config = self._config
        return Hello(
            agent=AGENT,
            max_message=config.max_message_bytes,
            max_frame=LARGE_FRAME,
            max_streams=config.max_streams,
            window=config.window_bytes,
            nonce=self._rng.getrandbits(63),
            features=[LOAD_REPORTS, TIMES, SHARED_MEMORY] if self.shared.limit else [LOAD_REPORTS, TIMES],
        )

    def _session(self, on_request: Callable[..., None] | None, on_lost: Any, address: str) -> Session:
        config = self._config
        authentication = None
        if config.token:
            authentication = Authentication(config.token.encode(), os.urandom(CHALLENGE_BYTES), on_request is None)
        return Session(
            self._loop,
            self._hello(),
            window=config.window_bytes,
            session_window=config.session_window_bytes,
            hello_timeout_s=config.connect_timeout_s,
            host_timeout_s=config.host_timeout_s,
            on_request=on_request,
            on_lost=on_lost,
            address=address,
            authentication=authentication,
            share=self.share,
            held=None if on_request is None else self.held,
            shared=self.shared if self.shared.limit else None,
        )

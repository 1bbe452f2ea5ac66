"""The functions of the original's C library, for programs that find it through `ctypes`.

Engines load `libtriton_llm_capi.so` or `libtriton_distributed_llm_capi.so`, and call its functions to tell what their
caches hold. Where `KvRouter` or `KvMetricsPublisher` is imported, `ctypes.CDLL` of a missing file of one of these names
gives the functions below. They are real C functions, so `argtypes`, arrays, pointers and NULL work as with the library.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import functools
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from triton_distributed.api.sync_loop import SyncLoop
from triton_distributed.config import Config
from triton_distributed.llm.original import publishers
from triton_distributed.llm.original.messages import BLOCK_TOKENS
from triton_distributed.llm.original.publishers import KvEventPublisher, KvMetricsPublisher  # noqa: F401
from triton_distributed.llm.original.router import KvRouter  # noqa: F401
from triton_distributed.runtime.distributed import DistributedRuntime

__all__: list[str] = []  # Programs import the classes from `triton_distributed.llm`, which loads this file.

logger = logging.getLogger("triton_distributed.llm")

LIBRARIES = frozenset({"libtriton_llm_capi.so", "libtriton_distributed_llm_capi.so"})
"""The two file names under which the original was installed."""

OK, ERR = 0, 1

MOST_WARNINGS = 3
"""Warnings about blocks that are not full."""

END_S = 1.0
"""Seconds that a shutdown waits until the last events are published."""


class _Publishing:
    """The state of the C functions in one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._loop: SyncLoop | None = None  # The thread of a runtime of its own.
        self._runtime: DistributedRuntime | None = None
        self._publisher: KvEventPublisher | None = None
        self._warned = 0

    def begin(self, namespace: str, component: str, worker_id: int) -> None:
        """Publish events of this worker from now on.

        The runtime is the one that publishes the load of the component in this process, if there is one.
        """
        with self._lock:
            if self._pid != os.getpid():  # The threads of the parent process do not exist here.
                self._pid, self._loop, self._runtime = os.getpid(), None, None
            runtime = publishers.served.get((namespace, component))
            if runtime is None or runtime.unusable:
                runtime = self._own()
            made = runtime.namespace(namespace).component(component)
            self._publisher = KvEventPublisher(made, worker_id)

    def _own(self) -> DistributedRuntime:
        if self._runtime is None:
            loop = SyncLoop()
            try:
                self._runtime = loop.run_blocking("triton_llm_init", _connected)
            except BaseException:
                loop.stop(END_S)
                raise
            self._loop = loop
            atexit.register(self.end)
        return self._runtime

    def end(self) -> bool:
        """Publish what waits, and end the thread. Returns whether anything had begun."""
        with self._lock:
            publisher, self._publisher = self._publisher, None
            loop, self._loop = self._loop, None
            runtime, self._runtime = self._runtime, None
        if loop is not None and runtime is not None and not loop.inherited:
            atexit.unregister(self.end)
            loop.run_blocking("triton_llm_shutdown", functools.partial(_close, publisher, runtime), None, END_S)
            loop.stop(END_S)
        return publisher is not None

    def publisher(self) -> KvEventPublisher:
        """The publisher.

        Raises:
            RuntimeError: `begin` was not called in this process.
        """
        publisher = self._publisher
        if publisher is None or self._pid != os.getpid():
            raise RuntimeError("triton_llm_init was not called in this process")
        return publisher

    def warn(self, tokens: int) -> None:
        """Say that a block is not full, a few times."""
        if self._warned < MOST_WARNINGS:
            self._warned += 1
            logger.warning("a block of %d tokens is not published: only blocks of %d are", tokens, BLOCK_TOKENS)


async def _connected() -> DistributedRuntime:
    config = dataclasses.replace(Config.from_env(), handle_signals=False, status_port=-1)
    runtime = DistributedRuntime(config=config)
    try:
        runtime.events.plane()
        if config.event_plane == "nats":
            await runtime.nats.client()
    except BaseException:
        await runtime.close()
        raise
    return runtime


async def _close(publisher: KvEventPublisher | None, runtime: DistributedRuntime) -> None:
    if publisher is not None:
        await publisher.flushed()
    await runtime.close()


_publishing = _Publishing()


def _answered(function: Callable[..., None]) -> Callable[..., int]:
    """A function that returns OK, or ERR after an error, which it logs: C has no exceptions."""

    @functools.wraps(function)
    def answered(*arguments: Any) -> int:
        try:
            function(*arguments)
        except Exception as error:
            logger.error("%s: %s", function.__name__, error)  # noqa: TRY400  # The trace would not help a program in C.
            return ERR
        return OK

    return answered


def triton_llm_init(namespace: bytes | None, component: bytes | None, worker_id: int) -> None:
    if namespace is None or component is None:
        raise ValueError("the namespace or the component is NULL")
    _publishing.begin(namespace.decode(), component.decode(), worker_id)


def triton_llm_shutdown() -> None:
    if not _publishing.end():
        raise RuntimeError("triton_llm_init was not called in this process")


def triton_llm_load_publisher_create() -> None:
    pass


def triton_kv_event_publish_stored(
    event_id: int,
    token_ids: Any,
    num_block_tokens: Any,
    block_ids: Any,
    num_blocks: int,
    parent_hash: Any,
    lora_id: int,
) -> None:
    publisher = _publishing.publisher()
    if not num_blocks:
        return
    sizes = num_block_tokens[:num_blocks]
    whole = next((at for at, size in enumerate(sizes) if size != BLOCK_TOKENS), num_blocks)
    if whole < num_blocks:
        _publishing.warn(sizes[whole])
    parent = parent_hash[0] if parent_hash else None
    tokens = token_ids[: whole * BLOCK_TOKENS] if whole else []
    publisher.publish_stored(event_id, tokens, sizes[:whole], block_ids[:whole], lora_id, parent)


def triton_kv_event_publish_removed(event_id: int, block_ids: Any, num_blocks: int) -> None:
    publisher = _publishing.publisher()
    publisher.publish_removed(event_id, block_ids[:num_blocks] if num_blocks else [])


_U32, _U64, _SIZE = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_size_t
_U32S, _U64S, _SIZES = ctypes.POINTER(_U32), ctypes.POINTER(_U64), ctypes.POINTER(_SIZE)

_SIGNATURES: dict[Callable[..., None], tuple[Any, ...]] = {
    triton_llm_init: (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64),
    triton_llm_shutdown: (),
    triton_llm_load_publisher_create: (),
    triton_kv_event_publish_stored: (_U64, _U32S, _SIZES, _U64S, _SIZE, _U64S, _U64),
    triton_kv_event_publish_removed: (_U64, _U64S, _SIZE),
}


@functools.cache
def _functions() -> dict[str, Any]:
    return {
        function.__name__: ctypes.CFUNCTYPE(_U32, *arguments)(_answered(function))
        for function, arguments in _SIGNATURES.items()
    }


def _is_ours(name: Any) -> bool:
    if not isinstance(name, str | os.PathLike):
        return False
    return os.path.basename(name) in LIBRARIES and not os.path.exists(name)


def answer_missing_libraries() -> None:
    """Let `ctypes.CDLL` answer for a missing file of one of the two names. Every other call passes untouched."""
    original = ctypes.CDLL.__init__
    if getattr(original, "answers_missing_libraries", False):
        return

    @functools.wraps(original)
    def init(self: ctypes.CDLL, name: Any = None, *arguments: Any, **options: Any) -> None:
        try:
            original(self, name, *arguments, **options)
        except OSError:
            if not _is_ours(name):
                raise
            logger.info("%s is missing: the functions of this runtime answer for it", name)
            vars(self).update(_functions(), _name=os.fspath(name), _handle=0)

    init.answers_missing_libraries = True  # type: ignore[attr-defined]
    ctypes.CDLL.__init__ = init  # type: ignore[method-assign]


answer_missing_libraries()

"""Handlers of Dynamo's programs as handlers of this runtime: a stop notifies them and does not interrupt them."""

from __future__ import annotations

import asyncio
import inspect
import types
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
from typing import Any

from triton_distributed import context as native
from triton_distributed.compat.dynamo.contexts import Context
from triton_distributed.compat.dynamo.llm.exceptions import StreamIncomplete, Unknown
from triton_distributed.compat.dynamo.streams import from_envelope
from triton_distributed.errors import RequestIncomplete
from triton_distributed.runtime import Sender

MOST_BYTES = 64 * 1024 * 1024
"""Bytes that a handler may push on the event loop without an `await` that lets the caller read."""


class ResponseSender:
    """Takes the items of a handler that pushes them. A handler gets one if it has a parameter `response_sender`.

    `send` blocks a thread while the caller does not read. On the event loop it returns at once, and the handler's next
    `await` waits for the caller instead.
    """

    def __init__(self, sender: Sender[Any]) -> None:
        self._sender = sender

    def send(self, obj: Any) -> None:
        """Send one item, in any thread.

        Raises:
            RuntimeError: the stream is closed, or its caller has left; or the handler has pushed 64 MiB without an
                `await`.
            ValueError: the item cannot be encoded.
        """
        sender = self._sender
        try:
            item = from_envelope(obj)
            if not sender.pushed.on_its_loop():
                sender.send(item)
            elif sender.pushed.size > MOST_BYTES:
                raise RuntimeError(
                    f"{sender.pushed.size:,} bytes wait for the caller: `await` between the items, or send in a thread"
                )
            else:
                sender.push(item)
        except TypeError as error:
            raise ValueError(f"the response cannot be encoded: {error}") from None

    def close(self) -> None:
        """End the stream. Closing twice is harmless."""
        self._sender.close()

    def close_with_error(self, msg: str) -> None:
        """End the stream with an error for the caller."""
        self._sender.close(Unknown(msg))


class PyAsyncRequestStream:
    """The requests of a bidirectional call. Its end only means that no further request comes."""

    def __init__(self, requests: AsyncIterator[Any]) -> None:
        self._requests = requests

    def __aiter__(self) -> PyAsyncRequestStream:
        return self

    async def __anext__(self) -> Any:
        try:
            return await anext(self._requests)
        except RequestIncomplete:  # The context tells that the caller has left.
            raise StopAsyncIteration from None


Call = Callable[[Any, Context, ResponseSender | None], Any]


def adapted(handler: Callable[..., Any], *, bidirectional: bool = False) -> Callable[..., Any]:
    """The handler in the form that `serve_endpoint(interrupt=False)` takes.

    Raises:
        TypeError: it is not a function of one request, or it is a generator that is not async.
    """
    if not callable(handler):
        raise TypeError(f"a handler is an async generator function, not {type(handler).__name__}: {handler!r}")
    if inspect.isgeneratorfunction(handler):
        raise TypeError(f"handler {_name(handler)} is a generator with plain `def`: use `async def`")
    call, pushes = _calling(handler)
    serve = _pushing(call) if pushes else _yielding(call)
    if not bidirectional:
        serve.__qualname__ = _name(handler)
        return serve

    async def serve_stream(requests: AsyncIterator[Any], context: native.Context) -> Any:
        async for item in serve(PyAsyncRequestStream(requests), context):
            yield item

    serve_stream.__qualname__ = _name(handler)
    return serve_stream


def _name(handler: Callable[..., Any]) -> str:
    return getattr(handler, "__qualname__", None) or repr(handler)


def _calling(handler: Callable[..., Any]) -> tuple[Call, bool]:
    """How to call the handler, and whether it pushes its items."""
    try:
        parameters = inspect.signature(handler).parameters
    except (TypeError, ValueError):
        return (lambda request, context, sender: handler(request)), False
    kinds = inspect.Parameter
    named = (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    names = {name for name, each in parameters.items() if each.kind in named}
    positional = [
        each for each in parameters.values() if each.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ]
    several = any(each.kind is kinds.VAR_POSITIONAL for each in parameters.values())
    if not positional and not several:
        raise TypeError(f"handler {_name(handler)} takes no request: it takes a request and optionally a context")
    by_name, pushes = "context" in names, "response_sender" in names
    by_position = not by_name and len(positional) > 1 and positional[1].default is kinds.empty

    def call(request: Any, context: Context, sender: ResponseSender | None) -> Any:
        keywords: dict[str, Any] = {"context": context} if by_name else {}
        if sender is not None:
            keywords["response_sender"] = sender
        return handler(request, context, **keywords) if by_position else handler(request, **keywords)

    return call, pushes


async def _results(answer: Any) -> AsyncGenerator[Any, None]:
    """The items of what a handler has returned."""
    if inspect.isawaitable(answer):
        answer = await answer
    if not hasattr(answer, "__anext__") and not hasattr(answer, "__aiter__"):
        yield answer
        return
    items = aiter(answer)
    try:
        async for item in items:
            yield item
    finally:
        if hasattr(items, "aclose"):
            await items.aclose()


def _yielding(call: Call) -> Callable[[Any, native.Context], AsyncIterator[Any]]:
    async def serve(request: Any, context: native.Context) -> AsyncIterator[Any]:
        own = Context.of(context)
        answer = call(request, own, None)
        items: Any = answer if hasattr(answer, "__anext__") and hasattr(answer, "aclose") else _results(answer)
        try:
            async for item in items:
                yield from_envelope(item)
        finally:
            await items.aclose()
        _check_complete(own)

    return serve


def _check_complete(context: Context) -> None:
    """Report a stream that its own handler has stopped: it does not look complete to the caller."""
    if context.stopped_here:
        raise StreamIncomplete("Stream ended before generation completed: its handler called stop_generating()")


def _pushing(call: Call) -> Callable[[Any, native.Context], AsyncIterator[Any]]:
    async def serve(request: Any, context: native.Context) -> Any:
        own = Context.of(context)
        sender = Sender[Any]()
        pushed = sender.pushed
        running = asyncio.ensure_future(_run(call, request, own, sender))
        del sender  # The handler holds it.
        try:
            async for ready in pushed:
                yield ready
            _check_complete(own)
        finally:
            await pushed.aclose()
            try:
                await asyncio.wait({running})  # Its context says that the caller has left, and it ends by itself.
            except asyncio.CancelledError:
                running.cancel()
                raise

    return serve


async def _run(call: Call, request: Any, context: Context, sender: Sender[Any]) -> None:
    """Run a handler that pushes to its end. Nothing is raised: the sender passes errors on."""
    try:
        items = _results(call(request, context, ResponseSender(sender)))
        try:
            await _paced(anext(items), sender)
        except StopAsyncIteration:
            sender.close()
        else:
            await items.aclose()
            raise Unknown("a handler that takes a response_sender pushes its items and yields none")
    except asyncio.CancelledError as error:
        sender.close(error)
        raise
    except Exception as error:
        sender.close(error)


@types.coroutine
def _paced(work: Awaitable[Any], sender: Sender[Any]) -> Generator[Any, Any, Any]:
    """Await `work`, and after each of its suspensions also wait until the caller has read what was pushed."""
    steps = work.__await__()
    thrown: BaseException | None = None
    while True:
        try:
            awaited = next(steps) if thrown is None else steps.throw(thrown)
        except StopIteration as end:
            return end.value
        finally:
            thrown = None
        try:
            yield awaited
            if sender.full:
                yield from sender.room().__await__()
        except BaseException as error:  # E.g. a cancellation, which the handler must see.
            thrown = error

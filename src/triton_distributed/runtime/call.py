"""One call, from the choice of an instance to its last item; a request that no handler began moves to another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from triton_distributed.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    DecodeError,
    Draining,
    InvalidRequest,
    MessageTooLarge,
    NoInstances,
    Overloaded,
    StreamIncomplete,
    TritonError,
)
from triton_distributed.names import Instance
from triton_distributed.observe import Outcome
from triton_distributed.routing.policies import Policy
from triton_distributed.runtime.annotated import Annotated
from triton_distributed.runtime.context import Context
from triton_distributed.runtime.directly import Directly
from triton_distributed.wire import frames as f
from triton_distributed.wire.codec import Message, decode, encode
from triton_distributed.wire.remote_error import decode_error
from triton_distributed.wire.states import State

if TYPE_CHECKING:
    from triton_distributed.runtime.client import Client
    from triton_distributed.transport.session import Session
    from triton_distributed.transport.stream import Stream

logger = logging.getLogger("triton_distributed.runtime")

_OK = int(Outcome.OK)
_INFINITE = float("inf")
_NOTHING: Iterator[Any] = iter(())
_pack = f.REQUEST_HEADER.pack
_FIXED = f.REQUEST_PREFIX_BYTES


class Call:
    """A call under way.

    Attributes:
        items: decoded items of the message that is being read.
        instance: who was asked, the last where there were several.
        stream: the stream to it; None while none is open.
        reading: an `async for` goes over it.
        received: items handed to the caller.
        done: the caller gets nothing more: it has ended, failed or was cancelled.
    """

    __slots__ = (
        "_annotated",
        "_attempts",
        "_body",
        "_client",
        "_context",
        "_dispatched",
        "_error",
        "_idempotent",
        "_metadata",
        "_more",
        "_outcome",
        "_policy",
        "_pump",
        "_request",
        "_timer",
        "_tried",
        "deadline",
        "done",
        "instance",
        "items",
        "reading",
        "received",
        "stream",
        "timeout_s",
    )

    def __init__(
        self,
        client: Client,
        request: Any,
        body: bytes | Message,
        more: AsyncIterator[Any] | None,
        *,
        policy: Policy,
        annotated: bool,
        context: Context | None,
        timeout_s: float | None,
        deadline: float | None,
        metadata: bytes,
        idempotent: bool,
    ) -> None:
        self._client = client
        self._request = request  # policies may look at it
        self._body = body
        self._more = more
        self._policy = policy
        self._annotated = annotated
        self._context = context
        self._metadata = metadata
        self._idempotent = idempotent
        self._attempts: list[tuple[str, str]] | None = None
        self._tried: set[int] | None = None
        self._error: BaseException | None = None
        self._outcome: int | None = None
        self._dispatched: asyncio.Future[None] | None = None
        self._pump: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.timeout_s = timeout_s
        self.deadline = deadline
        self.stream: Stream | None = None
        self.instance: Instance | None = None
        self.items: Iterator[Any] = _NOTHING
        self.received = 0
        self.done = self.reading = False
        client.stats.inflight += 1
        if deadline is not None:
            self._timer = client.loop.call_at(deadline, self._expire)
        if context is not None:
            context.attach(self)

    # dispatch

    def start(self) -> None:
        """Send the request now where that needs no waiting, else from a task."""
        if self.done:
            return
        client = self._client
        candidates = client.view.candidates
        body = self._body
        if candidates and self._more is None and body.__class__ is bytes and len(body) <= f.SMALL:
            try:
                instance = self._policy(self._request, candidates, client.load)
            except Exception as error:  # a user's policy, or `direct` with an id that nobody has
                self._fail(error, Outcome.UNREACHABLE)
                return
            session = client.pool.get(instance.addresses)
            if session is not None and not session.full:
                stream = self._open(session, instance, True)
                timeout = _INFINITE if self.deadline is None else self.deadline - client.loop.time()
                metadata = self._metadata
                size = _FIXED + len(metadata) + len(body)
                session.send(
                    _pack(
                        size,
                        f.REQUEST,
                        f.END,
                        stream.id,
                        instance.id,
                        client.key,
                        timeout,
                        stream.window,
                        len(metadata),
                    )
                    + metadata
                    + body
                )
                return
        self._dispatch()

    def _open(self, session: Session, instance: Instance, end: bool) -> Stream:
        stream: Stream = session.open_stream(end)
        stream.owner = self
        self.stream = stream
        self.instance = instance
        self._client.load.acquire(instance.id)
        return stream

    def _dispatch(self) -> None:
        if self._dispatched is None or self._dispatched.done():
            self._dispatched = self._client.loop.create_future()
        self._pump = self._client.spawn(self._send())

    async def _send(self) -> None:
        try:
            await self._send_somewhere()
        except asyncio.CancelledError:
            if self._outcome is None:
                self.cancel()
        except Exception as error:  # whatever a policy or a request's iterator raises is the caller's to see
            self._fail(error, Outcome.UNREACHABLE if isinstance(error, TritonError) else Outcome.ERROR)

    async def _send_somewhere(self) -> None:
        client = self._client
        while True:
            instance = self._choose()
            try:
                session = await client.pool.connect(instance.addresses)
            except ConnectionFailed as error:
                client.unreachable(instance.addresses)
                self._note(instance, [*error.attempts])
                continue
            if self._outcome is not None:  # cancelled, or out of time
                return
            if session.full:
                self._note(instance, [(session.address, f"{len(session.streams):,} streams are open on the session")])
                continue
            await self._send_to(session, instance)
            return

    async def _send_to(self, session: Session, instance: Instance) -> None:
        client = self._client
        stream = self._open(session, instance, False)
        timeout = _INFINITE if self.deadline is None else self.deadline - client.loop.time()
        metadata = self._metadata
        prefix = f.REQUEST_PREFIX.pack(instance.id, client.key, timeout, stream.window, len(metadata)) + metadata
        body, buffers = (self._body, ()) if isinstance(self._body, bytes) else (self._body.body, self._body.buffers)
        try:
            await stream.send(prefix + body, buffers, 0 if self._more else f.END, f.REQUEST)
            if self.stream is stream:
                self._arrived()
            if self._more is not None:
                await self._send_more(stream, self._more)
        except MessageTooLarge as error:
            stream.abort(f.CANCEL)
            self._fail(error, Outcome.INVALID)

    async def _send_more(self, stream: Stream, requests: AsyncIterator[Any]) -> None:
        """Stream further requests until they end or the response does."""
        try:
            async for each in requests:
                data = encode(each, "request")
                if isinstance(data, bytes) and len(data) <= f.SMALL:
                    if stream.push(data):
                        await stream.writable()
                elif isinstance(data, bytes):
                    await stream.send(data, ())
                else:
                    await stream.send(data.body, data.buffers)
                if stream.state in (State.RECEIVED, State.CLOSED):
                    return
            stream.end()
        except Exception:
            stream.abort(f.CANCEL)
            raise
        finally:
            if isinstance(requests, AsyncGenerator):
                await requests.aclose()

    def _arrived(self) -> None:
        if self._dispatched is not None and not self._dispatched.done():
            self._dispatched.set_result(None)

    def _choose(self) -> Instance:
        """The next instance to try.

        Raises:
            NoInstances, InstanceNotFound, ConnectionFailed, Overloaded, Draining: there is none, and why.
        """
        client, tried = self._client, self._tried
        candidates = client.view.candidates
        if not tried:
            if not candidates and not isinstance(self._policy, Directly):
                raise NoInstances(client.view.name.path, client.where)
            return self._policy(self._request, candidates, client.load)
        if len(tried) <= client.retries and not isinstance(self._policy, Directly):
            rest = tuple(each for each in candidates if each.id not in tried)
            if not rest:  # none of those in rotation is left: one that is out may be better than nothing
                rest = tuple(each for each in client.view.table.instances if each.id not in tried)
            if rest:
                return self._policy(self._request, rest, client.load)
        raise self._refused()

    def _refused(self) -> Exception:
        if self._error is not None:
            return self._error  # type: ignore[return-value]
        client = self._client
        assert self._attempts is not None
        return ConnectionFailed(f'endpoint "{client.view.name.path}"', self._attempts)

    def _note(self, instance: Instance, attempts: list[tuple[str, str]]) -> None:
        self._tried = self._tried or set()
        self._tried.add(instance.id)
        self._attempts = [*(self._attempts or ()), *attempts]

    # the owner of a stream

    def stream_ended(self) -> None:
        """The last item has arrived, though perhaps nobody has read it."""
        if self._outcome is None:
            self._settle(_OK)
            if self._more is not None and self.stream is not None:
                self.stream.abort(f.CANCEL)
                if self._pump is not None:
                    self._pump.cancel()

    def stream_closed(self, stream: Stream) -> None:
        """The stream failed, was refused, or its session is gone."""
        if self._outcome is not None or stream is not self.stream or self.instance is None:
            return
        if stream.lost is not None:
            began = stream.accepted or stream.inbox or self.received
            if began and not (self._idempotent and not self.received and not stream.inbox):
                self._fail_incomplete(stream.lost)
            else:
                self._elsewhere([(stream.connection.address, stream.lost)])
            return
        if stream.failure is None:
            self._fail_incomplete("the worker cancelled the stream")
            return
        kind, code, detail = stream.failure
        if kind == f.REJECT:
            words = detail.decode("utf-8", "replace")
            if code != f.RejectCode.UNKNOWN:
                refusal = Draining if code == f.RejectCode.DRAINING else Overloaded
                self._error = refusal(self._client.view.name.path, self.instance.id, words, len(self._tried or ()) + 1)
            self._elsewhere([(stream.connection.address, words)])
        else:
            self._fail(*self._told(code, detail))

    def _told(self, code: int, detail: bytes) -> tuple[BaseException, Outcome]:
        """The error that the worker reports."""
        instance = self.instance
        assert instance is not None and self.stream is not None
        target = f'endpoint "{self._client.view.name.path}"'
        if code == f.ErrorCode.HANDLER:
            return decode_error(detail, instance_id=instance.id, request_id=self.request_id), Outcome.ERROR
        words = detail.decode("utf-8", "replace")
        if code == f.ErrorCode.INVALID:
            return InvalidRequest("", words.removeprefix("Invalid request: ")), Outcome.INVALID
        if code == f.ErrorCode.DEADLINE:
            return DeadlineExceeded(target, self.timeout_s or 0.0), Outcome.DEADLINE
        return (
            StreamIncomplete(target, instance.id, self.stream.connection.address, words, self.received),
            Outcome.LOST,
        )

    def _elsewhere(self, attempts: list[tuple[str, str]]) -> None:
        """No handler has begun, or the caller allows a second one: try another instance."""
        assert self.instance is not None
        self._release()
        self._note(self.instance, attempts)
        if self._more is not None:
            # What was streamed cannot be taken back from the caller's iterator.
            self._fail(self._refused(), Outcome.REFUSED)
            return
        self._dispatch()

    def stream_stopped(self) -> None:
        """Only handlers are asked to stop."""

    # its end

    def _fail_incomplete(self, reason: str) -> None:
        assert self.instance is not None and self.stream is not None
        error = StreamIncomplete(
            f'endpoint "{self._client.view.name.path}"',
            self.instance.id,
            self.stream.connection.address,
            reason,
            self.received,
        )
        self._fail(error, Outcome.LOST)

    def _fail(self, error: BaseException, outcome: Outcome) -> None:
        if self._outcome is not None:
            return
        self._error = error
        self._settle(outcome)
        self._arrived()
        if self.stream is not None:
            self.stream.wake()

    def _release(self) -> None:
        if self.stream is not None and self.instance is not None and self._outcome is None:
            self._client.load.release(self.instance.id)
            self.stream.owner = None
            self.stream = None

    def _settle(self, outcome: int) -> None:
        """The call is over on the wire: give back what it held."""
        self._outcome = outcome
        client = self._client
        if self.stream is not None and self.instance is not None:
            client.load.release(self.instance.id)
            self.stream.owner = None
        stats = client.stats
        stats.inflight -= 1
        stats.ended[outcome] += 1
        if self._timer is not None:
            self._timer.cancel()
        if self._context is not None:
            self._context.detach(self)
        self._request = None

    def _expire(self) -> None:
        if self._outcome is None:
            if self.stream is not None:
                self.stream.abort(f.CANCEL)
            target = f'endpoint "{self._client.view.name.path}"'
            self._fail(DeadlineExceeded(target, self.timeout_s or 0.0), Outcome.DEADLINE)
            if self._pump is not None:
                self._pump.cancel()

    def cancel(self) -> None:
        """Cancel the handler and drop what was received."""
        self.done = True
        self.items = _NOTHING
        if self.stream is not None:
            self.stream.inbox.clear()
        if self._outcome is None:
            stream = self.stream
            self._settle(Outcome.CANCELLED)
            if stream is not None:
                stream.abort(f.CANCEL)
                stream.wake()
            if self._pump is not None:
                self._pump.cancel()
            self._arrived()

    def ask_to_stop(self) -> None:
        """Ask the handler to finish by itself."""
        if self.stream is not None and self._outcome is None:
            self.stream.ask_to_stop()

    # reading

    def take(self) -> bool:
        """Make the next message's items the current ones. False: wait first.

        Raises:
            StopAsyncIteration: there are no more.
            Exception: what ended the call.
        """
        stream = self.stream
        if stream is not None and stream.inbox:
            cost, kind, flags, payload, buffers = stream.inbox.popleft()
            stream.read(cost)
            try:
                items = decode(payload, buffers)
            except DecodeError:
                self.cancel()
                raise
            if kind != f.BATCH:
                if flags & f.ANNOTATED:
                    items = (Annotated(*items) if self._annotated else items[0],)
                    self.received += 1
                    self.items = iter(items)
                    return True
                items = (items,)
            self.received += len(items)
            self.items = map(Annotated, items) if self._annotated else iter(items)
            return True
        if self.done:
            raise StopAsyncIteration
        if self._error is not None and self._outcome is not None:
            raise self._error
        if self._outcome is not None:
            self.done = True
            raise StopAsyncIteration
        return False

    async def wait(self) -> None:
        """Wait until `take` has something to say. Cancelled: so is the call."""
        stream = self.stream
        try:
            if stream is not None:
                if not stream.inbox and not stream.finished:
                    await stream.next_readable()
            elif self._dispatched is not None:
                await asyncio.shield(self._dispatched)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def leave(self) -> None:
        """The loop that read this was left."""
        if not self._client.loop.is_closed():
            self.cancel()

    def discard(self) -> None:
        """Nobody will read: let the request run, and drop what it answers."""
        if not self._client.loop.is_closed():
            self._client.spawn(self._discard())

    async def _discard(self) -> None:
        try:
            while True:
                self.items = _NOTHING
                if not self.take():
                    await self.wait()
        except (StopAsyncIteration, asyncio.CancelledError):
            pass
        except Exception as error:
            logger.info('a call to "%s" that nobody read failed: %s', self._client.view.name.path, error)

    @property
    def dispatching(self) -> asyncio.Future[None] | None:
        """Done when the request was sent or cannot be; None where it was sent at once."""
        return self._dispatched

    @property
    def refusal(self) -> BaseException | None:
        """Why the request could not be sent anywhere."""
        return self._error if self._outcome is not None and self.stream is None else None

    @property
    def over(self) -> bool:
        """Nothing more comes from the worker."""
        return self._outcome is not None

    @property
    def request_id(self) -> str:
        """The request's id, as the handler sees it; empty before it was sent."""
        if self._context is not None and self._context._id is not None and self._metadata:
            return self._context.id()
        if self.stream is None:
            return ""
        return f"{self.stream.connection.hello.nonce:x}-{self.stream.id:x}"

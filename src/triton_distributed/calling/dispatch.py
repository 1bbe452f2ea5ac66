"""Finding an instance for a request that cannot be sent at once, and another when the first does not take it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Set
from typing import TYPE_CHECKING

from triton_distributed.calling.direct import Directly
from triton_distributed.errors import (
    ConnectionFailed,
    Draining,
    MessageTooLarge,
    Overloaded,
    Paused,
    RuntimeClosed,
    TritonError,
)
from triton_distributed.names import Instance
from triton_distributed.observe import Outcome
from triton_distributed.payload.codec import encode
from triton_distributed.transport.stream import Stream
from triton_distributed.wire import frames as f
from triton_distributed.wire.assembly import request_bytes
from triton_distributed.wire.states import State

if TYPE_CHECKING:
    from triton_distributed.calling.call import Call
    from triton_distributed.runtime.client import Client
    from triton_distributed.transport.session import Session


class Dispatch:
    """The slow half of a call's way out; most calls never need one.

    Attributes:
        sent: done when the request is on its way, or cannot be sent.
        towards: the instance that has the request or is about to get it; None where none was chosen yet.
        tried: ids of the instances that did not take it; at most `TRD_RETRIES` are tried after the first.
    """

    __slots__ = (
        "_attempts",
        "_call",
        "_chosen",
        "_client",
        "_cut_off",
        "_dialling",
        "_refusal",
        "_task",
        "sent",
        "towards",
        "tried",
    )

    def __init__(self, call: Call, client: Client) -> None:
        self._call = call
        self._client = client
        self._chosen: Instance | None = None
        self._dialling = False
        self._attempts: list[tuple[str, str]] = []
        self._refusal: Exception | None = None
        self._task: asyncio.Task[None] | None = None
        self.sent: asyncio.Future[None] = client.loop.create_future()
        self.towards: Instance | None = None
        self.tried: set[int] = set()
        self._cut_off: set[int] = set()  # those of `tried` that may be dialled anew

    def start(self, chosen: Instance | None = None) -> None:
        """Send the request to `chosen`, or to whom the policy chooses, or elsewhere; in a task."""
        self._chosen = chosen
        self.towards = chosen or self.towards
        if self.sent.done():
            self.sent = self._client.loop.create_future()
        self._task = self._client.spawn(self._run())
        self._task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():  # before its first step: it did not even enter `_run`, which would have told the call
            self._call.fail(RuntimeClosed("a call"), Outcome.CANCELLED)

    def cancel(self) -> None:
        """The call is over."""
        self.arrived()
        if self._task is not None and self._task is not asyncio.current_task(self._client.loop):
            self._task.cancel()

    def arrived(self) -> None:
        """Whoever awaits the call may go on."""
        if not self.sent.done():
            self.sent.set_result(None)

    def note(
        self,
        instance: Instance,
        attempts: list[tuple[str, str]],
        refusal: Exception | None = None,
        *,
        cut_off: bool = False,
    ) -> None:
        """`instance` did not take the request: (address, reason) each, and its refusal if it gave one.

        Args:
            cut_off: the connection was lost before a handler began, which says little of the worker behind it: where
                nobody else is left, it is dialled anew, once.
        """
        if cut_off and instance.id not in self.tried:
            self._cut_off.add(instance.id)
        self.tried.add(instance.id)
        self._attempts += attempts
        known = self._refusal
        if isinstance(known, Overloaded) and isinstance(refusal, (Draining, Paused)):
            # Not everybody is shutting down: there is somebody to come back to.
            refusal = Overloaded(known.endpoint, known.instance_id, known.reason, len(self.tried), known.retry_after_s)
        self._refusal = refusal or known

    @property
    def attempts(self) -> list[tuple[str, str]]:
        """(address, reason) of each that did not take it, and of the one that is being dialled."""
        if self.towards is None or not self._dialling:
            return [*self._attempts]
        return [*self._attempts, (", ".join(self.towards.addresses), "no connection yet")]

    def refused(self) -> Exception:
        """What to tell the caller when nobody is left to try."""
        return self._refusal or ConnectionFailed(self._call.target, self._attempts)

    async def _run(self) -> None:
        call = self._call
        try:
            await self._send_somewhere()
        except asyncio.CancelledError as error:
            # Says nothing where the call was over; else the runtime ends, or the caller's iterator was cancelled.
            call.fail(RuntimeClosed("a call") if self._client.closing else error, Outcome.CANCELLED)
        except MessageTooLarge as error:
            call.fail(error, Outcome.INVALID)
        except Exception as error:  # whatever a policy or a request's iterator raises is the caller's to see
            call.fail(error, Outcome.UNREACHABLE if isinstance(error, TritonError) else Outcome.ERROR)

    async def _send_somewhere(self) -> None:
        call, client = self._call, self._client
        while True:
            instance = self._chosen or self._choose()
            self._chosen = None
            self._dialling, self.towards = True, instance
            try:
                session = await client.pool.connect(instance.addresses)
                self._dialling = False
            except ConnectionFailed as error:
                self._dialling = False
                client.unreachable(instance.addresses)
                self.note(instance, [*error.attempts])
                continue
            # A stream's id is taken when its request is written: ids must leave in order, and a CANCEL behind them.
            while session.paused and session.lost is None and not self._in_vain(session, instance):
                await session.resumed()
            if call.over:
                return
            if session.paused and session.lost is None:
                self.note(instance, [(session.address, "it takes no more, and has said nothing for long")])
            elif session.full:
                self.note(instance, [(session.address, f"{len(session.streams):,} streams are open on the session")])
            elif session.usable:
                await self._send_to(session, instance)
                return
            else:
                words = session.lost or "it takes no more calls"
                self.note(instance, [(session.address, words)], cut_off=session.lost is not None)

    def _in_vain(self, session: Session, instance: Instance) -> bool:
        """Whether to leave a request that is not sent yet to somebody else than a silent worker."""
        return session.silent and may_leave(self._call, instance, self.tried)

    def _choose(self) -> Instance:
        """The next instance to try.

        Raises:
            NoInstances, InstanceNotFound, ConnectionFailed, Overloaded, Draining: there is none, and why.
        """
        call, client = self._call, self._client
        candidates = client.view.candidates
        directly = isinstance(call.policy, Directly)
        if not self.tried:
            if not candidates and not directly:
                raise client.nobody()
            return call.policy(call.request, candidates, client.load)
        if len(self.tried) > client.retries:
            raise self.refused()
        rest: tuple[Instance, ...] = ()
        if not directly:
            rest = tuple(each for each in candidates if each.id not in self.tried)
            if not rest:  # none of those in rotation is left: one that is out may be better than nothing
                rest = tuple(each for each in client.view.table.instances if each.id not in self.tried)
        if not rest:
            rest = tuple(each for each in client.view.table.instances if each.id in self._cut_off)
        if not rest and not candidates and self._refusal is None and not directly:
            raise client.nobody()
        if not rest:
            raise self.refused()
        chosen = call.policy(call.request, rest, client.load)
        self._cut_off.discard(chosen.id)
        return chosen

    async def _send_to(self, session: Session, instance: Instance) -> None:
        call = self._call
        body, buffers = (call.body, []) if isinstance(call.body, bytes) else (call.body.body, call.body.buffers)
        size = request_bytes(call.metadata, body, buffers)
        if size > session.send_limit:
            raise MessageTooLarge("the request", size, session.send_limit)
        stream = session.open_stream(False)
        call.own(stream, instance)
        await stream.send_request(
            instance.id, self._client.key, call.left_s, call.metadata, body, buffers, call.more is None
        )
        if call.stream is not stream:
            return  # it was refused meanwhile, and is on its way elsewhere
        self.arrived()
        if call.stopping:
            stream.ask_to_stop()
        if call.more is not None:
            await _send_more(stream, call.more)


def may_leave(call: Call, instance: Instance, tried: Set[int]) -> bool:
    """Whether another instance may be tried and is there: one in rotation, beside those that were tried."""
    return (
        not isinstance(call.policy, Directly)
        and len(tried) < call.client.retries
        and call.client.view.others({instance.id, *tried})
    )


async def _send_more(stream: Stream, requests: AsyncIterator[object]) -> None:
    """Stream further requests until they end, or the response does."""
    try:
        async for each in requests:
            data = encode(each, "request")
            if not isinstance(data, bytes):
                await stream.send(data.body, data.buffers)
                del data  # a bytearray cannot be resized while something refers to its memory
            elif len(data) > f.SMALL:
                await stream.send(data, ())
            elif stream.push(data):
                await stream.writable()
            if stream.state in (State.RECEIVED, State.CLOSED):
                return
        stream.end()
    except (Exception, asyncio.CancelledError):
        stream.abort(f.CANCEL)
        raise
    finally:
        if isinstance(requests, AsyncGenerator):
            await requests.aclose()

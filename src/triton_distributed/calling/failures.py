"""What it means for a call that its stream failed: the caller is told, or another instance is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from triton_distributed.calling import agreement
from triton_distributed.calling.dispatch import Dispatch, may_leave
from triton_distributed.calling.failover import NO_BUDGET, STOPPED, TOO_OFTEN, Ending
from triton_distributed.calling.reported import failure, refusal
from triton_distributed.calling.resume import REFILL_S, Resumption
from triton_distributed.errors import InvalidRequest, Overloaded, Refusal, RuntimeClosed, StreamIncomplete
from triton_distributed.names import Instance
from triton_distributed.observe import Outcome
from triton_distributed.wire import frames as f

if TYPE_CHECKING:
    from triton_distributed.calling.call import Call
    from triton_distributed.transport.stream import Stream

# A handler passes on what it was told of the request, or of a want of room elsewhere.
NOT_ITS_FAULT = (InvalidRequest, Refusal)


def closed(call: Call, stream: Stream, instance: Instance) -> None:
    """The call's stream failed, was refused, or its session is gone."""
    session = stream.connection
    began = bool(stream.accepted or stream.inbox or call.received)
    if stream.lost is not None:
        sure = not began and (not session.torn or stream.id in session.unsent)
        ending = Ending.CUT_OFF if sure else Ending.LOST
    elif stream.failure is None:
        ending = Ending.CANCELLED
    elif stream.failure[0] == f.REJECT:
        ending = Ending.OVERLOADED if stream.failure[1] == f.RejectCode.OVERLOADED else Ending.REFUSED
    else:
        ending = Ending.CUT if stream.failure[1] == f.ErrorCode.CANCELLED else Ending.FAILED
    agreement.compared(call, ending, stream, lambda: closed_(call, stream, instance))


def closed_(call: Call, stream: Stream, instance: Instance) -> None:
    if stream.lost is not None:
        _lost(call, stream, stream.lost, instance)
    elif stream.failure is None:
        call.client.ejector.failed(instance.id)
        _fail_incomplete(call, "the worker cancelled the stream")
    elif stream.failure[0] == f.REJECT:
        _refused(call, stream, instance, *stream.failure[1:])
    else:
        _failed(call, stream, instance, *stream.failure[1:])


def _lost(call: Call, stream: Stream, reason: str, instance: Instance) -> None:
    session = stream.connection
    began = bool(stream.accepted or stream.inbox or call.received)
    # What would tell may have been lost with the connection; a request that never left tells it too.
    if not began and (not session.torn or stream.id in session.unsent):
        _elsewhere(call, [(session.address, reason)], cut_off=True)
        return
    call.client.ejector.failed(instance.id, session.hello.nonce)
    if call.resumption is not None:
        call.resumption.lost = (session.address, reason)  # see `Receiving.take`: the inbox comes first
    else:
        _begun(call, stream, reason, began)


def _refused(call: Call, stream: Stream, instance: Instance, code: int, detail: bytes) -> None:
    client, tries = call.client, len(call.dispatch.tried) + 1 if call.dispatch is not None else 1
    words, refused = refusal(code, detail, client.view.name.path, instance.id, tries)
    if code == f.RejectCode.UNKNOWN:
        client.view.disowned(instance.id)
    if code == f.RejectCode.PAUSED:
        client.view.disowned(instance.id)
    if isinstance(refused, Overloaded) and not client.may_retry():
        call.fail(refused, Outcome.REFUSED)
    else:
        _elsewhere(call, [(stream.connection.address, words)], refused)


def _failed(call: Call, stream: Stream, instance: Instance, code: int, detail: bytes) -> None:
    """The worker reports an error."""
    words = detail.decode("utf-8", "replace")
    if code == f.ErrorCode.CANCELLED:
        if call.resumption is not None:
            call.resumption.lost = (stream.connection.address, words)
        else:
            _begun(call, stream, words, True)
        return
    found = failure(code, detail, call.target, instance.id, call.request_id, call.timeout_s)
    error, outcome = found or (_incomplete(call, words), Outcome.LOST)
    if (outcome is Outcome.ERROR and not isinstance(error, NOT_ITS_FAULT)) or (
        outcome is Outcome.DEADLINE and not call.moved
    ):
        call.client.ejector.failed(instance.id, began=call.began)
    call.fail(error, outcome)


def _begun(call: Call, stream: Stream, reason: str, began: bool) -> None:
    """The instance is lost to the call, and its handler had begun, or may have."""
    if call.stopping and call.idempotent:
        _fail_incomplete(call, f"{reason}; {STOPPED}", began)
    elif not _may_begin_again(call, stream):
        _fail_incomplete(call, reason, began)
    elif not call.client.may_retry():
        _fail_incomplete(call, f"{reason}; {NO_BUDGET}", began)
    else:
        error = _incomplete(call, reason, began)
        call.received = 0
        _elsewhere(call, [(stream.connection.address, reason)], error)


def _may_begin_again(call: Call, stream: Stream) -> bool:
    """The caller allows a second handler and has seen nothing of an answer; what `client.call` has, nobody saw."""
    return call.idempotent and (call.unary or not (call.received or stream.inbox))


def silent(call: Call, stream: Stream, instance: Instance, words: str) -> None:
    agreement.compared(call, Ending.SILENT, stream, lambda: silent_(call, stream, instance, words))


def silent_(call: Call, stream: Stream, instance: Instance, words: str) -> None:
    """The worker says nothing: go elsewhere where the caller allows it and somebody is there, else wait on.

    The stream is cancelled, for the worker may wake.
    """
    resumption = call.resumption
    if call.stopping or (resumption is None and not _may_begin_again(call, stream)):
        return
    fresh = resumption is not None and (resumption.progress or stream.inbox)
    if not may_leave(call, instance, set() if fresh or call.dispatch is None else call.dispatch.tried):
        return
    lost = (stream.connection.address, words)
    if resumption is not None and stream.inbox:
        resumption.lost = lost  # see `Receiving.take`: the inbox comes first
        stream.abort(f.CANCEL)
    elif (resumption is not None and resumption.progress) or call.client.may_retry():
        stream.abort(f.CANCEL)
        if resumption is None:
            call.received = 0
            _elsewhere(call, [lost])
        else:
            resumption.lost = lost
            go_on_(call, resumption, paid=True)


def go_on(call: Call, resumption: Resumption) -> None:
    agreement.compared(call, Ending.LOST, None, lambda: go_on_(call, resumption))


def go_on_(call: Call, resumption: Resumption, paid: bool = False) -> None:
    """The instance was lost, and what had come from it is read: another goes on behind the last token.

    Args:
        paid: it is off the budget of retries already.
    """
    assert resumption.lost is not None
    address, reason = resumption.lost
    assert call.instance is not None
    error = StreamIncomplete(call.target, call.instance.id, address, reason, call.received, True, call.instances)
    if call.stopping:
        _fail_incomplete(call, f"{reason}; {STOPPED}")
        return
    if not resumption.allowed(call.client.loop.time()):
        _fail_incomplete(call, f"{reason}; {TOO_OFTEN.format(refill=REFILL_S)}")
        return
    if resumption.progress:
        call.dispatch = None  # an instance that failed before this one answered may be tried again
    elif not paid and not call.client.may_retry():
        _fail_incomplete(call, f"{reason}; {NO_BUDGET}")
        return
    call.metadata = resumption.go_on(call.metadata)
    _elsewhere(call, [(address, reason)], error)


def _elsewhere(
    call: Call, attempts: list[tuple[str, str]], refused: Exception | None = None, *, cut_off: bool = False
) -> None:
    """No handler has begun, or the caller allows a second one: try another instance."""
    assert call.instance is not None
    call.release()
    if call.dispatch is None:
        call.dispatch = Dispatch(call, call.client)
    call.dispatch.note(call.instance, attempts, refused, cut_off=cut_off)
    if call.more is not None or call.stopping:
        # What was streamed cannot be taken back from the caller's iterator, and a call that was asked to stop is over.
        call.dispatch.cancel()
        call.fail(call.dispatch.refused(), Outcome.REFUSED)
    elif call.client.closed:
        call.fail(RuntimeClosed("a call"), Outcome.CANCELLED)
    else:
        call.dispatch.start()


def _incomplete(call: Call, reason: str, began: bool = True) -> StreamIncomplete:
    assert call.instance is not None
    assert call.stream is not None
    address = call.stream.connection.address
    return StreamIncomplete(call.target, call.instance.id, address, reason, call.received, began, call.instances)


def _fail_incomplete(call: Call, reason: str, began: bool = True) -> None:
    call.fail(_incomplete(call, reason, began), Outcome.LOST)

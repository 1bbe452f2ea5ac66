"""Where the time of one call went, and how the call ended."""

from __future__ import annotations

from struct import Struct
from typing import Protocol

from triton_distributed.names import Instance
from triton_distributed.observe import Outcome
from triton_distributed.observe.observer import CallEnd
from triton_distributed.observe.timing import Timing
from triton_distributed.transport.stream import Stream
from triton_distributed.wire.frames import TIMES_BYTES

_times = Struct("<4f").unpack


class Timed(Protocol):
    """The part of a call that says where its time went; see `calling.call.Call`."""

    began: float
    sent: float
    first: float
    ended: float
    stream: Stream | None
    instance: Instance | None
    error: BaseException | None

    @property
    def request_id(self) -> str: ...


def timing_of(call: Timed, now: float) -> Timing:
    """The timing of a call.

    Args:
        now: the present time, on `time.monotonic`.
    """
    began, stream, ended = call.began, call.stream, call.ended or now
    first = call.first - began if call.first else None
    if stream is None:
        return Timing(ended - began, first_item_s=first)
    sent = call.sent or began
    if not call.ended:
        return Timing(ended - began, sent - began, first_item_s=first)
    if len(stream.times) != TIMES_BYTES:
        return Timing(ended - began, sent - began, ended - sent if stream.failure is None else None, first_item_s=first)
    queued_s, loop_wait_s, ran_s, blocked_s = _times(stream.times)
    away_s = ended - sent
    return Timing(
        total_s=ended - began,
        client_queue_s=sent - began,
        network_s=max(0.0, away_s - queued_s - loop_wait_s - ran_s),
        worker_queue_s=queued_s,
        loop_wait_s=loop_wait_s,
        handler_s=max(0.0, ran_s - blocked_s),
        reader_s=blocked_s,
        first_item_s=first,
    )


def end_of_call(call: Timed, outcome: int) -> CallEnd:
    """How a call has just ended, for its observers."""
    instance_id = None if call.instance is None else call.instance.id
    timing = timing_of(call, call.ended)
    return CallEnd(Outcome(outcome).name.lower(), call.error, call.request_id, instance_id, timing)

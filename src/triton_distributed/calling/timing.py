"""Where the time of one call went."""

from __future__ import annotations

from struct import Struct

import msgspec

from triton_distributed.calling.call import Call
from triton_distributed.wire.frames import TIMES_BYTES

_times = Struct("<4f").unpack


class Timing(msgspec.Struct, frozen=True):
    """Where the time of one call went, in seconds. Times that are not known (yet) are None.

    The parts of the worker come with the end of its answer. They are None while the stream is open, after an error, for
    a worker of a version that does not send them, and where the worker took less than 5 ms in all; `network_s` then
    includes these.

    Attributes:
        total_s: from the call to its end, or until now. With `reader_s` it is the sum of the parts.
        client_queue_s: from the call until its request was sent to the instance that answered: a connection is made,
            there is no instance yet, or other attempts have failed.
        network_s: from then to the arrival of the end, without the times of the worker: both directions together.
        worker_queue_s: the request waited for a place (`max_inflight`).
        loop_wait_s: the admitted request waited for the worker's event loop, until its handler began.
        handler_s: the handler ran, without `reader_s`.
        reader_s: the handler waited because this caller did not read.
        first_item_s: from the call to the reading of the first item.
    """

    total_s: float
    client_queue_s: float | None = None
    network_s: float | None = None
    worker_queue_s: float | None = None
    loop_wait_s: float | None = None
    handler_s: float | None = None
    reader_s: float | None = None
    first_item_s: float | None = None

    def __str__(self) -> str:
        """The known parts in one line, in milliseconds."""
        parts = [
            ("client queue", self.client_queue_s),
            ("network", self.network_s),
            ("worker queue", self.worker_queue_s),
            ("loop wait", self.loop_wait_s),
            ("handler", self.handler_s),
            ("reader", self.reader_s),
        ]
        known = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in parts if seconds is not None)
        first = "" if self.first_item_s is None else f"; first item after {1000 * self.first_item_s:.1f} ms"
        return f"{1000 * self.total_s:.1f} ms{f' ({known})' if known else ''}{first}"


def timing_of(call: Call, now: float) -> Timing:
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

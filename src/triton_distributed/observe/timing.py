"""Where the time of one call or one request went."""

from __future__ import annotations

import msgspec


class Timing(msgspec.Struct, frozen=True):
    """Where the time of one call went, or of one request at a worker, in seconds. Unknown times are None.

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
        first_item_s: from the call to the arrival of the first item. If the reader takes it late, to the arrival of
            what came last before that.
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

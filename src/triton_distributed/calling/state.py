"""The life of a call, in one table.

    NEW ──PLACE──▶ PLACING ──SENT──▶ OPEN ──END──▶ UNREAD ──▶ OVER, READ, FAILED or CLOSED
     └─────────────SENT──────────────▲ └──PLACE──▶ PLACING                 (the reader has the end)

A call that needs no waiting goes from NEW to OPEN at once. It goes back to PLACING if its attempt failed and it tries
another instance. UNREAD means that nothing more comes from the worker, but the reader has not reached the end. The
states after UNREAD differ in what later readers get.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class State(IntEnum):
    """The state of a call."""

    NEW = 0  # The request was not sent yet.
    PLACING = 1  # A task looks for an instance, dials it, or waits for its session to take the request.
    OPEN = 2  # A stream is open, and its request has been sent or is being sent.
    UNREAD = 3  # The call is over on the wire. Items, or the end, wait for the reader.
    OVER = 4  # The reader knows that nothing more comes.
    READ = 5  # An `async for` has read all items. Another one gets an error instead of an empty answer.
    FAILED = 6  # The reader got the error that ended the call.
    CLOSED = 7  # The reader left, or the call was cancelled here.


class Input(IntEnum):
    """What happens to a call."""

    PLACE = 0  # A task begins to send the request.
    SENT = 1  # A stream was opened for the request.
    END = 2  # The call is over on the wire, well or not.
    LAST = 3  # A reader learns that nothing more comes.
    WHOLE = 4  # An `async for` learns that nothing more comes.
    RAISE = 5  # A reader gets the error that ended the call.
    LEAVE = 6  # The reader leaves before the end.


NEW: Final = 0
PLACING: Final = 1
OPEN: Final = 2
UNREAD: Final = 3
OVER: Final = 4
READ: Final = 5
FAILED: Final = 6
CLOSED: Final = 7
PLACE: Final = 0
SENT: Final = 1
END: Final = 2
LAST: Final = 3
WHOLE: Final = 4
RAISE: Final = 5
LEAVE: Final = 6

# AFTER[state][input] is the next state. Other inputs cannot happen: their lookup fails with KeyError.
# What `Call.take` returns. A StopAsyncIteration there would cost 2 % of a call in compiled code.
WAIT: Final = 0
TAKEN: Final = 1
ENDED: Final = 2

AFTER: Final[tuple[dict[int, int], ...]] = (
    {PLACE: PLACING, SENT: OPEN, END: UNREAD},
    {PLACE: PLACING, SENT: OPEN, END: UNREAD},
    {PLACE: PLACING, END: UNREAD},
    {LAST: OVER, WHOLE: READ, RAISE: FAILED, LEAVE: CLOSED},
    {LAST: OVER, WHOLE: READ},
    {LAST: READ, WHOLE: READ},
    {LAST: FAILED, WHOLE: FAILED},
    {LAST: CLOSED, WHOLE: CLOSED, RAISE: CLOSED},  # A reader that was cancelled still gets CancelledError.
)

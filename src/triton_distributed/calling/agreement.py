"""Temporary: asserts that `failover.decide` and `Attempts` agree with what the code before them does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from triton_distributed.calling import failover
from triton_distributed.calling.direct import Directly
from triton_distributed.calling.failover import (
    Delivered,
    Ending,
    Error,
    Fail,
    Means,
    Resume,
    Retry,
    Terms,
    Verdict,
    Wait,
)
from triton_distributed.errors import RuntimeClosed, StreamIncomplete

if TYPE_CHECKING:
    from triton_distributed.calling.call import Call


def expected(call: Call, ending: Ending, stream: Any = None, instance: Any = None, budget: bool = True) -> Verdict:
    """What `decide` says now; takes nothing from a budget."""
    client, resumption = call.client, call.resumption
    instance = instance or call.instance
    inbox = bool(stream is not None and stream.inbox)
    advanced = resumption is not None and resumption.progress
    fresh = resumption is not None and (advanced or inbox) and ending in (Ending.LOST, Ending.CUT, Ending.SILENT)
    tried = set() if fresh or call.dispatch is None else call.dispatch.tried
    if ending is Ending.SILENT or ending is Ending.STALLED:
        left = len(tried) < client.retries
    else:
        left = len({*tried, instance.id}) <= client.retries
    now = client.loop.time()
    means = Means(
        attempts_left=left,
        others=not isinstance(call.policy, Directly) and client.view.others({instance.id, *tried}),
        resumptions_left=resumption is not None and copy.copy(resumption).allowed(now),
        budget=budget,
        closed=client.closed,
    )
    terms = Terms(call.idempotent, call.unary, resumption is not None, call.more is not None, call.stopping)
    return failover.decide(ending, terms, Delivered(bool(call.received), inbox, advanced), means)


def compared(call: Call, ending: Ending, stream: Any, act: Callable[[], None]) -> None:
    """Run what the old code does about a failed attempt, and compare."""
    wants = [expected(call, ending, stream, budget=each) for each in (False, True)]
    call.client.granted = None
    dispatch, task = call.dispatch, None if call.dispatch is None else call.dispatch._task
    waits = call.resumption is not None and call.resumption.lost is not None
    act()
    want = wants[call.client.granted is not False]
    if want == failover.READ_FIRST or (call.resumption is not None and call.resumption.lost is not None and not waits):
        # The old code lets the reader come first also where nothing is unread.
        assert call._outcome is None, (ending, want)
        assert call.resumption is not None, (ending, want)
        assert call.resumption.lost is not None, (ending, want)
        return
    if call._outcome is not None:
        error = call._error
        if ending is Ending.SILENT:  # the old code ended a call that has no resumption left, which may wait
            assert want == failover.STAY, (ending, want, error)
            assert failover.TOO_OFTEN[:20] in str(error), (ending, want, error)
            return
        assert isinstance(want, Fail), (ending, want, error)
        if want.error is Error.INCOMPLETE:
            assert type(error) is StreamIncomplete, (want, error)
            assert (failover.STOPPED in str(error), failover.NO_BUDGET in str(error)) == (
                want.note == failover.STOPPED,
                want.note == failover.NO_BUDGET,
            ), (want, error)
            assert (failover.TOO_OFTEN[:20] in str(error)) == (want.note == failover.TOO_OFTEN), (want, error)
        elif want.error is Error.CLOSED:
            assert type(error) is RuntimeClosed, (want, error)
        elif want.error is Error.REFUSED:
            assert call.dispatch is None or call.dispatch.attempts_.error(call.target) is not None, want
        else:
            assert want.error is Error.REPORTED, (ending, want, error)
    elif call.dispatch is not None and (call.dispatch is not dispatch or call.dispatch._task is not task):
        assert isinstance(want, Retry | Resume) or want == Fail(Error.EXHAUSTED), (ending, want)
        assert (call.resumption is not None and ending in (Ending.LOST, Ending.CUT, Ending.SILENT)) == (
            isinstance(want, Resume) or (want == Fail(Error.EXHAUSTED) and call.resumption is not None)
        ) or want == Fail(Error.EXHAUSTED), (ending, want)
        call.dispatch.exhausted = isinstance(want, Fail)
    else:
        assert isinstance(want, Wait), (ending, want)

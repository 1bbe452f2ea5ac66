"""The one timer of a model's answers looks at each of them in time. In virtual time."""

from __future__ import annotations

import asyncio
import weakref

from triton_distributed.llm.models.stalls import StallWatch
from triton_distributed.testing import run_in_virtual_time


class Waiting:
    """An answer that waits for its worker, and whose limit is reached after `limit_s`."""

    def __init__(self, limit_s: float) -> None:
        self.now = asyncio.get_running_loop().time
        self.due = self.now() + limit_s
        self.late: float | None = None
        self.looks = 0

    def watch(self) -> float | None:
        self.looks += 1
        left = self.due - self.now()
        if left > 0.001:
            return min(left, 1.0)
        self.late = -left
        return None


async def lateness() -> None:
    watch, answers = StallWatch(1.0), []
    for more in (0.0, 0.01, 0.5, 3.0):
        answers.append(Waiting(1.0 + more))
        watch.add(answers[-1])
        await asyncio.sleep(0.3)
    dropped = Waiting(1.0)
    gone = weakref.ref(dropped)
    watch.add(dropped)
    del dropped
    assert gone() is None
    await asyncio.sleep(5)
    late = Waiting(1.0)  # No answer was left, so the timer had ended.
    watch.add(late)
    await asyncio.sleep(1.1)
    for each in (*answers, late):
        assert each.late is not None
        assert -0.001 <= each.late < 1 / 16
        assert each.looks < 10


def test_each_answer_is_looked_at_in_time_and_none_is_kept_alive():
    run_in_virtual_time(lateness())

"""Figures of replays, with matplotlib."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from triton_distributed.llm.replay.report import Report, Served

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("drawing needs matplotlib: pip install 'triton-distributed[replay]'") from error

POINTS = 120
"""Points of a curve over time. Each is the mean of what lies within three points' distance."""


def draw(reports: Sequence[Report], path: str | Path) -> None:
    """Draw replays of one trace into a file, one colour for each: times to the first token, queues, and hits.

    Queues and hits are moving means. With pools, a dashed curve has the requests that were handed over.

    Args:
        reports: at least one.
        path: of the file. Its ending tells the format; PNG without one.

    Raises:
        OSError: the file cannot be written.
        ValueError: matplotlib does not know the format.
    """
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    first, queue, hits = figure.subplots(1, 3)
    for report in reports:
        _first_tokens(first, report)
        waiting = [(each.at_s, each.held + each.waiting, 1) for each in report.moments]
        queue.plot(*_moving(waiting), linewidth=1.5, alpha=0.8)
        cached = [(each.at_s, 100 * each.cached_tokens, each.prompt_tokens) for each in report.requests]
        hits.plot(*_moving(cached), linewidth=1.5, alpha=0.8)
    first.set(xlabel="s to the first token", ylabel="requests, %", xscale="log", ylim=(0, 100))
    queue.set(xlabel="s", ylabel="requests without a first token")
    hits.set(xlabel="s", ylabel="prompt tokens from the cache, %", ylim=(0, None))
    for axes in (first, queue, hits):
        axes.grid(visible=True, alpha=0.3)
    limit_s = reports[0].ttft_sla_s
    first.axvline(limit_s, color="grey", linestyle=":", linewidth=1, label=f"limit: {limit_s:g} s")
    figure.legend(loc="outside lower center", ncols=5)
    pools = reports[0].pools
    workers = " + ".join(f"{each.workers} {each.role}" for each in pools) if len(pools) > 1 else pools[0].workers
    figure.suptitle(f"{reports[0].trace} × {reports[0].speed:g}, {workers} workers")
    figure.savefig(path, dpi=110)


def _first_tokens(axes: Axes, report: Report) -> None:
    (line,) = axes.plot(*_ranked(report.requests), label=report.policy, linewidth=1.5)
    if handed_over := [each for each in report.requests if each.prefill_worker >= 0]:
        label = f"{report.policy}, handed over"
        axes.plot(*_ranked(handed_over), label=label, linewidth=1.5, linestyle="--", color=line.get_color())


def _ranked(requests: Sequence[Served]) -> tuple[list[float], list[float]]:
    """Times to the first token, and in percent how many requests took at most as long."""
    times = sorted(each.ttft_s for each in requests)
    return times, [100 * (rank + 1) / len(times) for rank in range(len(times))]


def _moving(rows: Sequence[tuple[float, int, int]]) -> tuple[list[float], list[float]]:
    """Times, and for each the sum of the second numbers of the rows around it, divided by that of the third ones."""
    times = [each[0] for each in rows]
    above, below = ([0, *accumulate(each[place] for each in rows)] for place in (1, 2))
    step_s = (times[-1] - times[0]) / POINTS
    at_s, means = [], []
    for number in range(POINTS + 1):
        middle_s = times[0] + number * step_s
        first, last = bisect_left(times, middle_s - 3 * step_s), bisect_right(times, middle_s + 3 * step_s)
        if below[last] > below[first]:
            at_s.append(middle_s)
            means.append((above[last] - above[first]) / (below[last] - below[first]))
    return at_s, means

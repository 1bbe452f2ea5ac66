"""Figures of replays, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from triton_distributed.llm.replay.report import Report

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("drawing needs matplotlib: pip install 'triton-distributed[replay]'") from error

WINDOWS = 60
"""Points of the curve of hits."""


def draw(reports: Sequence[Report], path: str | Path) -> None:
    """Draw replays of one trace into a file, one colour for each: times to the first token, queues, and hits.

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
        moments = report.moments
        waiting = [each.held + each.waiting for each in moments]
        queue.plot([each.at_s for each in moments], waiting, label=report.policy, linewidth=1)
        _hits(hits, report)
    first.set(xlabel="s to the first token", ylabel="requests, %", xscale="log", ylim=(0, 100))
    queue.set(xlabel="s", ylabel="requests without a first token")
    hits.set(xlabel="s", ylabel="prompt tokens from the cache, %", ylim=(0, None))
    for axes in (first, queue, hits):
        axes.grid(visible=True, alpha=0.3)
    first.axvline(reports[0].ttft_sla_s, color="grey", linestyle=":", linewidth=1)
    first.legend()
    figure.suptitle(f"{reports[0].trace} × {reports[0].speed:g}, {len(reports[0].workers)} workers")
    figure.savefig(path, dpi=110)


def _first_tokens(axes: Axes, report: Report) -> None:
    times = sorted(each.ttft_s for each in report.requests)
    axes.plot(times, [100 * (rank + 1) / len(times) for rank in range(len(times))], label=report.policy, linewidth=1.5)


def _hits(axes: Axes, report: Report) -> None:
    size = -(-len(report.requests) // WINDOWS)
    at, part = [], []
    for first in range(0, len(report.requests), size):
        window = report.requests[first : first + size]
        at.append(window[len(window) // 2].at_s)
        part.append(100 * sum(each.cached_tokens for each in window) / sum(each.prompt_tokens for each in window))
    axes.plot(at, part, label=report.policy, linewidth=1)

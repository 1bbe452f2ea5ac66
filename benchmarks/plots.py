"""Pictures of a result file, PNG and SVG next to it: `python -m benchmarks.plots [FILE …]`.

Bars are medians over the rounds, and the thin line on a bar reaches from the lowest to the highest round. A picture has
the peers of one file only, since figures of two runs do not compare.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rounds import OURS, RESULTS, TCP, Spread, read_result
from benchmarks.table import SOCKET, SWEEP, name_of, number

if TYPE_CHECKING:  # matplotlib takes long to import: only what draws does so.
    from matplotlib.figure import Figure

FILES = (RESULTS / "latest.json", RESULTS / "peers.json")
NOT_SHOWN = ("native", "traced")  # They have a table of their own.
COLOURS = {
    "ours": "#1f6fb4",
    "ours-compiled": "#0b3c66",
    "ours-socket": "#7fb2dd",
    "yardstick": "#9a9a9a",
    "grpc.aio": "#e07b39",
    "Dynamo": "#6f9a2c",
    "Dynamo, pushed": "#3f6b1d",
    "nats-py": "#8e6bb0",
    "SSE": "#c9a227",
    "Ray actor": "#b5566e",
    "Ray Serve": "#7d3247",
    "bare": "#c4c4c4",
}
OTHER = "#5b6b7b"
MORE, LESS = "more is better", "less is better"


@dataclass(frozen=True)
class Panel:
    """One set of bars: a figure of a workload for each peer."""

    title: str
    workload: str
    figure: str
    better: str
    scale: float = 1.0  # From the figure's unit to that of the title.


@dataclass(frozen=True)
class Chart:
    """One picture, with its panels side by side."""

    name: str
    title: str
    panels: tuple[Panel, ...]


CHARTS = (
    Chart(
        "calls",
        "Calls of one item",
        (
            Panel("64 callers at once: calls/s", "concurrent", "per_s", MORE),
            Panel("1 caller: median time of a call, µs", "alone", "p50_us", LESS),
            Panel("64 callers at once: CPU a call, µs", "concurrent", "cpu_us", LESS),
        ),
    ),
    Chart(
        "streams",
        "Streams of items",
        (
            Panel("16 × 500 items: items/s", "streams", "per_s", MORE),
            Panel("16 × 500 items: CPU an item, µs", "streams", "cpu_us", LESS),
            Panel("256 streams, an item each 10 ms: p99 lateness, ms", "paced", "p99_ms", LESS),
        ),
    ),
    Chart(
        "payloads",
        "Larger payloads",
        (
            Panel("10 KB back in 50 parts, 16 callers: parts/s", "chunks", "per_s", MORE),
            Panel("lists of 512 tokens, 16 callers: lists/s", "lists", "per_s", MORE),
            Panel("1 MB there and back: median time, ms", "unary", "p50_us", LESS, 1e-3),
        ),
    ),
    Chart(
        "arrays",
        "Float32 arrays there and back, bytes counted once",
        (
            Panel("16 MiB: GB/s", "array", "gb_per_s", MORE),
            Panel("16 MiB: CPU a round trip, ms", "array", "cpu_us", LESS, 1e-3),
            Panel("1 GiB: GB/s", "gigabyte", "gb_per_s", MORE),
        ),
    ),
    Chart(
        "idle",
        "Idle streams on one connection, resident memory",
        (
            Panel("worker: KiB a stream", "idle", "worker_bytes", LESS, 1 / 1024),
            Panel("client: KiB a stream", "idle", "client_bytes", LESS, 1 / 1024),
        ),
    ),
    Chart(
        "start",
        "Start and cancellation",
        (
            Panel("hello world, two processes: time to the first reply, s", "hello", "both_s", LESS),
            Panel("import: ms", "import", "import_ms", LESS),
            Panel("cancellation through three workers: median, ms", "cancel", "p50_ms", LESS),
        ),
    ),
)
SWEEPS = (
    ("items/s", "per_s", MORE),
    ("CPU an item, µs", "cpu_us", LESS),
    ("peak memory of all processes, MiB", "peak_mib", LESS),
)


def shown_peers(result: dict[str, Any], workloads: Iterable[str]) -> list[str]:
    """Return the peers of a result that have one of the workloads, ours first."""
    found = dict.fromkeys(peer for name in workloads for peer in result["figures"].get(name, {}))
    ours = (*reversed(OURS), SOCKET)
    rest = [peer for peer in found if peer not in ours and peer not in NOT_SHOWN and not peer.endswith(TCP)]
    return [*(peer for peer in ours if peer in found), *rest]


def bars(result: dict[str, Any], panel: Panel, peers: list[str]) -> dict[str, Spread]:
    """Return the figures of a panel by peer, in the panel's unit."""
    found = result["figures"].get(panel.workload, {})
    return {
        peer: [value * panel.scale for value in found[peer][panel.figure]]
        for peer in peers
        if panel.figure in found.get(peer, {})
    }


def draw_bars(result: dict[str, Any], chart: Chart) -> Figure | None:
    """Draw a chart; None if the result has none of its figures."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    everyone = shown_peers(result, (panel.workload for panel in chart.panels))
    panels = [(panel, bars(result, panel, everyone)) for panel in chart.panels]
    panels = [(panel, found) for panel, found in panels if found]
    if not panels:
        return None
    peers = [peer for peer in everyone if any(peer in found for _, found in panels)]
    picture = Figure(figsize=(1.2 + 3.9 * len(panels), 1.6 + 0.36 * len(peers)), layout="constrained")
    axes = picture.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (panel, found) in zip(axes, panels, strict=True):
        most = max(high for _, _, high in found.values())
        for place, peer in enumerate(peers):
            if peer not in found:
                axis.text(0.01 * most, place, "–", va="center", color="#666666")
                continue
            middle, low, high = found[peer]
            axis.barh(place, middle, 0.7, color=COLOURS.get(peer, OTHER))
            axis.plot([low, high], [place, place], color="black", linewidth=1, solid_capstyle="butt")
            axis.text(max(high, middle) + 0.015 * most, place, number(middle), va="center", fontsize=9)
        axis.set_xlim(0, most * 1.22)
        axis.set_title(f"{panel.title}\n({panel.better})", fontsize=9.5)
        axis.xaxis.set_major_formatter(FuncFormatter(_short))
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.grid(axis="x", color="#dddddd")
        _plain(axis)
    axes[0].set_yticks(range(len(peers)), map(name_of, peers))
    axes[0].invert_yaxis()
    _label(picture, chart.title, result)
    return picture


def draw_sweep(result: dict[str, Any]) -> Figure | None:
    """Draw the figures over the number of concurrent streams; None if the result has none."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    peers = shown_peers(result, (f"sweep {streams}" for streams in SWEEP))
    if not peers:
        return None
    picture = Figure(figsize=(13, 4.2), layout="constrained")
    for axis, (title, figure, better) in zip(picture.subplots(1, len(SWEEPS)), SWEEPS, strict=True):
        for peer in peers:
            found = {
                streams: spread
                for streams in SWEEP
                if (spread := result["figures"].get(f"sweep {streams}", {}).get(peer, {}).get(figure))
            }
            axis.plot(
                list(found),
                [each[0] for each in found.values()],
                "o-",
                color=COLOURS.get(peer, OTHER),
                label=name_of(peer),
                markersize=4,
            )
            lows, highs = ([each[place] for each in found.values()] for place in (1, 2))
            axis.fill_between(list(found), lows, highs, color=COLOURS.get(peer, OTHER), alpha=0.2, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(SWEEP, [f"{each:,}" for each in SWEEP])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(_short))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("streams at the same time")
        axis.set_title(f"{title}\n({better})", fontsize=9.5)
        axis.grid(color="#dddddd")
        _plain(axis)
    picture.axes[0].legend(frameon=False, fontsize=9)
    _label(picture, "20 items a stream, over the number of streams at the same time", result)
    return picture


def _plain(axis: Any) -> None:
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9, length=0)


def _short(value: float, _: int) -> str:
    """Return a label of an axis: 2M, 50k, 0.5."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _label(picture: Figure, title: str, result: dict[str, Any]) -> None:
    picture.get_layout_engine().set(w_pad=0.12)
    quick = "QUICK RUN, NOT A MEASUREMENT. " if result["method"]["quick"] else ""
    picture.suptitle(f"{quick}{title}", fontsize=12, fontweight="bold")
    machine, rounds = result["machine"], result["method"]["rounds"]
    picture.supxlabel(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['python']}; medians of {rounds} interleaved rounds, "
        f"lowest to highest; {result['started'][:10]}",
        fontsize=8,
        color="#666666",
    )


def draw(path: Path) -> list[Path]:
    """Draw all pictures of a result file and return their paths: `latest-calls.png`, `latest-calls.svg`, …"""
    import matplotlib as mpl

    result = read_result(path)
    pictures = {chart.name: draw_bars(result, chart) for chart in CHARTS} | {"sweep": draw_sweep(result)}
    written = []
    # No date and no random identifiers: the same figures give the same file.
    with mpl.rc_context({"svg.hashsalt": "trd", "svg.fonttype": "none"}):
        for name, picture in pictures.items():
            if picture is None:
                continue
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                target = path.with_name(f"{path.stem}-{name}.{kind}")
                picture.savefig(target, dpi=110, facecolor="white", metadata=metadata)
                written.append(target)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description="Pictures of result files.")
    parser.add_argument("files", nargs="*", type=Path, help="result files (latest.json and peers.json)")
    for path in parser.parse_args().files or [each for each in FILES if each.exists()]:
        for target in draw(path):
            print(target)


if __name__ == "__main__":
    main()

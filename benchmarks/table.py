"""The table of a result file: `python -m benchmarks.table [--json PATH] [--write]`.

It prints Markdown; `--write` puts the table between the markers in docs/benchmarks.md, and six of its rows between
those in README.md. Figures are medians over the rounds. A ratio is the median of the rounds' ratios, so it may differ
from the quotient of the two medians next to it. The lowest and the highest ratio of the rounds follow in brackets.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rounds import RESULTS, TCP, Spread, read_result

LATEST = RESULTS / "latest.json"
README = RESULTS.parents[1] / "README.md"
PAGE = RESULTS.parents[1] / "docs" / "benchmarks.md"
MARKED = re.compile(r"(<!-- figures -->\n).*?(<!-- /figures -->)", re.DOTALL)


@dataclass(frozen=True)
class Target:
    """A bound for `ours / against`, or for our figure itself if `against` is empty: at most, or at least, `bound`."""

    bound: float
    against: str = ""
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{sign} {self.bound:.3g} × {self.against}" if self.against else f"{sign} {self.bound:,.4g}"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    text: str
    workload: str
    figure: str
    target: Target | None = None


ROWS = (
    Row("1 call at a time: p50, µs", "alone", "p50_us", Target(1 / 2, "grpc.aio")),
    Row("64 concurrent calls: calls/s", "concurrent", "per_s", Target(8, "grpc.aio", at_least=True)),
    Row("64 concurrent calls: CPU µs a call", "concurrent", "cpu_us", Target(2.5, "yardstick")),
    Row("16 × 500 items: items/s", "streams", "per_s", Target(20, "grpc.aio", at_least=True)),
    Row("16 × 500 items: CPU µs an item", "streams", "cpu_us", Target(2, "yardstick")),
    Row("256 paced streams: p99 lateness, ms", "paced", "p99_ms"),
    Row("256 paced streams: CPU µs an item", "paced", "cpu_us", Target(1 / 3, "grpc.aio")),
    Row("16 MiB array echoed: GB/s", "array", "gb_per_s", Target(6, "grpc.aio", at_least=True)),
    Row("idle streams, 10,000 on one connection: worker, bytes each", "idle", "worker_bytes", Target(4096)),
    Row("idle streams, 10,000 on one connection: client, bytes each", "idle", "client_bytes", Target(4096)),
    Row("cancellation, three hops: p50, ms", "cancel", "p50_ms"),
    Row("cancellation, three hops: p99, ms", "cancel", "p99_ms", Target(10)),
    Row("hello world, both processes' start to first reply, s", "hello", "both_s", Target(0.5)),
    Row("hello world, client's start to first reply, s", "hello", "client_s"),
    Row("import triton_distributed.runtime, ms", "import", "import_ms", Target(120)),
)
FAMILIES = ("ours", "yardstick", "grpc.aio")
SHORT = (
    Row("one call at a time: median, µs", "alone", "p50_us"),
    Row("64 calls at a time: calls/s", "concurrent", "per_s"),
    Row("16 streams of 500 items: items/s", "streams", "per_s"),
    Row("16 MiB array there and back: GB/s", "array", "gb_per_s"),
    Row("cancellation through three workers: median, ms", "cancel", "p50_ms"),
    Row("from the start of two processes to the first reply, s", "hello", "both_s"),
)
"""The rows of README.md."""
HEAD = ("work", *FAMILIES, "ours ÷ yardstick", "ours ÷ grpc.aio", "target", "")


def _number(found: Spread | float | None) -> str:
    if found is None:
        return "–"
    value = found[0] if isinstance(found, list) else found
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if abs(value) >= 10 else 2}f}"


def _ratio(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    middle, low, high = map(_number, spread)
    return middle if low == high else f"{middle} ({low}–{high})"


def _mark(target: Target, value: Spread | None) -> str:
    if value is None:
        return ""
    if not target.met(value[0]):
        return "**short**"
    return "met" if all(map(target.met, value)) else "met, not in every round"


def _lines(result: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    for suffix in ("", TCP):
        for row in ROWS:
            values = [_figure(result, row, family + suffix) for family in FAMILIES]
            if all(value is None for value in values):
                continue
            against = {other: _over(result, row, other, suffix) for other in FAMILIES[1:]}
            target, mark = "", ""
            if row.target is not None and not suffix:
                target = str(row.target)
                mark = _mark(row.target, against[row.target.against] if row.target.against else values[0])
            text = row.text + (", over TCP" if suffix else "")
            yield (text, *map(_number, values), *map(_ratio, against.values()), target, mark)


def _figure(result: dict[str, Any], row: Row, peer: str) -> Spread | None:
    found: Spread | None = result["figures"].get(row.workload, {}).get(peer, {}).get(row.figure)
    return found


def _over(result: dict[str, Any], row: Row, other: str, suffix: str = "") -> Spread | None:
    name = f"{FAMILIES[0]}{suffix} ÷ {other}{suffix}"
    found: Spread | None = result["ratios"].get(row.workload, {}).get(name, {}).get(row.figure)
    return found


def _table_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(lines: list[tuple[str, ...]], words: tuple[int, ...]) -> list[str]:
    """The lines of a Markdown table; the columns `words` are left-aligned, the others right-aligned."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [_table_line(map(str.ljust, line, widths)) for line in lines]
    rule = ("-" if column in words else "-:" for column in range(len(lines[0])))
    text.insert(1, _table_line(end.rjust(width, "-") for end, width in zip(rule, widths, strict=True)))
    return text


def render_short(result: dict[str, Any]) -> str:
    """Return six rows as Markdown: our figure, that of grpc.aio, and the ratio."""
    lines: list[tuple[str, ...]] = [("work", "this runtime", "grpc.aio", "ratio")]
    for row in SHORT:
        ours, theirs = (_figure(result, row, family) for family in ("ours", "grpc.aio"))
        lines.append((row.text, _number(ours), _number(theirs), _ratio(_over(result, row, "grpc.aio"))))
    return "\n".join(_table(lines, words=(0,))) + "\n"


def render(result: dict[str, Any]) -> str:
    """Return the table as Markdown, with the machine and the key words of the method below it."""
    text = _table([HEAD, *_lines(result)], words=(0, len(HEAD) - 2, len(HEAD) - 1))
    machine = result["machine"]
    told = {"pgo": "--enable-optimizations", "lto": "--with-lto"}
    build = ", ".join(f"{'with' if machine['python_build'][key] else 'without'} {told[key]}" for key in told)
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    if result["method"]["quick"]:
        text += ["", "A quick run with small sizes: it says that everything works, not how fast it is."]
    text += [
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, "
        f"{machine['python']} (configured {build}), {packages}. "
        f"Interleaved rounds: {result['method']['rounds']}, medians of them; Unix sockets unless TCP is named. "
        "`make bench` repeats them, benchmarks/README.md says how.",
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description="The table of a result file.")
    parser.add_argument("--json", type=Path, default=LATEST, help="the result file")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md and README.md")
    arguments = parser.parse_args()
    result = read_result(arguments.json)
    if not arguments.write:
        print(render(result), end="")
        return
    for path, table in ((PAGE, render(result)), (README, render_short(result))):
        text = path.read_text(encoding="utf-8")
        places = list(MARKED.finditer(text))
        if len(places) != 1:
            raise SystemExit(f"{path.name} needs one <!-- figures --> … <!-- /figures -->, it has {len(places)}")
        path.write_text(text[: places[0].end(1)] + table + text[places[0].start(2) :], encoding="utf-8")


if __name__ == "__main__":
    main()

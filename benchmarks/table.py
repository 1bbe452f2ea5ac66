"""The tables of the result files: `python -m benchmarks.table [--json PATH] [--write]`.

It prints Markdown; `--write` puts the targets and the tables of results/latest.json and results/peers.json between the
markers in docs/benchmarks.md, and six rows between those in README.md. Figures are medians over the rounds. A ratio is
the median of the rounds' ratios, so it may differ from the quotient of the two medians next to it. The lowest and the
highest ratio of the rounds follow in brackets.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import CORE
from benchmarks.peers import PEERS as KINDS
from benchmarks.rounds import OURS, RESULTS, TCP, Spread, read_result
from benchmarks.targets import COMMANDS, DYNAMO, Outcome, outcomes

LATEST = RESULTS / "latest.json"
FOREIGN = RESULTS / "peers.json"
README = RESULTS.parents[1] / "README.md"
PAGE = RESULTS.parents[1] / "docs" / "benchmarks.md"
MARKED = re.compile(r"(<!-- figures -->\n).*?(<!-- /figures -->)", re.DOTALL)
PURE, COMPILED = OURS
SOCKET = "ours-socket"
OTHERS = ("yardstick", "grpc.aio", "bare")


@dataclass(frozen=True)
class Row:
    """One line of a table.

    With `shares`, the figure says how a measurement went: there is no ratio.
    """

    text: str
    workload: str
    figure: str
    shares: bool = False


def rows(workload: str, text: str, figures: dict[str, str], unit: str) -> list[Row]:
    """Return the rows of a workload: its figures, then CPU and peak memory of all processes of the measurement."""
    costs = {"cpu_us": f"CPU µs {unit}", "peak_mib": "peak memory, MiB"}
    return [Row(f"{text}: {words}", workload, figure) for figure, words in (figures | costs).items()]


SWEEP = (1, 8, 64, 512, 2048, 8192)
TABLES: dict[str, list[Row]] = {
    "Calls": [
        *rows("alone", "1 call at a time", {"p50_us": "p50, µs", "p99_us": "p99, µs"}, "a call"),
        *rows("concurrent", "64 concurrent calls", {"per_s": "calls/s"}, "a call"),
        *rows("unary", "1 MB there and back, 1 call at a time", {"p50_us": "p50, µs"}, "a call"),
    ],
    "Streams": [
        *rows("streams", "16 × 500 items", {"per_s": "items/s"}, "an item"),
        *rows("chunks", "16 × 10 KB back in 50 parts", {"per_s": "items/s", "p50_us": "p50 of a call, µs"}, "an item"),
        *rows("lists", "16 × 100 lists of 512 tokens", {"per_s": "items/s"}, "an item"),
        *rows("paced", "256 paced streams", {"p50_ms": "p50 lateness, ms", "p99_ms": "p99 lateness, ms"}, "an item"),
        *rows(
            "pipeline",
            "pipeline of three workers, 16 × 500 items",
            {"per_s": "items/s", "over_one_stage": "CPU an item ÷ that of one stage"},
            "an item",
        ),
        *rows("cancel", "cancellation, three hops", {"p50_ms": "p50, ms", "p99_ms": "p99, ms"}, "a call"),
    ],
    "1 to 8,192 callers, 20 items a call": [
        *(Row(f"{number:,}: items/s", f"sweep {number}", "per_s") for number in SWEEP),
        *(Row(f"{number:,}: CPU µs an item", f"sweep {number}", "cpu_us") for number in SWEEP),
        *(Row(f"{number:,}: peak memory, MiB", f"sweep {number}", "peak_mib") for number in SWEEP),
    ],
    "Arrays": [
        *rows("array", "16 MiB array echoed", {"gb_per_s": "GB/s"}, "a round trip"),
        *rows("gigabyte", "1 GiB array echoed", {"gb_per_s": "GB/s"}, "a round trip"),
    ],
    "Idle streams, 10,000 on one connection": [
        Row("worker: bytes a stream", "idle", "worker_bytes"),
        Row("client: bytes a stream", "idle", "client_bytes"),
        Row("descriptors that all of them add", "idle", "descriptors"),
        Row("CPU µs to open a stream", "idle", "cpu_us"),
        Row("peak memory, MiB", "idle", "peak_mib"),
    ],
    "Start": [
        Row("hello world: both processes' start to first reply, s", "hello", "both_s"),
        Row("hello world: client's start to first reply, s", "hello", "client_s"),
        Row("hello world: CPU, ms", "hello", "cpu_ms"),
        Row("hello world: peak memory, MiB", "hello", "peak_mib"),
        Row("import, ms", "import", "import_ms"),
        Row("import: CPU, ms", "import", "cpu_ms"),
        Row("import: peak memory, MiB", "import", "peak_mib"),
    ],
}
"""The tables of docs/benchmarks.md, with the workloads of each."""

COST = {"front_us": "CPU µs {each}, the server of HTTP alone", "cpu_us": "CPU µs {each}, all servers"}
BUSY = {"front_cores": "cores that the server of HTTP keeps busy", "client_cores": "cores of the client"}
MODELS = {
    "llm-overhead.json": [
        Row(f"{text}: {words.format(each='a request')}", work, name, shares=name in BUSY)
        for work, text in (("whole", "whole answers"), ("single", "streams of one output"))
        for name, words in ({"per_s": "requests/s", "p50_ms": "p50, ms", "p99_ms": "p99, ms"} | COST | BUSY).items()
    ],
    "llm-chunks.json": [
        Row(f"{text}: {words.format(each='an event')}", work, name, shares=name in BUSY)
        for work, text in (("chunks", "16 streams at full speed"), ("paced", "128 streams, a token every 10 ms"))
        for name, words in ({"per_s": "events/s"} | COST | BUSY).items()
    ],
    "llm-gaps.json": [
        Row("p99 gap between tokens, ms", "steps", "p99_ms"),
        Row("p99 gap between the engine's steps, ms", "steps", "engine_p99_ms", shares=True),
        Row("p99 gap ÷ that of the steps", "steps", "p99_over_engine", shares=True),
        Row("longest gap, ms", "steps", "max_ms"),
        Row("longest gap between the steps, ms", "steps", "engine_max_ms", shares=True),
        Row("events/s", "steps", "per_s"),
        Row("events/s ÷ those that are due", "steps", "of_due", shares=True),
        Row("events that come together", "steps", "events_each", shares=True),
        Row("CPU µs an event, the server of HTTP alone", "steps", "front_us"),
        Row("cores that the server of HTTP keeps busy", "steps", "front_cores", shares=True),
        Row("cores of the worker", "steps", "worker_cores", shares=True),
        Row("cores of the client", "steps", "client_cores", shares=True),
    ],
}
"""The rows of the results of `python -m benchmarks.llm`."""
INDEX = [
    *(
        Row(f"{text}: {words}", work, name)
        for work, text in {
            "hot": "256 blocks, always the same, held in 3 depths",
            "steps": "256 blocks, always the same, held in 8 depths",
            "cold": "256 blocks, each prompt once",
        }.items()
        for name, words in {"p50_us": "p50, µs", "cpu_us": "CPU µs"}.items()
    ),
    Row("prompts of 256 blocks are stored: blocks/s a core", "store", "per_s"),
    Row("their blocks are removed, 256 in an event: blocks/s a core", "remove", "per_s"),
    Row("their blocks are removed, 25 in an event: blocks/s a core", "remove parts", "per_s"),
    Row("their blocks are removed, one in an event: blocks/s a core", "remove each", "per_s"),
    Row("a worker's 125,000 blocks are forgotten: CPU ms", "clear", "cpu_ms"),
    Row("the longest part of that, CPU ms", "clear", "longest_ms"),
    Row("memory, bytes a block", "memory", "entry_bytes"),
]
"""The rows of the result of `python -m benchmarks.llm.index`."""
WORKER = [
    Row(f"{text}: {words}", f"{kind}: {work}", name)
    for kind, text in (("worker", "blocks of 64 tokens"), ("worker, small", "of 16 tokens"))
    for work, name, words in (
        ("store", "per_s", "stored, 125 in an event, blocks/s a core"),
        ("store each", "per_s", "stored, one in an event, blocks/s a core"),
        ("remove", "per_s", "removed, 125 in an event, blocks/s a core"),
        ("remove each", "per_s", "removed, one in an event, blocks/s a core"),
        ("memory", "entry_bytes", "memory, bytes a block"),
    )
]
"""Those of what a worker does with the events of its engine."""
PICTURES = {
    "Calls": ("calls",),
    "Streams": ("streams", "payloads"),
    "1 to 8,192 callers, 20 items a call": ("sweep",),
    "Arrays": ("arrays",),
    "Idle streams, 10,000 on one connection": ("idle",),
    "Start": ("start",),
}
"""The pictures of benchmarks/plots.py below each table."""
SHORT = (
    Row("one call at a time: median, µs", "alone", "p50_us"),
    Row("64 calls at a time: calls/s", "concurrent", "per_s"),
    Row("16 streams of 500 items: items/s", "streams", "per_s"),
    Row("16 MiB array there and back: GB/s", "array", "gb_per_s"),
    Row("cancellation through three workers: median, ms", "cancel", "p50_ms"),
    Row("from the start of two processes to the first reply, s", "hello", "both_s"),
)
"""The rows of README.md."""
SHORT_COLUMNS = {
    "grpc.aio": ("grpc.aio",),
    "Dynamo": DYNAMO,
    "Ray Serve": ("Ray Serve",),
    "nats-py": ("nats-py",),
    "HTTP, SSE": ("SSE",),
}
"""The other systems in README.md; of several paths of one system, the better one."""
ALL = [row for shown in TABLES.values() for row in shown]
CORE_ROWS = [row for row in ALL if row.workload in CORE and row.figure != "peak_mib"]


def name_of(peer: str) -> str:
    """Return a peer's name for readers."""
    return peer.replace("-", ", ").replace(TCP, ", TCP") if peer.startswith(PURE) else peer.replace(TCP, ", TCP")


def number(found: Spread | float | None) -> str:
    """Return a figure, or the median of a spread, with two digits or more; a dash if there is none."""
    if found is None:
        return "–"
    value = found[0] if isinstance(found, list) else found
    if abs(value) >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3}f}"


def with_range(found: Spread | None) -> str:
    """Return the median, with the lowest and the highest in brackets."""
    if found is None:
        return "–"
    middle, low, high = map(number, found)
    return middle if low == high else f"{middle} ({low}–{high})"


def best_of_ours(result: dict[str, Any]) -> str:
    """Return the build whose ratios a table shows: the compiled one, if the file has it."""
    return COMPILED if any(COMPILED in peers for peers in result["figures"].values()) else PURE


VARIANTS = {
    "native": "The native API (`trd.connect`) next to the original's",
    "traced": "With spans of OpenTelemetry, next to none",
}
"""The table of each peer that differs from ours only in how it is used."""


def figure(result: dict[str, Any], row: Row, peer: str) -> Spread | None:
    """Return a peer's figure of a row."""
    found: Spread | None = result["figures"].get(row.workload, {}).get(peer, {}).get(row.figure)
    return found


def over(result: dict[str, Any], row: Row, peer: str, other: str) -> Spread | None:
    """Return the ratio of two peers' figures of a row."""
    found: Spread | None = result["ratios"].get(row.workload, {}).get(f"{peer} ÷ {other}", {}).get(row.figure)
    return found


def markdown(lines: list[tuple[str, ...]], words: Iterable[int] = (0,)) -> str:
    """Return a Markdown table; the columns `words` are left-aligned, the others right-aligned."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [_line(map(str.ljust, line, widths)) for line in lines]
    rule = ("-" if column in set(words) else "-:" for column in range(len(lines[0])))
    text.insert(1, _line(end.rjust(width, "-") for end, width in zip(rule, widths, strict=True)))
    return "\n".join(text) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _compared(result: dict[str, Any], shown: list[Row], peers: list[str], others: list[str]) -> str | None:
    """Return a table of the peers' figures, with our ratios to `others`; None if no peer has any of them."""
    taken = {peer for row in shown for peer in (*peers, *others) if figure(result, row, peer) is not None}
    peers, others = ([each for each in names if each in taken] for names in (peers, others))
    if not peers:
        return None
    ours = COMPILED if COMPILED in peers else peers[0]
    lines = []
    for row in shown:
        values = [figure(result, row, peer) for peer in (*peers, *others)]
        if any(value is not None for value in values):
            lines.append((row.text, *map(number, values), *(with_range(over(result, row, ours, o)) for o in others)))
    ratios = (f"{name_of(ours)} ÷ {name_of(other)}" for other in others)
    return markdown([("work", *map(name_of, (*peers, *others)), *ratios), *lines])


def tables(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Give each table's title and Markdown."""
    for title, shown in TABLES.items():
        if text := _compared(result, shown, [*OURS, SOCKET], list(OTHERS)):
            yield title, text
    if text := _compared(result, CORE_ROWS, [PURE + TCP], [other + TCP for other in OTHERS]):
        yield "Over TCP on the loopback", text
    for peer, title in VARIANTS.items():
        rows = [row for row in CORE_ROWS if KINDS[peer].runs(row.workload) and figure(result, row, peer) is not None]
        if rows and (text := _compared(result, rows, [PURE], [peer])):
            yield title, text


def conditions(result: dict[str, Any]) -> str:
    """Return a sentence with the machine, the versions, and how Python was built."""
    machine = result["machine"]
    told = {"pgo": "--enable-optimizations", "lto": "--with-lto"}
    build = ", ".join(f"{'with' if machine['python_build'][key] else 'without'} {told[key]}" for key in told)
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    load = " and ".join(f"{each:.1f}" for each in result["load_before_and_after"])
    return (
        f"{result['started'][:10]}: {machine['cpu']}, {machine['cores']} cores, {machine['system']}, "
        f"{machine['python']} (configured {build}), {packages}. Load average before and after: {load}. "
        f"Interleaved rounds: {result['method']['rounds']}."
    )


def pictures(stem: str, names: Iterable[str]) -> Iterator[str]:
    """Give the Markdown of the pictures of a result file that were drawn, for docs/benchmarks.md."""
    for name in names:
        path = RESULTS / f"{stem}-{name}.svg"
        if path.exists():
            yield f"![{name}](../{path.relative_to(PAGE.parents[1])})"


def render(result: dict[str, Any], *, with_pictures: bool = False) -> str:
    """Return all tables of a result as Markdown, with the conditions above them."""
    parts = [conditions(result)]
    if result["method"]["quick"]:
        parts.append("A quick run with small sizes: it says that everything works, not how fast it is.")
    for title, text in tables(result):
        parts.append(f"### {title}\n\n{text.rstrip()}")
        if with_pictures:
            parts += pictures(LATEST.stem, PICTURES.get(title, ()))
    return "\n\n".join(parts) + "\n"


def render_targets(found: Iterable[Outcome]) -> str:
    """Return the table of the targets."""
    lines: list[tuple[str, ...]] = [("work", "target", "measured", "", "command")]
    for each in found:
        measured = with_range(each.value)
        if each.value is not None and each.target.against:
            measured += f" × {each.peer}"
        lines.append((each.target.text, str(each.target), measured, each.mark, f"`{COMMANDS[each.target.file]}`"))
    return markdown(lines, words=(0, 1, 3, 4))


def render_foreign(result: dict[str, Any], shown: Iterable[Row] = ALL) -> str:
    """Return a table of results/peers.json or llm-*.json: each figure of another system with our ratio to it."""
    ours = best_of_ours(result)
    present = dict.fromkeys(peer for peers in result["figures"].values() for peer in peers)
    peers = [*(peer for peer in OURS if peer in present), *(peer for peer in present if peer not in OURS)]
    lines = []
    for row in shown:
        values = {peer: figure(result, row, peer) for peer in peers}
        if all(values[peer] is None for peer in peers if peer not in OURS):
            continue
        cells = []
        for peer, value in values.items():
            ratio = over(result, row, ours, peer) if peer not in OURS and not row.shares else None
            cells.append(number(value) + (f" ({number(ratio)} ×)" if ratio else ""))
        lines.append((row.text, *cells))
    left_out = "".join(f"\n\n{peer} was left out: {why}" for peer, why in result["method"].get("left_out", {}).items())
    versions = [each for known in result["method"].get("versions", {}).values() for each in known.items()]
    others = ", ".join(f"{name} {version}" for name, version in dict(versions).items())
    measured = f" Measured: {others}." if others else ""
    return f"{conditions(result)}{measured}{left_out}\n\n{markdown([('work', *map(name_of, peers)), *lines])}"


def render_page(folder: Path = RESULTS) -> str:
    """Return what docs/benchmarks.md has between its markers."""
    parts = [f"## Targets\n\n{render_targets(outcomes(folder=folder))}"]
    foreign = folder / FOREIGN.name
    if foreign.exists():
        shown = "\n\n".join(pictures(FOREIGN.stem, [name for names in PICTURES.values() for name in names]))
        parts.append(f"## Other systems\n\n{render_foreign(read_result(foreign))}" + (f"\n{shown}\n" if shown else ""))
    models = {path: shown for name, shown in MODELS.items() if (path := folder / name).exists()}
    if models:
        tables_ = "\n".join(render_foreign(read_result(path), shown) for path, shown in models.items())
        parts.append(f"## A model over HTTP\n\n{tables_}")
    if (index := folder / "index.json").exists():
        result = read_result(index)
        at_workers = _compared(result, WORKER, list(OURS), []) or ""
        parts.append(
            f"## The index of routing by cache\n\n{render_foreign(result, INDEX)}\nAt a worker:\n\n{at_workers}"
        )
    parts.append(f"## All workloads\n\n{render(read_result(folder / LATEST.name), with_pictures=True)}")
    return "\n".join(parts)


def short_file() -> Path:
    """Return the result file of README's rows: that with the other systems, where it exists."""
    return FOREIGN if FOREIGN.exists() else LATEST


def _better(found: dict[str, Spread], row: Row) -> str:
    """Return the peer with the better figure: the larger rate, or else the smaller one."""
    return (max if row.figure.endswith("per_s") else min)(found, key=lambda peer: found[peer][0])


def render_short(result: dict[str, Any]) -> str:
    """Return six rows as Markdown: our figure, and those of other systems with our ratio to each in brackets."""
    ours = best_of_ours(result)
    columns = {
        name: peers
        for name, peers in SHORT_COLUMNS.items()
        if any(figure(result, row, peer) for row in SHORT for peer in peers)
    }
    lines: list[tuple[str, ...]] = [("work", "this runtime", *columns)]
    for row in SHORT:
        cells = []
        for peers in columns.values():
            found = {peer: each for peer in peers if (each := figure(result, row, peer))}
            peer = _better(found, row) if found else ""
            cells.append(f"{number(found[peer])} ({number(over(result, row, ours, peer))})" if found else "–")
        lines.append((row.text, number(figure(result, row, ours)), *cells))
    machine, build = result["machine"], "compiled build" if ours == COMPILED else "pure Python"
    command = COMMANDS[FOREIGN.name if len(columns) > 1 else LATEST.name]
    told = f"{build}, {machine['python']}, {machine['cores']} cores, {machine['cpu']}"
    return f"{markdown(lines)}\n`{command}`, {result['started'][:10]}: {told}.\n"


def written(page: str, content: str) -> str:
    """Return the text of a page with new content between its markers.

    Raises:
        SystemExit: the page does not have one pair of markers.
    """
    places = list(MARKED.finditer(page))
    if len(places) != 1:
        raise SystemExit(f"a page needs one <!-- figures --> … <!-- /figures -->, it has {len(places)}")
    return page[: places[0].end(1)] + content + page[places[0].start(2) :]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description="The tables of a result file.")
    parser.add_argument("--json", type=Path, default=LATEST, help="the result file")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md and README.md")
    arguments = parser.parse_args()
    result = read_result(arguments.json)
    if not arguments.write:
        print(render(result), end="")
        return
    for path, content in ((PAGE, render_page()), (README, render_short(read_result(short_file())))):
        path.write_text(written(path.read_text(encoding="utf-8"), content), encoding="utf-8")


if __name__ == "__main__":
    main()

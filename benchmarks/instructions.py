"""The regression guard: the instructions of a call, an item and the import, `python -m benchmarks.instructions`.

Status 1: something takes over 5 % more than before. Status 3: nothing could be compared, since valgrind or a record is
missing.

`records` in `results/instructions.json` has one for each interpreter: its build, the processor's kind, and the two
packages that do most of the work besides it. The same interpreter has the same counts within 1 %, so there the count
itself is compared. On another build of the same Python version, the ratio to the yardstick of the same run is compared.
The ratio depends on how Python was built (Debian's 3.11 has a ratio up to 10 % larger than pyenv's), so its limit is
20 %. `--against HEAD^` counts that commit too, and compares within 5 % on any machine. With `--peer`, on an interpreter
that has a record, the yardstick is not counted.

Timers of the runtime take some 0.3 million instructions a second, so a busy machine adds to a count but never takes
from it. What has failed is counted again, and its lowest count is compared.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.callgrind import IMPORT, CountFailed, by_function, instructions, missing
from benchmarks.counted import WORKS
from benchmarks.rounds import RESULTS, Rounds, read_result, summarise, write_result
from harness.processes import ROOT

RECORDS = RESULTS / "instructions.json"
EVERY_WORK = (*WORKS, IMPORT)
LIMIT, OTHER_LIMIT = 0.05, 0.20
SHOWN = 20  # Functions of `--where`.
NOT_COMPARED = 3
TRIES = 3  # The most times that one work is counted.
COMPILED = "ours-compiled"
Counts = dict[str, dict[str, float]]
"""Instructions by peer and work."""


@dataclass(frozen=True)
class Growth:
    """How much more one work of one peer takes than before; 0.05 is 5 %."""

    peer: str
    work: str
    share: float
    limit: float
    text: str

    def failed(self) -> bool:
        return self.share > self.limit

    def __str__(self) -> str:
        mark = "FAILED: " if self.failed() else ""
        return f"{mark}{self.peer}, {self.work}: {self.text}: {self.share:+.1%} (limit {self.limit:.0%})"


def this_interpreter() -> dict[str, str]:
    """Return what the counts depend on besides our code."""
    packages = {each: metadata.version(each) for each in ("msgspec", "uvloop")}
    return {"python": sys.version, "processor": platform.machine(), **packages}


def version_of(interpreter: Mapping[str, str]) -> str:
    """Return the version of Python without its last part: `3.11`."""
    return ".".join(interpreter["python"].split()[0].split(".")[:2])


def compare(counts: Counts, interpreter: Mapping[str, str], records: list[dict[str, Any]]) -> list[Growth]:
    """Compare with the record of this interpreter, or with those of other interpreters of the same version.

    Of several other ones, the one that is nearest to this interpreter counts: that with the smallest growth. Without a
    record of this interpreter, `counts` must have the yardstick.
    """
    same = [each for each in records if each["interpreter"] == interpreter]
    others = [each for each in records if version_of(each["interpreter"]) == version_of(interpreter)]
    yardstick = counts.get("yardstick")
    found = []
    for peer, works in counts.items():
        for work, count in works.items():
            if peer == "yardstick":
                continue
            growths = []
            for record in same or others:
                before = record["instructions"].get(peer, {}).get(work)
                if before is None:
                    continue
                ratio, before_ratio, ratios = 0.0, before / record["instructions"]["yardstick"][work], ""
                if yardstick:
                    ratio = count / yardstick[work]
                    ratios = f"{ratio:.2f} × the yardstick, {before_ratio:.2f} × recorded"
                if same:
                    text = f"{count:,.0f} instructions, {before:,.0f} recorded{ratios and f' ({ratios})'}"
                    growths.append(Growth(peer, work, count / before - 1, LIMIT, text))
                else:
                    text = f"{ratios} on another build of Python {version_of(interpreter)}"
                    growths.append(Growth(peer, work, ratio / before_ratio - 1, OTHER_LIMIT, text))
            found += sorted(growths, key=lambda each: each.share)[:1]
    return found


def compiled_sources(tree: Path, *, build: bool = False) -> Path | None:
    """Return the folder of a tree's compiled build; None if it has none that is made from its very sources."""
    tool = tree / "tools" / "compiled.py"
    if not tool.exists():
        return None
    command = [sys.executable, str(tool), *(["build"] if build else [])]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return Path(found) if found else None


@contextmanager
def sources_at(commit: str, peer: str) -> Iterator[Path]:
    """Give the package as it was at a commit; for the compiled peer it is compiled, which takes a minute."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        raise SystemExit(f"error: git archive {commit}: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory(prefix="trd-before-") as folder:
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        compiled = compiled_sources(Path(folder), build=True) if peer == COMPILED else Path(folder) / "src"
        if compiled is None:
            raise SystemExit(f"error: {commit} has no compiled build")
        yield compiled


def count_all(peers: Mapping[str, Path], works: list[str]) -> Counts:
    """Count each peer with each work, as many at once as there are cores.

    Args:
        peers: the folder with the package for each peer.
    """
    pairs = [(peer, work) for peer in peers for work in works]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        taken = pool.map(lambda pair: instructions(module_of(pair[0]), pair[1], peers[pair[0]]), pairs)
        counts: Counts = {}
        for (peer, work), count in zip(pairs, taken, strict=True):
            counts.setdefault(peer, {})[work] = round(count)
    return counts


def module_of(peer: str) -> str:
    """Return the name in PEERS: a compiled build has the API of ours."""
    return "ours" if peer == COMPILED else peer


def show(counts: Counts) -> None:
    """Print a table."""
    works = list(next(iter(counts.values())))
    print(f"instructions {''.join(f'{work:>14}' for work in works)}")
    for peer, each in counts.items():
        print(f"{peer:13}{''.join(f'{each[work]:>14,.0f}' for work in works)}")


def where(peer: str, works: list[str], sources: Path, commit: str) -> None:
    """Print the functions that grew most since a commit, with the C functions that each calls."""
    with sources_at(commit, peer) as before:
        for work in works:
            then, now = (by_function(module_of(peer), work, each) for each in (before, sources))
            print(f"{peer}, {work}: {sum(then.values()):,} instructions at {commit[:12]}, {sum(now.values()):,} now")
            grown = sorted(then.keys() | now.keys(), key=lambda name: then[name] - now[name])
            for name in grown[:SHOWN]:
                if now[name] > then[name]:
                    print(f"  {now[name] - then[name]:+8,}  {then[name]:8,} → {now[name]:8,}  {name}")


def last_record() -> str:
    """Return the commit that changed the records last."""
    command = ["git", "log", "-1", "--format=%H", "--", str(RECORDS)]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    if not commit:
        raise SystemExit("error: git does not know which commit made the records; name a commit: --where COMMIT")
    return commit


def read_records() -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = read_result(RECORDS)["records"] if RECORDS.exists() else []
    return records


def record(counts: Counts) -> None:
    """Write the counts as the record of this interpreter, in place of its last one.

    `rounds`, `figures` and `ratios` (see benchmarks.rounds) have those of the last record of the oldest Python.
    """
    interpreter = this_interpreter()
    kept = [each for each in read_records() if each["interpreter"] != interpreter]
    kept.insert(0, {"interpreter": interpreter, "instructions": counts})
    kept.sort(key=lambda each: version_of(each["interpreter"]))
    rounds: Rounds = {work: {} for work in EVERY_WORK}
    for peer, works in kept[0]["instructions"].items():
        for work, count in works.items():
            rounds[work][peer] = [{"instructions": count}]
    result = {"method": {"rounds": 1, "quick": False}, "rounds": rounds, **summarise(rounds), "failures": []}
    write_result(RECORDS, {**result, "records": kept})
    print(f"recorded in {RECORDS.relative_to(ROOT)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instructions", description="Guard against slow changes."
    )
    parser.add_argument("--only", nargs="+", choices=EVERY_WORK, default=list(EVERY_WORK), help="these works (all)")
    parser.add_argument("--peer", choices=("ours", "native", COMPILED), help="this peer (all that are there)")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--record", action="store_true", help="write the counts as the record of this interpreter")
    choice.add_argument(
        "--against", metavar="COMMIT", help="count the sources of that commit too, and compare with them"
    )
    choice.add_argument(
        "--where",
        metavar="COMMIT",
        nargs="?",
        const="",
        help="the functions that grew most since then (the last record)",
    )
    arguments = parser.parse_args()
    if arguments.record and (arguments.peer or len(arguments.only) < len(EVERY_WORK)):
        parser.error("a record has all peers and works")
    return arguments


def main() -> int:
    arguments = parse()
    if programs := missing():
        print(f"{' and '.join(programs)} not found, so nothing is counted: install valgrind (apt-get install valgrind)")
        return NOT_COMPARED
    sources = {"ours": ROOT / "src", "native": ROOT / "src"}
    if compiled := compiled_sources(ROOT):
        sources[COMPILED] = compiled
    if arguments.peer:
        if arguments.peer not in sources:
            raise SystemExit("error: there is no compiled build of these sources: make compiled")
        sources = {arguments.peer: sources[arguments.peer]}
    if arguments.where is not None:
        peer = arguments.peer or "ours"
        if peer != COMPILED and sys.version_info < (3, 12):
            raise SystemExit(
                f"error: functions have no names before Python 3.12; {command_for(peer, arguments.only[0])}"
            )
        where(peer, arguments.only, sources[peer], arguments.where or last_record())
        return 0

    records = read_records()
    interpreter = this_interpreter()
    recorded = any(each["interpreter"] == interpreter for each in records)
    if not arguments.peer or arguments.against or not recorded:
        sources["yardstick"] = ROOT / "src"
    counts = count_all(sources, arguments.only)
    show(counts)
    if arguments.record:
        record(counts)
        return 0
    before: Counts = {}
    if arguments.against:
        before = counts_at(arguments.against, [each for each in sources if each != "yardstick"], arguments.only)
        records = [{"interpreter": interpreter, "instructions": {"yardstick": counts["yardstick"], **before}}]
    growths = compare(counts, interpreter, records)
    for _ in range(TRIES - 1):
        for each in filter(Growth.failed, growths):
            again = count_all({each.peer: sources[each.peer]}, [each.work])[each.peer][each.work]
            counts[each.peer][each.work] = min(counts[each.peer][each.work], again)
        growths = compare(counts, interpreter, records)
    print(*growths, sep="\n")
    if not growths:
        print(f"nothing to compare with: no record of this on Python {version_of(interpreter)}; --record makes one")
        return NOT_COMPARED
    failed = [each for each in growths if each.failed()]
    for each in failed:
        print(f"this shows where: {command_for(each.peer, each.work, arguments.against)}")
    return 1 if failed else 0


def counts_at(commit: str, peers: list[str], works: list[str]) -> Counts:
    """Count the peers at a commit, on this interpreter."""
    counts: Counts = {}
    for peer in peers:
        with sources_at(commit, peer) as sources:
            counts |= count_all({peer: sources}, works)
    return counts


def command_for(peer: str, work: str, commit: str | None = None) -> str:
    """Return the command that shows which functions grew."""
    options = " ".join(["--peer", peer, "--only", work, "--where", *([commit] if commit else [])])
    if peer == COMPILED or sys.version_info >= (3, 12):
        return f'make instructions INSTRUCTIONS_ARGS="{options}"'
    return f'TRD_PYTHON_VERSION=3.12 make instructions VENV=.venv-3.12 INSTRUCTIONS_ARGS="{options}"'


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except CountFailed as error:
        raise SystemExit(f"error: {error}") from None

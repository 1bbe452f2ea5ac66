"""Counts the instructions of one call or item with callgrind, a tool of valgrind: in all, or by function."""

from __future__ import annotations

import bisect
import os
import re
import shutil
import string
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.counted import counted
from benchmarks.counted_import import IMPORTS
from harness.processes import ROOT, environment_without_settings

TOOLS = ("valgrind", "callgrind_control")
IMPORT = "import"  # A work, besides those of benchmarks.counted.
TIMEOUT_S = 300.0  # A count takes some 4 s of CPU.
# Functions of C are left out by the first letter of their names, so callgrind adds their instructions to the caller.
# Python's functions, to which -X perf gives an address, have no name in the file. mypyc's begin with CPyDef_, CPyGen_.
# The dynamic linker stays: callgrind cannot leave out a function that nothing has called, such as its first step.
LEFT_OUT = [f"--fn-skip={letter}*" for letter in string.ascii_letters if letter != "C"]
LEFT_OUT += [f"--fn-skip=_{letter}*" for letter in string.ascii_letters + "_" if letter != "d"]
TRAMPOLINE_BYTES = 16  # The most that one function of -X perf takes.


class CountFailed(RuntimeError):
    """A count failed. The text has the output."""


def missing() -> list[str]:
    """Return the programs that a count needs and that are not on PATH."""
    return [each for each in TOOLS if shutil.which(each) is None]


def instructions(peer: str, work: str, sources: Path) -> float:
    """Return the instructions of one call or item of `work` (see WORKS), of both ends; or those of the `import`.

    Args:
        sources: the folder with the package `triton_distributed` to run.

    Raises:
        CountFailed: valgrind or the calls failed.
    """
    text, _ = _run(peer, work, sources, [], [])
    (total,) = re.findall(r"^totals: (\d+)", text, re.MULTILINE)
    return int(total) / _divisor(work)


def by_function(peer: str, work: str, sources: Path) -> Counter[str]:
    """Return the instructions of one call or item by function, with those of the C functions that each calls.

    Arguments and errors are those of `instructions`. Python's functions have names from CPython 3.12 on; before that,
    only the functions of a compiled build have them.
    """
    options = ["--compress-strings=no", "--compress-pos=no", *LEFT_OUT]
    named = ["-X", "perf"] if sys.version_info >= (3, 12) else []
    text, names = _run(peer, work, sources, options, named)
    found: Counter[str] = Counter()
    function, is_call = "", False
    for line in text.splitlines():
        if line.startswith("fn="):
            function = _name(line[3:], names)
        elif line.startswith("calls="):
            is_call = True  # The next line has the instructions of the called function.
        elif line[:1].isdigit():
            if not is_call:
                found[function] += int(line.split()[1])
            is_call = False
    for name in found:
        found[name] = round(found[name] / _divisor(work))
    return found


def _divisor(work: str) -> int:
    return 1 if work == IMPORT else counted(work)


def _name(function: str, names: dict[int, str]) -> str:
    function = function.partition("'")[0]  # callgrind marks recursion with ' and the level.
    if not function.startswith("0x"):
        return function
    address = int(function, 16)
    starts = list(names)
    place = bisect.bisect_right(starts, address) - 1
    if place < 0 or address - starts[place] >= TRAMPOLINE_BYTES:
        return "(C without names)"
    return names[starts[place]]


def _run(peer: str, work: str, sources: Path, options: list[str], python: list[str]) -> tuple[str, dict[int, str]]:
    """Return callgrind's file, and the names of Python's functions by address, in order."""
    with tempfile.TemporaryDirectory(prefix="trc", dir="/tmp" if os.path.isdir("/tmp") else None) as directory:
        file = Path(directory) / "counts"
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={file}", *options]
        module = "benchmarks.counted_import" if work == IMPORT else "benchmarks.counted"
        command += [sys.executable, *python, "-m", module, peer, work, directory]
        own = {"TRD_DIR": directory, "TRD_WATCHDOG_S": "0", "PYTHONHASHSEED": "0", "PYTHONPATH": f"{sources}:{ROOT}"}
        pipe = subprocess.PIPE
        environment = environment_without_settings() | own
        if work == IMPORT:  # With cached bytecode.
            environment.pop("PYTHONDONTWRITEBYTECODE", None)
            subprocess.run([sys.executable, "-c", IMPORTS[peer]], cwd=ROOT, env=environment, check=True)
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT) as process:
            map_file = Path(f"/tmp/perf-{process.pid}.map")  # CPython's choice.
            try:
                output, _ = process.communicate(timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise CountFailed(f"{peer}, {work}: no end after {TIMEOUT_S:g} s") from None
            finally:
                process.kill()
                names = _names(map_file) if python else {}
        if process.returncode or not file.exists():
            raise CountFailed(f"{peer}, {work}: status {process.returncode}\n{output.decode(errors='replace')}")
        return file.read_text(encoding="utf-8"), names


def _names(map_file: Path) -> dict[int, str]:
    """Read and remove the file of names that -X perf wrote: lines `START SIZE py::NAME:FILE`, START in hexadecimal."""
    if not map_file.exists():
        return {}
    lines = [line.split(" ", 2) for line in map_file.read_text(encoding="utf-8").splitlines()]
    map_file.unlink()
    found = {}
    for start, _, name in lines:
        function, _, path = name.removeprefix("py::").partition(":")
        found[int(start, 16)] = f"{function} ({path.rpartition('/triton_distributed/')[2]})"
    return dict(sorted(found.items()))

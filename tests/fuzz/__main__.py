"""`python -m tests.fuzz [--seconds N] [target …]`: fuzz the targets for N seconds in all.

With atheris (`make fuzz` installs it where it has a wheel) the search is guided by coverage; without, it is blind.
An input that breaks a target is written to `crash-TARGET-HASH`; give it to the target as a file to see it again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.mutation import mutations

try:
    import atheris
except ImportError:
    atheris = None

FOLDER = Path(__file__).parent
TARGETS = sorted(path.stem.removeprefix("fuzz_") for path in FOLDER.glob("fuzz_*.py"))
MAX_INPUT = 8192  # bytes; longer inputs find nothing that these do not, slower


def guided(name: str, seconds: float) -> None:
    """Fuzz with atheris. Does not return: libFuzzer ends the process with its own status."""
    with atheris.instrument_imports(include=["triton_distributed"]):
        target = importlib.import_module(f"tests.fuzz.fuzz_{name}")
    corpus = tempfile.mkdtemp(prefix=f"fuzz-{name}-")
    for number, seed in enumerate(target.SEEDS):
        Path(corpus, f"seed-{number}").write_bytes(seed)
    flags = [
        f"-max_total_time={seconds:g}",
        f"-max_len={MAX_INPUT}",
        f"-artifact_prefix=crash-{name}-",
        "-rss_limit_mb=2048",
    ]
    atheris.Setup([sys.argv[0], *flags, "-timeout=10", "-print_final_stats=1", corpus], target.one_input)
    atheris.Fuzz()


def blind(name: str, seconds: float) -> None:
    """Fuzz by mutating the seeds; the random seed is printed, so that a run can be repeated."""
    target = importlib.import_module(f"tests.fuzz.fuzz_{name}")
    seed = random.SystemRandom().getrandbits(32)
    print(f"{name}: atheris is not installed, mutating blindly (seed {seed})", flush=True)
    end = time.monotonic() + seconds
    runs = 0
    for data in mutations(target.SEEDS, random.Random(seed), MAX_INPUT):
        try:
            target.one_input(data)
        except BaseException:
            path = Path(f"crash-{name}-{hashlib.sha256(data).hexdigest()[:16]}")
            path.write_bytes(data)
            print(f"{name}: broken by {path} after {runs:,} runs", flush=True)
            raise
        runs += 1
        if runs % 64 == 0 and time.monotonic() > end:
            break
    print(f"{name}: {runs:,} runs, nothing found", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="in all, shared by the targets (default %(default)s)"
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "target", nargs="*", help=f"some of {', '.join(TARGETS)}, or one and a file that broke it; default: all"
    )
    chosen = parser.parse_args()
    files = [Path(each) for each in chosen.target if each not in TARGETS]
    targets = [each for each in chosen.target if each in TARGETS] or TARGETS
    if files:
        for path in files:
            importlib.import_module(f"tests.fuzz.fuzz_{targets[0]}").one_input(path.read_bytes())
        return 0
    if chosen.here:
        (guided if atheris else blind)(targets[0], chosen.seconds)
        return 0
    failed = []
    share = chosen.seconds / len(targets)
    for name in targets:  # each in its own process: libFuzzer ends the one that it runs in
        print(f"== {name}, {share:g} s", flush=True)
        if subprocess.run([sys.executable, "-m", "tests.fuzz", "--here", "--seconds", str(share), name]).returncode:
            failed.append(name)
    print(f"== {len(targets)} targets, broken: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

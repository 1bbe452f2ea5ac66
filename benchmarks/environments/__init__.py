"""The environments of the foreign peers, made from the pinned versions in this folder when they are needed."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

from harness.processes import ROOT

HERE = Path(__file__).resolve().parent
PLACE = ROOT / ".venv-peers"


class NotInstalled(RuntimeError):
    """An environment could not be made. The text ends with what the installer said."""


def pins(name: str) -> Path:
    """Return the file with the versions of an environment, and with the hashes of their files."""
    return HERE / f"{name}.txt"


def versions(name: str) -> dict[str, str]:
    """Return the packages that an environment is made for, with their versions."""
    text = (HERE / f"{name}.in").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==(\S+)", text, re.MULTILINE))


def python(name: str) -> str:
    """Return the Python of an environment."""
    return str(PLACE / name / "bin" / "python")


def make(name: str) -> None:
    """Make an environment if it is missing, or if its versions have changed.

    Raises:
        NotInstalled: pip cannot install one of the packages here.
    """
    place, wanted = PLACE / name, hashlib.sha256(pins(name).read_bytes() + sys.version.encode()).hexdigest()
    stamp = place / ".installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"installing the peer's environment {PLACE.name}/{name}", flush=True)
    _run(sys.executable, "-m", "venv", "--clear", str(place))
    _run(str(ROOT / "tools" / "pip"), str(place), "--require-hashes", "-r", str(pins(name)))
    stamp.write_text(wanted)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise NotInstalled(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")

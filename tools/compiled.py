"""The compiled build of this tree: a copy of the package next to the sources, in `build/compiled/`.

    tools/compiled.py          print its folder, for PYTHONPATH, if it was built from these very sources; else nothing
    tools/compiled.py build    build it first unless it is there
    tools/compiled.py off      print nothing: the sources run

The folder holds the .py files too. A build from other sources is never used: its folder holds the digest of what it was
built from. Each version of Python has a folder of its own.
"""

from __future__ import annotations

import compileall
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"
TREE = ROOT / "build" / "compiled" / str(sysconfig.get_config_var("SOABI"))
PARTS = {".py", ".html", ".css", ".js"}
STAMP = TREE / "built-from"


def digest() -> str:
    """Return the digest of all that a build is made from."""
    found = hashlib.sha256(sys.version.encode())
    package = [each for each in (SRC / "triton_distributed").rglob("*.*") if each.suffix in PARTS]
    for path in [ROOT / "setup.py", ROOT / "pyproject.toml", *sorted(package)]:
        found.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return found.hexdigest()


def is_current() -> bool:
    """Return whether there is a build, from these very sources and for this Python."""
    return STAMP.exists() and STAMP.read_text(encoding="utf-8") == digest()


def build() -> None:
    """Build it.

    Raises:
        SystemExit: mypy or a C compiler is missing, or the code does not compile; the output says what is wrong.
    """
    of = digest()
    new = TREE.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(new)]
    command += ["--build-temp", str(TREE.with_suffix(".temp"))]
    environment = os.environ | {"TRD_COMPILE": "1"}
    print("building with mypyc, about a minute", file=sys.stderr)
    if subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False).returncode:
        raise SystemExit("error: the compiled build failed; it needs mypy (`make check` installs it) and a C compiler")
    shutil.rmtree(TREE, ignore_errors=True)
    new.rename(TREE)
    compileall.compile_dir(TREE, quiet=1)  # Else each process compiles what stays Python, if nothing may be written.
    STAMP.write_text(of, encoding="utf-8")


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    if wanted not in ("", "build", "off"):
        raise SystemExit(f"error: {wanted!r}: COMPILED is 1 or `build`, 0 or `off`, or empty")
    if wanted == "off":
        return
    if not is_current():
        if wanted != "build":
            if STAMP.exists():
                print(f"{TREE} is of other sources: running src/; `make compiled` renews it", file=sys.stderr)
            return
        build()
    print(TREE)


if __name__ == "__main__":
    main()

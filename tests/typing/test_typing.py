"""Programs and examples that two strict type checkers must accept, and planted slips that they must refuse.

Each file in `programs/` is checked by mypy --strict and by basedpyright in its strict mode, which run once over all
files. A line that must be refused ends with `# refused: MYPY_CODE, PYRIGHT_RULE`; `-` for a checker that accepts it.
All other lines must be accepted. A new file needs no entry here.

The examples of the native API are accepted as a whole. They are checked here, since mypy has read the package by then.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# A cache of its own: `make check` runs with other options, and either would make the other's cache useless.
MYPY = ("-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(ROOT / ".mypy_cache" / "typing"))
PROGRAMS = sorted(HERE.joinpath("programs").glob("*.py"))
EXAMPLES = sorted(
    {
        each.parent
        for each in (ROOT / "examples").rglob("*.py")
        if "import triton_distributed as trd" in each.read_text()
    }
)
ESCAPES = re.compile(r"\bcast\(|# (?:type|pyright): ignore|\bAny\b")
MARK = re.compile(r"# refused: (?P<mypy>[a-z-]+), (?P<pyright>[A-Za-z-]+)$")
Refused = dict[Path, dict[int, set[str]]]
"""The rules that refuse each line, by file."""


def expected(program: Path, checker: str) -> dict[int, str]:
    """The lines of a program that must be refused, with the rule."""
    marked: dict[int, str] = {}
    for number, line in enumerate(program.read_text().splitlines(), 1):
        if "# refused" in line:
            found = MARK.search(line)
            assert found is not None, f"{program.name}:{number}: write `# refused: MYPY_CODE, PYRIGHT_RULE`"
            if found[checker] != "-":
                marked[number] = found[checker]
    return marked


async def output(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(ROOT / "src")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode in (0, 1), f"{command[2]} failed: {out.decode()}{err.decode()}"
    return out.decode()


async def by_mypy() -> Refused:
    found: Refused = defaultdict(lambda: defaultdict(set))
    for line in (await output(sys.executable, *MYPY, "--output=json", *map(str, PROGRAMS))).splitlines():
        said = json.loads(line)
        if said["severity"] == "error":
            found[ROOT / said["file"]][said["line"]].add(said["code"])
    return found


async def by_pyright(folder: Path) -> Refused:
    """Check the programs and the examples in one run; each of both has files of the same names, so the key is a path."""
    project = folder / "pyrightconfig.json"
    roots = [HERE / "programs", *EXAMPLES]
    settings = {
        "include": [str(each) for each in roots],
        "executionEnvironments": [{"root": str(each), "extraPaths": [str(ROOT / "src")]} for each in roots],
        "typeCheckingMode": "strict",
        "pythonVersion": "3.11",
    }
    project.write_text(json.dumps(settings))
    command = (sys.executable, "-m", "basedpyright", "--project", str(project), "--outputjson")
    found: Refused = defaultdict(lambda: defaultdict(set))
    said = json.loads(await output(*command, "--pythonpath", sys.executable))
    assert said["summary"]["filesAnalyzed"] == sum(len([*each.glob("*.py")]) for each in roots)
    for each in said["generalDiagnostics"]:
        if each["severity"] == "error":
            found[Path(each["file"])][each["range"]["start"]["line"] + 1].add(each["rule"])
    return found


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Refused]:
    """What the checkers refuse; they run at the same time."""

    async def both() -> dict[str, Refused]:
        mypy, pyright = await asyncio.gather(by_mypy(), by_pyright(tmp_path_factory.mktemp("pyright")))
        return {"mypy": mypy, "pyright": pyright}

    return asyncio.run(both())


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_exactly_the_planted_slips_are_refused(program: Path, checker: str, refused: dict[str, Refused]) -> None:
    if checker == "pyright":
        pytest.importorskip("basedpyright", reason="the extra `types` is not installed")
    marked = expected(program, checker)
    # A checker may refuse a line by several rules: an unknown attribute also has an unknown type.
    found = {
        line: marked[line] if marked.get(line) in rules else ", ".join(sorted(rules))
        for line, rules in refused[checker][program].items()
    }
    assert found == marked


def test_slips_are_planted() -> None:
    assert sum(len(expected(each, "mypy")) for each in PROGRAMS) >= 20
    assert sum(len(expected(each, "pyright")) for each in PROGRAMS) >= 20


# --- examples --------------------------------------------------------------------------------------------------------


def test_the_examples_have_no_cast_and_no_ignored_line() -> None:
    assert len(EXAMPLES) >= 2
    found = [str(path) for folder in EXAMPLES for path in folder.glob("*.py") if ESCAPES.search(path.read_text())]
    assert not found


@pytest.mark.slow
@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda path: path.name)
def test_mypy_accepts_an_example(folder: Path) -> None:
    checked = subprocess.run(
        [sys.executable, *MYPY, *folder.glob("*.py")],
        cwd=folder, env={"MYPYPATH": str(ROOT / "src")}, capture_output=True, text=True,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
def test_basedpyright_accepts_the_examples(refused: dict[str, Refused]) -> None:
    pytest.importorskip("basedpyright", reason="the extra `types` is not installed")
    assert not {path: lines for path, lines in refused["pyright"].items() if path not in PROGRAMS}

"""The files of the hosted CI keep to their schema, and name targets and Python versions that this project has."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.guards.tree import MAKEFILE, ROOT, supported_pythons

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def read(path: Path) -> dict[Any, Any]:
    workflow: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return workflow


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read(path)["jobs"]
    return found


def matrix(job: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = job.get("strategy", {}).get("matrix", {})
    return found


def commands(job: dict[str, Any]) -> list[str]:
    """What the steps of a job run, with each value of the matrix in its place."""
    lines = [line for step in job["steps"] for line in step.get("run", "").splitlines()]
    for name, values in matrix(job).items():
        lines = [re.sub(rf"\$\{{\{{ matrix\.{name} \}}\}}", value, line) for line in lines for value in values]
    return sorted(set(lines))


def made(job: dict[str, Any]) -> set[str]:
    """The targets of `make` that a job runs, without the variables that it sets."""
    words = {word for line in commands(job) if " make " in f" {line} " for word in line.split("make ")[1].split()}
    return {each for each in words if "=" not in each}


def by_schema(path: Path) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("check-jsonschema", path=str(Path(sys.executable).parent))
    assert tool is not None, "check-jsonschema is one of the packages of the extra `dev`"
    return subprocess.run(
        [tool, "--builtin-schema", "vendor.github-workflows", str(path)], capture_output=True, text=True
    )


@each_workflow
def test_it_keeps_to_the_schema(path: Path) -> None:
    done = by_schema(path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_does_not_keep_to_the_schema_is_found(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(WORKFLOWS[0].read_text(encoding="utf-8").replace("runs-on:", "run-on:"), encoding="utf-8")
    assert by_schema(wrong).returncode != 0


@each_workflow
def test_it_makes_targets_that_exist(path: Path) -> None:
    for name, job in jobs(path).items():
        assert made(job), f"{path.name}: {name} runs nothing of the Makefile"
        assert made(job) <= TARGETS


@each_workflow
def test_it_runs_on_every_supported_python(path: Path) -> None:
    for job in jobs(path).values():
        assert matrix(job)["python"] == supported_pythons()
        (setup,) = [step for step in job["steps"] if step.get("uses", "").startswith("actions/setup-python@")]
        assert setup["with"]["python-version"] == "${{ matrix.python }}"


@each_workflow
def test_its_expressions_name_what_is_there(path: Path) -> None:
    for name, job in jobs(path).items():
        used = set(re.findall(r"matrix\.(\w+)", yaml.safe_dump(job)))
        assert used <= set(matrix(job)), f"{path.name}: {name}"


@each_workflow
def test_it_may_only_read_and_ends(path: Path) -> None:
    assert read(path)["permissions"] == {"contents": "read"}
    for job in jobs(path).values():
        assert job["timeout-minutes"] <= 90


def test_a_change_is_checked_and_each_week_the_versions_are() -> None:
    found = {path.stem: path for path in WORKFLOWS}
    when = {stem: read(path)[True] for stem, path in found.items()}  # YAML 1.1 takes the key `on` for a truth value
    assert "pull_request" in when["ci"]
    assert when["ci"]["push"] == {"branches": ["main"]}
    assert set().union(*map(made, jobs(found["ci"]).values())) >= {"check", "test"}
    (schedule,) = when["weekly"]["schedule"]
    minute, hour, day, month, weekday = schedule["cron"].split()
    assert (minute.isdigit(), hour.isdigit(), day, month, weekday.isdigit()) == (True, True, "*", "*", True)
    assert set().union(*map(made, jobs(found["weekly"]).values())) == {"test-newest", "test-oldest"}


def test_make_and_the_package_name_the_same_pythons() -> None:
    (versions,) = re.findall(r"^VERSIONS \?= (.+)$", MAKEFILE, re.MULTILINE)
    assert versions.split() == supported_pythons()

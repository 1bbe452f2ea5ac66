"""What development and CI install is in requirements.lock: all of it, with hashes, for each supported Python and platform."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.guards.tree import MAKEFILE, ROOT, supported_pythons

PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("darwin", "x86_64")]


def requirements(which: str, parts: str) -> list[Requirement]:
    """What tools/requirements.py prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/requirements.py"), which, parts], capture_output=True, text=True, check=True
    )
    lines = done.stdout.replace("\\\n", "").splitlines()
    return [Requirement(line.split("--hash")[0]) for line in lines]


def refused(which: str, parts: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/requirements.py"), which, parts], capture_output=True, text=True
    )
    assert done.returncode != 0
    return done.stderr


def environments() -> list[dict[str, str]]:
    return [
        {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "sys_platform": system,
            "platform_system": system.capitalize(),
            "platform_machine": machine,
            "os_name": "posix",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
        }
        for python in supported_pythons()
        for system, machine in PLATFORMS
    ]


def holds(requirement: Requirement, environment: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment)


def installed_sets() -> list[str]:
    """The sets of extras that the Makefile installs."""
    found = re.findall(r"^\ttools/install \$\(VENV\)(?: ([a-z,]+))?$", MAKEFILE, re.MULTILINE)
    assert len(found) >= 5
    return ["build", "weights", "etcd-server", *found]


@pytest.mark.parametrize("parts", installed_sets())
def test_each_set_is_in_the_lock_once_for_each_python_and_platform(parts: str) -> None:
    wanted, locked = requirements("newest", parts), requirements("locked", parts)
    assert wanted
    for environment in environments():
        there: dict[str, str] = {}
        for each in locked:
            if holds(each, environment):
                name = canonicalize_name(each.name)
                assert name not in there, f"{name} is there twice for {environment}"
                (pin,) = each.specifier
                assert pin.operator == "=="
                there[name] = pin.version
        for each in wanted:
            if holds(each, environment):
                version = there[canonicalize_name(each.name)]
                assert each.specifier.contains(version), f"{each} is locked at {version}: run `make lock`"


def test_what_a_package_needs_comes_with_it() -> None:
    names = {each.name for each in requirements("locked", "cluster")}
    assert {"msgspec", "h11", "nats-py", "nkeys", "pynacl", "cffi"} <= names
    assert not names & {"pytest", "numpy", "grpcio"}
    assert {each.name for each in requirements("locked", "build")} == {"setuptools"}


def test_each_entry_has_hashes_and_no_address() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    entries = [each for each in re.split(r"\n(?=\S)", text) if not each.startswith("#")]
    assert len(entries) > 50
    for entry in entries:
        first = entry.splitlines()[0]
        assert re.match(r"[a-z0-9-]+==\S+ ", first), first
        assert len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry)) >= 1, first


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    newest, oldest = requirements("newest", "all"), requirements("oldest", "all")
    assert [(each.name, each.extras, each.marker) for each in newest] == [
        (each.name, each.extras, each.marker) for each in oldest
    ]
    for declared, exact in zip(newest, oldest, strict=True):
        (pin,) = exact.specifier
        assert pin.operator == "=="
        bounds = {each.version for each in declared.specifier if each.operator in (">=", "==")}
        assert bounds == {pin.version}


def test_what_is_not_there_is_refused_with_its_name() -> None:
    assert "'nonsense'" in refused("locked", "dev,nonsense")
    assert "usage" in refused("latest", "dev")

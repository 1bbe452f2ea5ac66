"""Every setting is in the reference, with its default and its meaning."""

from __future__ import annotations

import re
import subprocess

from tests.guards import settings
from tests.guards.tree import ROOT
from triton_distributed.config import unknown_settings

REFERENCE = ROOT / "docs" / "settings.md"
RENEW = "`python -m tests.guards.settings` prints the table as it should be"


def test_every_setting_is_documented_once_with_its_default():
    written = REFERENCE.read_text(encoding="utf-8").splitlines()
    missing = [row for row in settings.rows() if written.count(row) != 1]
    assert not missing, f"{REFERENCE.name} lacks, contradicts or repeats these rows ({RENEW}):\n" + "\n".join(missing)


def test_no_setting_is_documented_that_does_not_exist():
    exist = {row.split("`")[1] for row in settings.rows()}
    named = set(re.findall(r"\bTRD_[A-Z0-9_]+\b", REFERENCE.read_text(encoding="utf-8")))
    assert named <= exist, f"{REFERENCE.name} names {sorted(named - exist)}, which config.py does not have ({RENEW})"


def test_every_name_that_the_project_uses_is_known():
    """Else its own programs would be warned of."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    unknown = {}
    for each in listed:
        if each.startswith(("tests/", "src/triton_distributed/config.py")):  # tests name parts, and slips
            continue
        path = ROOT / each
        if path.is_file() and path.suffix in (".py", ".md", ".yaml", ".yml", ".env", ".service", ".toml", ".sh", ""):
            names = set(re.findall(r"\bTRD_[A-Z0-9_]*[A-Z0-9]\b(?!\*|_)", path.read_text(encoding="utf-8")))
            unknown.update(dict.fromkeys(unknown_settings(dict.fromkeys(names, "1")), each))
    assert not unknown

"""docs/errors.md says of every error what to do about it."""

from __future__ import annotations

import re

import triton_distributed
from tests.guards.tree import ROOT
from triton_distributed import errors


def test_every_error_has_one_row():
    text = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|$", text, re.MULTILINE)
    assert len(rows) == len(set(rows))
    public = {name: getattr(errors, name) for name in errors.__all__}
    public |= {name: getattr(triton_distributed, name) for name in triton_distributed.__all__}
    raised = {name for name, kind in public.items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert set(rows) == raised - {"TritonError"}

"""What starts often stays light: `trd --help` and the runtime import nothing that they do not need."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("numpy", "nats", "h11", "rich", "starlette", "opentelemetry", "pydantic", "grpc", "prometheus_client")

HELP = """
import sys
from triton_distributed.cli.main import main
sys.argv = ["trd", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize("program", [HELP, "import triton_distributed.runtime"], ids=["trd --help", "runtime"])
def test_imports_nothing_heavy(program):
    report = f"import sys; print('HEAVY', *(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{program}\n{report}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].split() == ["HEAVY"]

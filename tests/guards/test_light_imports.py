"""What starts often stays light: `trd --help` and the runtime import nothing that they do not need."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("numpy", "nats", "h11", "rich", "starlette", "opentelemetry", "pydantic", "grpc", "prometheus_client")
# Modules of Python itself that cost a millisecond or more each with what they import.
SLOW = ("tempfile", "sysconfig", "fractions", "statistics", "difflib", "ctypes", "email", "http", "multiprocessing")
# Backends for a cluster, and what only tests use.
CHOSEN = ("discovery.etcd", "external.etcd", "external.nats_port", "events.local", "transport.nats", "testing")

HELP = """
import sys
from triton_distributed.cli.main import main
sys.argv = ["trd", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


RUNTIME = "import triton_distributed.runtime"
NATIVE = "import triton_distributed as trd\ntrd.serve, trd.connect, trd.call"


@pytest.mark.parametrize("program", [HELP, RUNTIME, NATIVE], ids=["trd --help", "runtime", "native"])
def test_imports_nothing_heavy(program):
    unwanted = {*HEAVY, *SLOW, *(f"triton_distributed.{name}" for name in CHOSEN)}
    before = "import sys; before = set(sys.modules)"
    report = f"print('HEAVY', *((set(sys.modules) - before) & {unwanted!r}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{before}\n{program}\n{report}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].split() == ["HEAVY"]

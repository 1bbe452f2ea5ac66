"""Imports go down only, the pure rooms stay pure, and one file reads the environment."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.guards.tree import PACKAGE, Module, imports, modules

VALUES = {"compiled", "errors", "names", "config", "context", "annotated", "quiet", "redaction"}
GROUND = {"wire", "payload", "system", "external"}
SIBLINGS = {"transport", "discovery", "routing", "events", "observe"}
HALVES = {"calling", "serving"}
TOP = ("testing", "integrations", "compat")

# What each room may import of our own, besides itself. A new room fails until it gets its place here.
MAY_IMPORT: dict[str, set[str]] = {
    "": VALUES
    | GROUND
    | SIBLINGS
    | HALVES
    | {"status", "runtime", "supervisor", "api"},  # It names what programs use, of every room.
    "redaction": set(),
    "errors": {"redaction"},
    "names": {"errors"},
    "config": {"errors", "names", "redaction"},
    "context": {"names"},
    "annotated": set(),
    "compiled": set(),
    "quiet": set(),
    **dict.fromkeys(GROUND, VALUES),
    **dict.fromkeys(SIBLINGS, VALUES | GROUND),
    **dict.fromkeys(HALVES, VALUES | GROUND | SIBLINGS),
    "status": VALUES | GROUND | SIBLINGS | HALVES,
    "runtime": VALUES | GROUND | SIBLINGS | HALVES | {"status"},
    "supervisor": VALUES | GROUND | SIBLINGS | {"status"},
    "api": VALUES | GROUND | SIBLINGS | HALVES | {"status", "runtime", "supervisor"},
    "_core": {"runtime", "llm"},
    "__main__": {"cli"},
    **{room: VALUES | GROUND | SIBLINGS | HALVES | {"status", "runtime", "supervisor", "api"} for room in TOP},
    "llm": VALUES | GROUND | SIBLINGS | HALVES | {"status", "runtime", "supervisor", "api", "integrations"},
    "cli": VALUES | GROUND | SIBLINGS | HALVES | {"status", "runtime", "supervisor", "api", "integrations", "llm"},
    "starlette": {"integrations"},
    "fastapi": {"api", "starlette"},
}

# The same inside of `llm`: what each of its parts may import of the others.
LLM_MAY_IMPORT: dict[str, set[str]] = {
    "contract": set(),
    "tokens": {"contract"},
    "engines": {"contract", "tokens", "kv_events"},
    "worker": {"contract", "tokens", "routing", "kv_events"},
    "routing": {"contract"},
    "kv_events": {"contract", "routing"},
    "router": {"contract", "routing", "kv_events"},
    "models": {"contract", "tokens", "routing", "router"},
    "http": {"contract", "tokens", "models", "routing"},
    "replay": {"contract", "engines", "routing"},
    "original": {"contract", "routing"},
}

PURE_ROOMS = {"wire", "payload", "routing"}
NOT_IN_PURE_ROOMS = {"asyncio", "socket", "time", "os"}


def direction(module: Module) -> list[str]:
    """Imports that go sideways or up."""
    found = []
    if module.room not in MAY_IMPORT:
        return [f"{module.at(module.tree())}: room {module.room!r} has no place in MAY_IMPORT of {Path(__file__).name}"]
    allowed = MAY_IMPORT[module.room] | {module.room}
    for node, name in imports(module):
        parts = name.split(".")
        if parts[0] != PACKAGE or len(parts) < 2 or parts[1] == "__version__":
            continue
        if parts[1] not in allowed:
            may = ", ".join(sorted(allowed - {""})) or "nothing of ours"
            found.append(f"{module.at(node)}: {module.room or PACKAGE} imports {name}; it may import {may}")
    return found


def direction_in_llm(module: Module) -> list[str]:
    """Imports inside of `llm` that go sideways or up."""
    parts = module.name.split(".")
    if module.room != "llm" or len(parts) < 3:
        return []
    if parts[2] not in LLM_MAY_IMPORT:
        return [f"{module.at(module.tree())}: llm.{parts[2]} has no place in LLM_MAY_IMPORT of {Path(__file__).name}"]
    allowed = LLM_MAY_IMPORT[parts[2]] | {parts[2]}
    return [
        f"{module.at(node)}: llm.{parts[2]} imports {name}; of llm it may import {', '.join(sorted(allowed))}"
        for node, name in imports(module)
        if name.startswith(f"{PACKAGE}.llm.") and name.split(".")[2] not in allowed
    ]


def purity(module: Module) -> list[str]:
    """Imports of I/O and clocks in rooms that have none."""
    if module.room not in PURE_ROOMS:
        return []
    return [
        f"{module.at(node)}: {module.room} imports {name}; clock and I/O are handed in, or live in transport"
        for node, name in imports(module)
        if name.split(".")[0] in NOT_IN_PURE_ROOMS
    ]


def late_imports(module: Module) -> list[str]:
    """Imports of our own package inside functions, where they hide a cycle."""
    own = {node.lineno for node, name in imports(module) if node.col_offset and name.split(".")[0] == PACKAGE}
    if not own:
        return []
    late = [
        node
        for function in ast.walk(module.tree())
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom) and node.lineno in own
    ]
    return sorted(
        {f"{module.at(node)}: imports our own package inside a function: move it to the top" for node in late}
    )


def environment(module: Module) -> list[str]:
    """Reads and writes of the environment outside config.py."""
    if module.room == "config":
        return []
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    if not any(name in module.text() for name in names):
        return []
    found = []
    for node in ast.walk(module.tree()):
        attribute = isinstance(node, ast.Attribute) and node.attr in names
        imported = isinstance(node, ast.ImportFrom) and node.module == "os" and names & {a.name for a in node.names}
        if attribute or imported:
            found.append(f"{module.at(node)}: touches the environment; config.py alone reads it, others take a Config")
    return found


RULES = [direction, direction_in_llm, purity, late_imports, environment]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_it(rule):
    found = [line for module in modules() for line in rule(module)]
    assert not found, "\n" + "\n".join(found)


def test_there_is_something_to_look_at():
    assert {"errors", "names", "config", "wire"} <= {module.room for module in modules()}


@pytest.mark.parametrize(
    ("rule", "file", "text", "says"),
    [
        (
            direction,
            "wire/frames.py",
            "from triton_distributed.transport.session import Session",
            "frames.py:1: wire imports",
        ),
        (
            direction,
            "transport/tcp.py",
            "import triton_distributed.discovery.file.backend",
            "it may import annotated, compiled, config, context, errors, external, names, payload, quiet, redaction, system, transport, wire",
        ),
        (direction, "transport/tcp.py", "from ..routing import policy", "imports triton_distributed.routing.policy"),
        (direction, "wire/__init__.py", "from .. import runtime", "wire imports triton_distributed.runtime"),
        (direction, "names.py", "from triton_distributed import config", "names imports triton_distributed.config"),
        (direction, "attic/old.py", "", "room 'attic' has no place"),
        (
            direction_in_llm,
            "llm/engines/own.py",
            "from triton_distributed.llm.models import table",
            "own.py:1: llm.engines imports triton_distributed.llm.models.table; of llm it may import contract, engines",
        ),
        (direction_in_llm, "llm/attic/old.py", "", "llm.attic has no place"),
        (purity, "wire/frames.py", "x = 1\nimport os.path", "frames.py:2: wire imports os.path"),
        (
            purity,
            "routing/policy.py",
            "def f():\n    from time import monotonic",
            "policy.py:2: routing imports time.monotonic",
        ),
        (late_imports, "runtime/client.py", "def f():\n    from triton_distributed import names", "client.py:2"),
        (late_imports, "runtime/client.py", "async def f():\n    from . import server", "client.py:2"),
        (environment, "runtime/client.py", "import os as o\no.environ.get('X')", "client.py:2: touches"),
        (environment, "cli/main.py", "from os import getenv", "main.py:1: touches"),
    ],
)
def test_a_breach_is_found_and_named(tmp_path: Path, rule, file, text, says):
    path = tmp_path / "src" / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    found = [line for module in modules(tmp_path / "src") for line in rule(module)]
    assert len(found) == 1
    assert says in found[0]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (
            "wire/frames.py",
            "from triton_distributed.errors import ProtocolError\nfrom .states import State\nimport struct",
        ),
        ("runtime/client.py", "import asyncio\nfrom triton_distributed.routing.policies import RoundRobin"),
        ("names.py", "def f():\n    from blake3 import blake3"),
        ("config.py", "import os\nos.environ['X']"),
        ("observe/clock.py", "import time, os\nos.getpid()"),
    ],
)
def test_what_is_right_passes(tmp_path: Path, file, text):
    path = tmp_path / "src" / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert [line for module in modules(tmp_path / "src") for rule in RULES for line in rule(module)] == []

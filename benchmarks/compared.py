"""The table of docs/compared.md: `python -m benchmarks.compared [--write]`.

It counts the lines of code of five programs, in ours and in theirs: no blank lines, comments and docstrings. Code that
a tool generates from a `.proto` file does not count; the `.proto` file itself does.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compared.md"
THEIRS = ROOT / "docs" / "compared"
MARKED = re.compile(r"(<!-- lines -->\n).*?(<!-- /lines -->)", re.DOTALL)
PROGRAMS = {
    "hello world": ("hello_native", "hello_world"),
    "typed pipeline of three": ("typed_pipeline", "typed_pipeline"),
    "FastAPI gateway with server-sent events": ("gateway", "gateway"),
    "Flask view": ("flask_view", "flask_view"),
    "batched embedder": ("batched_embedder", "batched_embedder"),
}
"""For each program our folder in examples/ and theirs in docs/compared/."""
FAMILIES = {"Ray Serve": "ray_serve", "grpc.aio": "grpc_aio"}
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def python_lines(source: str) -> int:
    """Count the lines of Python code: those with a token that is neither a comment nor part of a docstring."""
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in NOT_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str:
                lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def proto_lines(source: str) -> int:
    """Count the lines of a `.proto` file that are neither blank nor comments."""
    return sum(bool(line.strip()) and not line.strip().startswith("//") for line in source.splitlines())


def lines_of(folder: Path) -> int:
    """Count the lines of code of a program."""
    if not folder.is_dir():
        raise SystemExit(f"{folder.relative_to(ROOT)} is missing")
    python = sum(python_lines(path.read_text(encoding="utf-8")) for path in folder.glob("*.py"))
    return python + sum(proto_lines(path.read_text(encoding="utf-8")) for path in folder.glob("*.proto"))


def render() -> str:
    """Return the table as Markdown."""
    rows = [("program", "ours", *FAMILIES)]
    for text, (ours, theirs) in PROGRAMS.items():
        own = f"[{lines_of(ROOT / 'examples' / ours)}](../examples/{ours})"
        others = (f"[{lines_of(THEIRS / theirs / each)}](compared/{theirs}/{each})" for each in FAMILIES.values())
        rows.append((text, own, *others))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "| --- | --: | --: | --: |", *lines[1:]]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compared", description="The lines of five programs.")
    parser.add_argument("--write", action="store_true", help="put the table between the markers in docs/compared.md")
    if not parser.parse_args().write:
        print(render(), end="")
        return
    text, places = MARKED.subn(lambda found: found[1] + render() + found[2], PAGE.read_text(encoding="utf-8"))
    if places != 1:
        raise SystemExit(f"{PAGE.name} needs one <!-- lines --> … <!-- /lines -->, it has {places}")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Lays out the pages of the documentation's site: a hook of mkdocs, which `make docs` runs.

The site has the folders of the repository, so that a link between two pages works in both. It takes the pages in docs/,
the pages of PAGES with the pictures of PICTURES, and one page for each folder of programs, which shows their source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "deploy/README.md",
    "examples/README.md",
    "harness/README.md",
)
PICTURES = "benchmarks/results/*.svg"
PROGRAMS = ("examples/*", "docs/compared/*/*")
LANGUAGES = {".py": "python", ".proto": "protobuf"}
LINK = re.compile(r"\]\(([\w./-]+)\)")
FENCE = re.compile(r"^( *```\w+) [^\n]+$", re.MULTILINE)
NAMED = re.compile(r"^( *)```python\n *# file: (\S+)\n", re.MULTILINE)


def programs(folder: Path) -> list[Path]:
    """The programs in a folder and in the folders below it."""
    return sorted(each for each in folder.rglob("*") if each.suffix in LANGUAGES and "__pycache__" not in each.parts)


def folders() -> Iterator[Path]:
    """The folders of programs that have a page."""
    for pattern in PROGRAMS:
        yield from sorted(each for each in ROOT.glob(pattern) if each.is_dir() and programs(each))


def source_page(folder: Path) -> str:
    """A page with the source of each program in a folder."""
    text = [f"# {folder.relative_to(ROOT).as_posix()}"]
    for path in programs(folder):
        name = path.relative_to(folder).as_posix()
        text.append(f"## {name}\n\n```{LANGUAGES[path.suffix]}\n{path.read_text(encoding='utf-8')}```")
    return "\n\n".join(text) + "\n"


def on_files(files: Files, config: Any) -> Files:
    """Replace the files of docs/ with those of the site; files of the theme stay."""
    laid = Files([each for each in files if each.src_dir != config.docs_dir])
    for name in (*(f"docs/{each.src_uri}" for each in files if each.src_dir == config.docs_dir), *PAGES):
        laid.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for path in sorted(ROOT.glob(PICTURES)):
        laid.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for folder in folders():
        name = f"{folder.relative_to(ROOT).as_posix()}/index.md"
        laid.append(File.generated(config, name, content=source_page(folder)))
    return laid


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let a link to a folder lead to its page, give a file's name as its title, and drop what only the tests read."""
    here = (ROOT / page.file.src_uri).parent

    def to_page(link: re.Match[str]) -> str:
        return f"]({link[1].rstrip('/')}/index.md)" if (here / link[1]).resolve() in set(folders()) else link[0]

    markdown = FENCE.sub(r"\1", markdown)
    markdown = NAMED.sub(r'\1```python title="\2"\n', markdown)
    return LINK.sub(to_page, markdown)

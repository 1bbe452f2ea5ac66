"""Texts of the package and of the documents avoid phrases of a terse dialect that they were once written in."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guards.tree import ROOT, modules

# Each phrase with better words. No use of these phrases is good English for machines and code.
PHRASES = {
    r"(?:that|which|it|what) (?:is|are) (?-i:none)": "is not a …, is not valid",
    r"(?:that|which) (?:is|are) no (?!longer|more)\w+": "is not a …",
    r"belongs? into": "belongs in",
    r"for want of": "because there is no …",
    r"whose doing": "what caused",
    r"whoever|whosoever": "any process that, the process that",
    r"somebody|everybody": "a process, a caller; each process",
    r"ha(?:s|ve) it sa(?:y|id)": "says",
    r"(?:is|are|was|were|be|been) told": "is notified, gets, learns",
    r"(?:is|are|was|were) said": "is logged, is reported",
    r"(?:is|are|was|were|be|been) let(?! go)": "is admitted, may",
    r"so many (?:bytes|calls|comparisons|events|frames|seconds|times)(?! \w+ that)": "this many, this number of",
    r"behind the (?:body|event|first|header|item|last|next)": "after",
    r"beside that": "besides, in addition",
    r"in this very moment": "at this moment",
    r"(?:can|could|cannot|to) be had": "is available",
    r"(?:have|has|had) nothing of": "has no part of",
    r"each \d+(?:\.\d+)? (?:s|ms|µs)": "every 10 ms",
    r"at most one an?": "at most one for each",
    r"what must not be(?= ?[,;:.])": "faults, what must not happen",
}
# In the package also words for persons: code speaks of processes, callers, handlers. A document may speak of users.
PERSONS = {
    r"nobody|anybody": "no process, any caller",
    r"who (?:has|is)": "that has, that is",
    r"whom": "which process",
}


def compiled(phrases: dict[str, str]) -> list[tuple[re.Pattern[str], str]]:
    """The phrases with their better words, also where a line break or a comment sign stands between two words."""
    return [(re.compile(rf"\b(?:{each})\b".replace(" ", r"[\s#]+"), re.I), words) for each, words in phrases.items()]


DOCUMENTS = compiled(PHRASES)
PACKAGE = compiled(PHRASES | PERSONS)
MIDDLE = getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)  # The text of f-strings from Python 3.12 on.


def texts(source: str) -> Iterator[tuple[int, str]]:
    """The string literals of Python code, and its comments, those of adjacent lines together, each with its line."""
    first, last, block = 0, 0, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT:
            if block and line == last + 1:
                block += f"\n{token.string}"
            else:
                if block:
                    yield first, block
                first, block = line, token.string
            last = line
        elif token.type in (tokenize.STRING, MIDDLE):
            yield line, token.string
    if block:
        yield first, block


def prose(page: str) -> str:
    """A Markdown page with the same lines, without code."""
    page = re.sub(r"^ *```.*?^ *```", lambda block: "\n" * block[0].count("\n"), page, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "`…`", page)


def found_in(name: str, text: str) -> list[str]:
    """The phrases in a file, each with file, line and better words."""
    python = name.endswith(".py")
    parts = texts(text) if python else [(1, prose(text))]
    return [
        f'{name}:{first + part.count(chr(10), 0, match.start())}: "{" ".join(match[0].split())}": {words}'
        for first, part in parts
        for pattern, words in (PACKAGE if python else DOCUMENTS)
        for match in pattern.finditer(part)
    ]


def scanned() -> list[Path]:
    pages = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
    return [*(each.path for each in modules()), *pages, *sorted((ROOT / "docs").rglob("*.md"))]


def test_texts_are_plain_english() -> None:
    found: list[str] = []
    for path in scanned():
        name = path.relative_to(ROOT).as_posix()
        found += found_in(name, path.read_text(encoding="utf-8"))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.py", '"""An index that is\nnone."""', 1),
        ("a.py", "x = 1\n# refused for want\n# of room", 2),
        ("a.py", 'raise ValueError(\n    "a key that is no text"\n)', 2),
        ("a.py", 'f"{x} waits for {y}, and nobody serves it"', 1),
        ("a.md", "# Title\n\nThe peer is told.", 3),
        ("a.md", "```python\nx\n```\n\nIt is told at most one\na session.", 5),
    ],
)
def test_a_phrase_is_found(name: str, text: str, line: int) -> None:
    assert found_in(name, text)[0].startswith(f"{name}:{line}: ")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", '"""An item that is None, or 0 if there is none. A record that is no longer listed."""'),
        ("a.py", "nobody = whoever = 1"),
        ("a.py", '"so many calls failed that none is sent again"'),
        ("a.md", "```python\n# whoever\n```"),
        ("a.md", "Users who have a token, and nobody else. See `whoever`."),
    ],
)
def test_other_words_are_not(name: str, text: str) -> None:
    assert found_in(name, text) == []

"""Committed files speak of the project alone: no machine's folders, no registry hosts, nothing unfinished."""

from __future__ import annotations

import re

import pytest

from tests.guards.tree import ROOT, project_files


def any_of(words: str, before: str = r"\b", after: str = r"\b", flags: int = 0) -> re.Pattern[str]:
    """A pattern for any of the words, given with a `+` inside each, so that this file does not hold them."""
    return re.compile(f"{before}(?:{'|'.join(map(re.escape, words.replace('+', '').split()))}){after}", flags)


WORDS = {
    "a folder of one machine": any_of("wo+rk ro+ot ho+me Us+ers tmp/pr+oto", before=r"(?<![\w.~$}/*-])/", after="/"),
    "a folder of one machine's user": any_of(".pye+nv/versions", before=""),
    "a registry's host": any_of("py+pi.org python+hosted.org npm+js.org deb.de+bian.org proxy.go+lang.org"),
    "who or what wrote it": any_of("cla+ude anth+ropic cop+ilot co-auth+ored-by", flags=re.IGNORECASE),
    "a mark of unfinished work": any_of("TO+DO FIX+ME X+XX HA+CK"),
}


def found_in(name: str, text: str) -> list[str]:
    return [
        f"{name}:{number}: {what}: {line.strip()[:100]}"
        for number, line in enumerate(text.splitlines(), 1)
        for what, pattern in WORDS.items()
        if pattern.search(line)
    ]


def test_the_project_speaks_of_itself_alone():
    found: list[str] = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture or an archive
        found += found_in(str(path.relative_to(ROOT)), text)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "cd /wor" + "k/main",
        "'/roo" + "t/x'",
        "see https://pyp" + "i.org/project/x",
        "# TO" + "DO: later",
        "Co-Authored" + "-By: me",
    ],
)
def test_a_word_is_found(line):
    assert len(found_in("file", line)) == 1


@pytest.mark.parametrize(
    "line", ["frame/work/x", "src/root/x", "the work/life of roots", "$HOME/x", "todos", "wor" + "k/x"]
)
def test_an_innocent_word_is_not(line):
    assert found_in("file", line) == []

"""The machinery that runs documents: it runs what is there, and finds what is wrong with file and line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.guards import documents
from tests.guards.documents import Block, DocumentError

SERVER = """
# file: server.py
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
open("ready", "w").close()
print("listening as", "server-17", flush=True)
while True:
    signal.pause()
"""


def markdown(*parts: tuple[str, str]) -> str:
    return "# Title\n\n" + "\n".join(f"Words.\n\n```{info}\n{text.strip()}\n```\n" for info, text in parts)


@pytest.fixture
def run(tmp_path: Path):
    def run(*parts: tuple[str, str]) -> int:
        path = tmp_path / "page.md"
        path.write_text(markdown(*parts))
        return documents.run(path, tmp_path / "run")

    return run


def test_runs_python_files_commands_and_servers(run):
    assert (
        run(
            ("python", SERVER),
            ("python", "# file: pkg/mod.py\nVALUE = 5"),
            ("console", "$ python server.py &\nlistening as …"),
            ("python", "import os\nassert os.path.exists('ready')\nfrom pkg.mod import VALUE\nassert VALUE == 5"),
            ("console", "$ ls ready \\\n> pkg\nready\n\n$ python3 -c 'print(1,   2)'\n1 2"),
            ("sh", "# a comment\ntest -e ready\nmkdir -p further"),
            ("console", "$ cat nothing\ncat: … No such file or directory\nexit status 1"),
            ("text", "$ false"),
            ("json", "{}"),
            ("sh no-run: installs the package", "pip install triton-distributed"),
        )
        == 8
    )


def test_background_commands_are_killed_and_waited_for_by_number(run):
    kept = "import time; print('up', flush=True); time.sleep(60)"
    ends = "import sys, time; print('begins', flush=True); time.sleep(0.2); print('ends')"
    run(
        ("console", f"""$ python -c "{kept}" &\nup\n$ python -c "{ends}" &\nbegins\n$ kill -9 %1\n$ fg %2\nends"""),
        ("python", SERVER),
        ("console", "$ python server.py &\nlistening as …\n$ kill %3"),
    )


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([("python", "x = 1\nraise LookupError('no')")], r"page.md:5: exit status 1, not 0[\s\S]*LookupError: no"),
        ([("console", "$ true\n$ false")], r"page.md:7: exit status 1, not 0: \$ false"),
        ([("console", "$ true\nexit status 3")], r"page.md:6: exit status 0, not 3"),
        (
            [("console", "$ echo a\nb")],
            r"page.md:6: \$ echo a\nthe document shows this line:\n    b\nthe output was:\na",
        ),
        ([("console", "$ printf 'a\\nb\\n'\nb\na")], r"this line:\n    a"),
        ([("console", "echo a")], r"page.md:6: a console block starts with `\$ command`"),
        ([("bash", "echo a")], r"page.md:5: ```bash is neither run"),
        ([("", "echo a")], r"page.md:5: ``` is neither run"),
        ([("python no-run: it is long", "x")], r"page.md:5: ```python 'no-run: it is long' is not understood"),
        ([("console no-run", "$ pip install x")], r"page.md:5: say why this is not run"),
        ([("console no-run: takes too long", "$ python worker.py")], r"page.md:6: only installing and `make`"),
        ([("sh no-run: runs this very test", "make rocket")], r"page.md:6: the Makefile has no target 'rocket'"),
        (
            [("python", SERVER), ("console", "$ python server.py &\nlistening as client")],
            r"the output was:\nlistening as server",
        ),
        (
            [("console", "$ python -c 'import time; time.sleep(100)' &")],
            r"page.md:6: exit status -15, not 0[\s\S]*SIGTERM",
        ),
        ([("console", "$ kill -9 %1")], r"page.md:6: \$ kill -9 %1: there is no background command 1"),
        ([("console", "$ python -c 'print(1)' &\n1\n$ fg %1\n2")], r"page.md:8: \$ fg %1[\s\S]*    2\nthe output"),
        ([("console", "$ python -c 'print(1)' &\n2")], r"page.md:6: \$ python[\s\S]*    2\nthe output was:\n1"),
    ],
)
def test_what_is_wrong_is_named(run, monkeypatch, parts, says):
    if "server.py" in str(parts):
        monkeypatch.setattr(documents, "PATIENCE_S", 2.0)  # its line never comes
    with pytest.raises(DocumentError) as caught:
        run(*parts)
    assert re.search(says, str(caught.value)), str(caught.value)


def test_a_server_without_ampersand_is_told_what_is_missing(run, monkeypatch):
    monkeypatch.setattr(documents, "PATIENCE_S", 0.5)
    with pytest.raises(DocumentError, match=r"did not end within 0.5 s \(a server's command ends in `&`\)"):
        run(("console", "$ python -c 'import signal; signal.pause()'"))


def test_a_block_that_is_never_closed():
    with pytest.raises(DocumentError, match=r"x.md:2: this block is never closed"):
        list(documents.blocks("text\n```python\nx = 1\n", "x.md"))


def test_blocks_in_lists_lose_their_margin():
    found = list(documents.blocks("1. do\n\n   ```sh\n   echo a\n     echo b\n   ```\n", "x.md"))
    assert found == [Block("x.md:3", "sh", "", ["echo a", "  echo b"])]


@pytest.mark.parametrize(
    ("expected", "output", "missing"),
    [
        (["a", "c"], "a\nb\nc", None),
        (["instance … answered …"], "instance  0x17 answered 'hello'", None),
        (["took ... ms"], "took 17.2 ms", None),
        (["a.c"], "abc", "a.c"),
        (["a", "a"], "a", "a"),
        ([], "", None),
    ],
)
def test_output_is_compared_loosely(expected, output, missing):
    assert documents.missing_line(expected, output) == missing


def test_links(tmp_path: Path):
    (tmp_path / "there.md").touch()
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md#part) [b](https://example.org) [c](#x) [d](gone.md) `A[b](none.md)`\n```text\n[e](code.md)\n```\n"
    )
    assert documents.broken_links(page) == ["page.md: gone.md"]

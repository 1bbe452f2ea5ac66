"""The failure of a command: its exit status and its error text."""

from __future__ import annotations

import re

FAILED = 1
"""Exit status of a command that failed although its command line was valid."""

USAGE = 2
"""Exit status if the command line or a setting is invalid; argparse uses the same."""

INTERRUPTED = 130
"""Exit status after SIGINT: 128 + 2, as shells report it."""


class Failure(Exception):
    """Ends the command with one line on standard error, or with some if the remedy is commands or a list.

    Args:
        text: the problem and its remedy, without the command's name; `main` adds the name.
        status: the exit status.
        lines: keep the lines of the text.
    """

    def __init__(self, text: str, status: int = FAILED, *, lines: bool = False) -> None:
        super().__init__(text)
        self.status, self.lines = status, lines


def one_line(text: object) -> str:
    """Return a text without line breaks and repeated blanks, so that each error is one line, e.g. for `grep`."""
    return " ".join(str(text).split())


_PATH = re.compile(r"""([^\s/."'`(]+)/components/([^\s/.]+)/([^\s/.,:;"'`)]+)(?=\.?(?:[\s,:;"'`)]|$))""")


def dotted(text: str) -> str:
    """Return an error's text with the names of endpoints as users type them.

    The runtime's errors have `namespace/components/component/endpoint`. Only a name with a dot in a part stays so.
    """
    return _PATH.sub(r"\1.\2.\3", text)

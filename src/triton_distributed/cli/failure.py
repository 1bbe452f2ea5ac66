"""How a command ends when it cannot do what was asked."""

from __future__ import annotations

FAILED = 1
"""Exit status of a command that was understood and failed."""

USAGE = 2
"""Exit status where the command line or a setting is invalid, as of argparse."""

INTERRUPTED = 130
"""Exit status after SIGINT: 128 + SIGINT, as shells report it."""


class Failure(Exception):
    """Ends the command with one line on standard error.

    Args:
        text: what went wrong and what helps; without the command's name, which `main` puts before it.
        status: the exit status.
    """

    def __init__(self, text: str, status: int = FAILED) -> None:
        super().__init__(text)
        self.status = status


def one_line(text: object) -> str:
    """A text without line breaks and runs of blanks, so that one error is one line for `grep` too."""
    return " ".join(str(text).split())

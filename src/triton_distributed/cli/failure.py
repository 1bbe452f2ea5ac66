"""How a command ends when it cannot do what was asked."""

from __future__ import annotations

FAILED = 1  # understood, and it did not work
USAGE = 2  # the command line or a setting cannot be understood; argparse uses the same
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


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

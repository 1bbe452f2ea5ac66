"""The terminal of `trd top`: it draws the table, reads keys, and leaves the terminal as it was."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import termios
import tty
from collections.abc import Callable, Sequence
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from triton_distributed.cli.top_table import Cell

KEYS = {"A": "up", "B": "down", "C": "right", "D": "left", "5~": "page up", "6~": "page down"}
"""What the keys send after ESC and `[` or `O`."""

_KEY = re.compile(r"\x1b[\[O]([0-9;]*[A-Za-z~])|\x1b[\[O]?[0-9;]*$|([^\x1b])|\x1b")


def keys(text: str) -> tuple[list[str], str]:
    """The keys in what was read, and the beginning of one that has not arrived completely."""
    found: list[str] = []
    for match in _KEY.finditer(text):
        if match[1] is not None:
            found.append(KEYS.get(match[1], ""))
        elif match[2] is not None:
            found.append(match[2])
        elif match.end() == len(text):
            return found, match[0]
    return found, ""


def can_draw() -> bool:
    """Whether the terminal of standard output can do more than print lines."""
    return not Console().is_dumb_terminal


class Terminal:
    """Takes over the terminal of standard output for as long as it is entered.

    Args:
        pressed: called with each key: one character, or a name of `KEYS`.
        resized: called when the terminal has another size.
        ended: called when there are no more keys, because the terminal is gone.
    """

    def __init__(self, pressed: Callable[[str], None], resized: Callable[[], None], ended: Callable[[], None]) -> None:
        self._console = Console()
        self._live = Live(console=self._console, screen=True, auto_refresh=False)
        self._pressed, self._resized, self._ended = pressed, resized, ended
        self._loop = asyncio.get_running_loop()
        self._keys = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._before: list[Any] = []
        self._begun = ""

    def __enter__(self) -> Self:
        self._loop.add_signal_handler(signal.SIGWINCH, self._resized)
        if self._keys is not None:
            self._before = termios.tcgetattr(self._keys)
            tty.setcbreak(self._keys, termios.TCSANOW)
            changed = termios.tcgetattr(self._keys)
            changed[6][termios.VSUSP] = b"\0"  # Ctrl-Z would leave a stopped process with the terminal taken over.
            termios.tcsetattr(self._keys, termios.TCSANOW, changed)
            self._loop.add_reader(self._keys, self._read)
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._live.stop()
        finally:
            self._loop.remove_signal_handler(signal.SIGWINCH)
            if self._keys is not None:
                self._loop.remove_reader(self._keys)
                termios.tcsetattr(self._keys, termios.TCSAFLUSH, self._before)

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return self._console.width

    @property
    def height(self) -> int:
        """Lines of the terminal."""
        return self._console.height

    def draw(self, lines: Sequence[Sequence[Cell]]) -> None:
        """Show lines of cells, the cells of a line with two spaces between them."""
        self._live.update(styled(lines), refresh=True)

    def _read(self) -> None:
        assert self._keys is not None
        try:
            data = os.read(self._keys, 1024)
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._keys)
            self._ended()
        found, self._begun = keys(self._begun + data.decode(errors="replace"))
        for key in found:
            self._pressed(key)


def styled(lines: Sequence[Sequence[Cell]]) -> Text:
    """Lines of cells as rich's text. A line that is too long is cut."""
    text = Text(no_wrap=True, overflow="crop")
    for number, line in enumerate(lines):
        if number:
            text.append("\n")
        for at, cell in enumerate(line):
            if at:
                text.append("  ")
            text.append(cell.text, cell.style)
    return text

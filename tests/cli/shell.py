"""A program on a terminal that prints lines, as a person at the keyboard has it."""

from __future__ import annotations

import os
import pty
from collections.abc import Callable, Mapping


class Shell:
    """A process on a pseudo-terminal.

    Args:
        command: the program and its arguments.
        environment: its variables.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.execvpe(command[0], command, environment)
        self._text = ""

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._fd, keys.encode())

    def until(self, found: Callable[[str], bool]) -> str:
        """Read until `found` holds of the text since the last call; returns the text."""
        while not found(self._text):
            self._text += os.read(self._fd, 4096).decode(errors="replace")
        text, self._text = self._text, ""
        return text

    def line(self, *words: str) -> str:
        """Read lines until one has all these words; returns it."""
        while True:
            line, end, self._text = self._text.partition("\n")
            if not end:
                self._text = line + os.read(self._fd, 4096).decode()
            elif all(word in line.split() for word in words):
                return line.rstrip("\r")

    def end(self) -> tuple[int, str]:
        """Wait for the end; returns the exit status and what was printed since."""
        rest = self._text
        try:
            while more := os.read(self._fd, 4096):
                rest += more.decode(errors="replace")
        except OSError:  # Linux reports the end of a terminal so.
            pass
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1]), rest

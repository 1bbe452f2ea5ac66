"""A command in a terminal of its own: what its screen shows, and keys."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from typing import Any

from tests.cli.command import PROGRAMS, QUIET
from tests.guards.tree import SRC
from tests.timing import PATIENCE_S

HOME = b"\x1b[H"
"""Begins each picture of rich's `Live` on the alternate screen."""

ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"
"""Switch to the alternate screen, and back."""

_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """`trd` with a pseudo-terminal as its standard input and output.

    Args:
        arguments: of the command.
        columns, lines: the size of the terminal.
    """

    def __init__(self, *arguments: str, columns: int = 120, lines: int = 24) -> None:
        self._master, self._slave = os.openpty()
        self._set_size(columns, lines)
        self.before = self.modes()
        environment = {**os.environ, **QUIET, "PYTHONPATH": str(SRC), "PYTHONWARNINGS": "error", "TERM": "xterm"}
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "triton_distributed.cli.main", *arguments],
            stdin=self._slave,
            stdout=self._slave,
            stderr=subprocess.PIPE,
            cwd=PROGRAMS,
            env=environment,
            start_new_session=True,
        )
        self.output = b""
        self._shown = 0

    def modes(self) -> list[Any]:
        """The modes of the terminal."""
        return termios.tcgetattr(self._slave)

    def resize(self, columns: int, lines: int) -> None:
        """Change the size, as a user does who drags the window."""
        self._set_size(columns, lines)
        self.process.send_signal(signal.SIGWINCH)

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    @property
    def screen(self) -> list[str]:
        """The lines of the last complete picture, without the blanks at their ends."""
        pictures = self.output.split(HOME)
        text = _CONTROL.sub(b"", pictures[-2] if len(pictures) > 1 else b"").decode()
        return [line.rstrip() for line in text.replace("\r", "").split("\n")]

    def until(self, true: Callable[[list[str]], object]) -> list[str]:
        """Read until the screen is as it must become; returns its lines."""
        end = time.monotonic() + PATIENCE_S
        while not true(self.screen):
            assert self._read(end - time.monotonic()), f"the screen never became so: {self.screen}\n{self._said()}"
        return self.screen

    def shows(self, text: str) -> None:
        """Read until a command that writes line by line has written a text, after those that were waited for before."""
        end = time.monotonic() + PATIENCE_S
        while (at := self.output.find(text.encode(), self._shown)) < 0:
            assert self._read(end - time.monotonic()), f"{text!r} never came: {self.output!r}\n{self._said()}"
        self._shown = at + len(text)

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], min(0.1, max(0.0, seconds)))
        if ready:
            self.output += os.read(self._master, 65536)
        return seconds > 0 and self.process.poll() is None

    def end(self) -> tuple[int, str]:
        """Wait until it ends; returns its status and what it wrote to standard error."""
        end = time.monotonic() + PATIENCE_S
        while self._read(end - time.monotonic()):
            pass
        status = self.process.wait(PATIENCE_S)
        while select.select([self._master], [], [], 0)[0]:
            self.output += os.read(self._master, 65536)
        return status, self._said()

    def _said(self) -> str:
        if self.process.poll() is None:
            return ""
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        os.close(self._master)
        os.close(self._slave)

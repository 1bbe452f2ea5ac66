"""A page in headless Chromium, driven through its DevTools protocol over two pipes."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

from tests.timing import PATIENCE_S

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "no Chromium on PATH: nothing loads the page"

_THERE = 3, 4  # The descriptors that Chromium reads its commands from, and writes its answers to.


class Page:
    """A page, to be used from a thread other than that of the event loop that serves it.

    Args:
        url: what is loaded.
        profile: an empty folder.
    """

    def __init__(self, url: str, profile: Path) -> None:
        assert CHROMIUM is not None
        ends = [os.pipe(), os.pipe()]
        # Above all others, so that none of them is overwritten where they become 3 and 4.
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 64) for end in (ends[0][0], ends[1][1])]
        self._commands, self._answers = ends[0][1], ends[1][0]
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
        ]
        moved = " ".join(f"{there}{way}&{end}" for there, way, end in zip(_THERE, "<>", theirs, strict=True))
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" {moved}', CHROMIUM, *options, "about:blank"],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (ends[0][0], ends[1][1], *theirs):
            os.close(end)
        self._received, self._number = b"", 0
        target = self._ask("Target.createTarget", url=url)["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_S)
        os.close(self._commands)
        os.close(self._answers)

    def get(self, expression: str) -> Any:
        """The value of an expression in the page, as plain values; None if it cannot be evaluated yet."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        return None if "exceptionDetails" in answer else answer["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + PATIENCE_S
        while not self.get(expression):
            assert time.monotonic() < end, f"it never became so: {expression}\n{self.get('document.body.innerText')}"
            time.sleep(0.05)  # Between two questions, so that the page has the processor.

    def _ask(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        session = {"sessionId": self._session} if hasattr(self, "_session") else {}
        command = {"id": self._number, "method": method, "params": parameters, **session}
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = json.loads(self._message())
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def _message(self) -> bytes:
        while b"\0" not in self._received:
            assert select.select([self._answers], [], [], PATIENCE_S)[0], "Chromium does not answer"
            data = os.read(self._answers, 65536)
            assert data, "Chromium has ended"
            self._received += data
        found, _, self._received = self._received.partition(b"\0")
        return found

"""A journal of the requests that handlers began, in a file that outlives their process."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path


class FileJournal:
    """A journal that several processes write and that outlives them. Each request is one line, in one write at the end.

    The kernel holds the written data, so SIGKILL loses nothing. POSIX guarantees that writes with O_APPEND do not mix.

    Args:
        path: the file; it is made if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def began(self, request_id: int) -> None:
        os.write(self._fd, b"%d\n" % request_id)

    @staticmethod
    def read(path: Path) -> Counter[int]:
        """Return how often each request was begun; empty if there is no file."""
        return Counter(int(line) for line in path.read_text().split()) if path.exists() else Counter()

"""What handlers began, in a file that outlives them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path


class FileJournal:
    """A journal that several processes write and that outlives them: a line a request, in one write to its end.

    What was written is the kernel's, so SIGKILL loses nothing; POSIX has writes with O_APPEND never mix.

    Args:
        path: of the file; made where it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def began(self, request_id: int) -> None:
        os.write(self._fd, b"%d\n" % request_id)

    @staticmethod
    def read(path: Path) -> Counter[int]:
        """How often each request was begun; nothing where there is no file."""
        return Counter(int(line) for line in path.read_text().split()) if path.exists() else Counter()

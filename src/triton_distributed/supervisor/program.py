"""The command that runs this program again, as it was started."""

from __future__ import annotations

import os
import sys

from triton_distributed.supervisor import replica


def own_command() -> list[str]:
    """Return the command line of this program, with Python's own options.

    Raises:
        RuntimeError: the program was typed in or read from standard input, so it cannot run again.
    """
    main = sys.modules["__main__"]
    arguments = sys.orig_argv[1:]
    found = getattr(main, "__spec__", None) or os.path.isfile(getattr(main, "__file__", None) or "")
    if not found and "-c" not in arguments:
        raise RuntimeError(
            "each process runs this program again, and this program is not in a file: save it, or use "
            "`trd serve module --replicas N`"
        )
    return [sys.executable, *arguments]


def own_directory() -> str | None:
    """Return the directory in which the program was started; None if there is no such directory any more."""
    return replica.directory if replica.directory is not None and os.path.isdir(replica.directory) else None

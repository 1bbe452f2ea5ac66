"""Starts a program that the kernel ends together with its parent: `python launch.py PARENT COMMAND …`.

It is run by its path, without the package, so it starts in a few milliseconds; then the command replaces it. On systems
other than Linux the kernel does not end the program; there it ends with its control channel.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # See prctl(2). The setting survives execve(2).

if __name__ == "__main__":
    parent = int(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # The parent ended before the kernel began to watch it.
            sys.exit(f"the process that started this one, {parent}, is gone")
    os.execvp(sys.argv[2], sys.argv[2:])

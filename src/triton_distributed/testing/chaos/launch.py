"""Starts a program that the kernel ends together with its parent: `python launch.py COMMAND …`.

Run by its path, without the package: it starts in a few milliseconds and is gone when the command runs in its place.
Elsewhere than on Linux nothing ends the program; there it is the end of its control channel that tells it.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2); kept over execve(2)

if __name__ == "__main__":
    parent = int(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before it could be waited for
            sys.exit(f"the process that started this one, {parent}, is gone")
    os.execvp(sys.argv[2], sys.argv[2:])

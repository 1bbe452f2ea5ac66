"""Handles the signals that end a process, if the process has number 1: the first process of a container.

The kernel delivers a signal to process 1 only if the process has a handler for it. Containers are stopped with SIGTERM.
It has no effect on a Python program that has no handler yet, for example while the program imports, loads a model or
waits for a worker. Then the container runs for its whole grace period and is killed.

To use this module, import it. In process 1, on the main thread, each signal that still has its default action gets a
handler that ends the process. In other processes and threads, the import does nothing.
"""

from __future__ import annotations

import os
import signal
import threading
import time

ECHO_S = 0.02
"""Seconds in which a signal may arrive twice, because it was sent to the process and to its group."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

_asked: float | None = None  # When the first signal came.
_hooked = False
_masks: list[set[int] | set[signal.Signals]] = []  # The signal masks from before the forks under way.


class Ended(SystemExit):
    """A signal has asked this process to end. The exit status is 128 plus the signal's number."""


def take(pid: int | None = None) -> None:
    """Handle the signals that still have their default action, if this is process 1 and its main thread.

    Args:
        pid: the number of this process; by default the real one.
    """
    global _hooked
    if (os.getpid() if pid is None else pid) != 1 or threading.current_thread() is not threading.main_thread():
        return
    for each in SIGNALS:
        if signal.getsignal(each) is signal.SIG_DFL:
            signal.signal(each, end)
    if not _hooked:
        _hooked = True
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def end(number: int, frame: object) -> None:
    """Handle a signal: raise `Ended` in the main thread, so that `finally` blocks run. A second signal ends at once.

    Raises:
        Ended: at the first signal.
    """
    global _asked
    now = time.monotonic()
    if _asked is None:
        _asked = now
        raise Ended(128 + number)
    if now - _asked >= ECHO_S:
        os._exit(128 + number)


# A forked child is not process 1, so the default action works there. Until it is restored, signals to the child are
# blocked: the interpreter loses signals that arrive in the child's first moments.


def _before_fork() -> None:
    _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _after_fork_in_child() -> None:
    for each in SIGNALS:
        if signal.getsignal(each) is end:
            signal.signal(each, signal.SIG_DFL)
    _after_fork()


take()

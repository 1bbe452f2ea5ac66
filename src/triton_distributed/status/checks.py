"""Runs the program's health checks, each in a thread and with its time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from triton_distributed.status.loop import Loop, Stuck
from triton_distributed.status.port import HealthCheck


class CheckRuns:
    """The runs of the health checks. A check has at most one run at a time, so one that hangs costs one thread.

    Args:
        checks: the checks, by name; it may grow.
        loop: runs those that are async.
    """

    def __init__(self, checks: Mapping[str, HealthCheck], loop: Loop) -> None:
        self._checks, self._loop = checks, loop
        self._lock = threading.Lock()
        self._running: dict[str, _Run] = {}

    def failures(self, loop_turns: bool) -> dict[str, str]:
        """Run all checks at the same time.

        Args:
            loop_turns: False if it is known that the event loop is stuck: checks that need it have failed.

        Returns:
            by name, why a check has failed; empty text if it has not.
        """
        runs: dict[str, _Run | None] = {}
        with self._lock:
            for name, check in list(self._checks.items()):
                run = self._running.get(name)
                if (run is None or run.done.is_set()) and (loop_turns or not check.is_async):
                    run = self._running[name] = _Run(check, self._loop)
                runs[name] = run if loop_turns or not check.is_async else None
        return {name: "the event loop is stuck" if run is None else run.failure() for name, run in runs.items()}


class _Run:
    """One run of a check."""

    def __init__(self, check: HealthCheck, loop: Loop) -> None:
        self._check, self._loop = check, loop
        self._began_at = time.monotonic()
        self._failure = ""
        self.done = threading.Event()
        threading.Thread(target=self._run, name="triton-status-check", daemon=True).start()

    def _run(self) -> None:
        check = self._check
        try:
            if check.is_async:
                result = self._loop.run(check.function, check.timeout_s, check.context.copy())
            else:
                result = check.context.copy().run(check.function)
            self._failure = _failure(result)
        except Stuck as error:
            self._failure = str(error)
        except BaseException as error:  # E.g. SystemExit: a check that does not return has failed.
            self._failure = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        finally:
            self.done.set()

    def failure(self) -> str:
        """Wait for the end, at most until the time limit, and return why the check has failed."""
        left_s = self._began_at + self._check.timeout_s - time.monotonic()
        if self.done.wait(max(0.0, left_s)) or (self._check.is_async and self.done.wait(0.1)):
            return self._failure
        return f"it has not returned for {time.monotonic() - self._began_at:.1f} s"


def _failure(result: Any) -> str:
    if result is None or result is True:
        return ""
    if result is False:
        return "it returned False"
    return result if isinstance(result, str) else f"it returned {result!r}: must be None, True, False or text"

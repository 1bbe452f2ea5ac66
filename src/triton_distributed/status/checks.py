"""Runs the program's health checks, each in a thread and with its time limit."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from typing import Any

from triton_distributed.status.loop import Loop, Stuck
from triton_distributed.status.port import HealthCheck

POLL_S = 0.01
"""Seconds between two looks of the event loop at the checks that run."""


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
        runs = self._begun(loop_turns)
        return {name: "the event loop is stuck" if run is None else run.failure() for name, run in runs.items()}

    async def failures_soon(self, limit_s: float) -> dict[str, str]:
        """The same for the event loop itself, which must not wait in a thread.

        Args:
            limit_s: seconds to wait for the checks. One that then still has time has not failed.
        """
        runs = {name: run for name, run in self._begun(True).items() if run is not None}
        end = time.monotonic() + limit_s
        while (  # noqa: ASYNC110 - threads set these events
            time.monotonic() < end and not all(run.done.is_set() for run in runs.values())
        ):
            await asyncio.sleep(POLL_S)
        return {name: run.failure(wait=False) for name, run in runs.items()}

    def _begun(self, loop_turns: bool) -> dict[str, _Run | None]:
        runs: dict[str, _Run | None] = {}
        with self._lock:
            for name, check in list(self._checks.items()):
                run = self._running.get(name)
                if (run is None or run.done.is_set()) and (loop_turns or not check.is_async):
                    run = self._running[name] = _Run(check, self._loop)
                runs[name] = run if loop_turns or not check.is_async else None
        return runs


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

    def failure(self, *, wait: bool = True) -> str:
        """Return why the check has failed; empty if it has not.

        Args:
            wait: wait for its end, at most until its time limit. Otherwise a check that still has time has not failed.
        """
        left_s = self._began_at + self._check.timeout_s - time.monotonic()
        if self.done.wait(max(0.0, left_s) if wait else 0.0) or (wait and self._check.is_async and self.done.wait(0.1)):
            return self._failure
        if left_s > 0:
            return ""
        return f"it has not returned for {time.monotonic() - self._began_at:.1f} s"


def _failure(result: Any) -> str:
    if result is None or result is True:
        return ""
    if result is False:
        return "it returned False"
    return result if isinstance(result, str) else f"it returned {result!r}: must be None, True, False or text"

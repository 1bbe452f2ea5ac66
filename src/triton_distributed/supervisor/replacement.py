"""The replacement of replicas that run: by one with what is new, or of one that has served enough."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from functools import partial

from triton_distributed.supervisor.bell import Bell
from triton_distributed.supervisor.place import Place
from triton_distributed.supervisor.process import Process, described
from triton_distributed.supervisor.restarts import FIRST_S, Restarts

logger = logging.getLogger("triton_distributed.supervisor")


class Replacer:
    """Replaces one process after the other, as long as there is one to replace.

    First come the processes that are older than the last call of `outdate`, the oldest of them first, then those that
    have served enough requests. So at most one replica at a time has two processes, or none.

    Args:
        places: all replicas.
        bell: rings after each change of their state.
        stopping: set when all replicas are to end.
        start: starts a process for a place. It raises OSError.
        drain: lets a process end.
        say: writes a line to standard output.
        drain_first: a process drains before its successor starts.
        wait: the next process waits until the one before has drained.
    """

    def __init__(
        self,
        places: Sequence[Place],
        bell: Bell,
        stopping: asyncio.Event,
        start: Callable[[Place], Process],
        drain: Callable[[Process], None],
        say: Callable[[str], None],
        *,
        drain_first: bool,
        wait: bool,
    ) -> None:
        self._places, self._bell, self._stopping = places, bell, stopping
        self._start, self._drain, self._say = start, drain, say
        self._drain_first, self._wait = drain_first, wait
        self._outdated_at = 0.0  # Processes that were started before are replaced.

    def outdate(self, now: float, cause: str) -> None:
        """Let all processes be replaced. If they are being replaced already, that begins anew.

        Args:
            now: the time on the loop's clock.
            cause: begins the line that says so; "" for none.
        """
        self._tell(f"{cause}restarting {len(self._places)} replica(s), one after the other")
        self._outdated_at = now
        self._bell.ring()

    def _outdated(self) -> list[Place]:
        return [each for each in self._places if each.begun_at < self._outdated_at]

    async def run(self) -> None:
        """Replace processes until all replicas are to end."""
        failures = Restarts(random.random)
        while not self._stopping.is_set():
            since, outdated = self._outdated_at, self._outdated()
            worn = next((each for each in self._places if each.is_worn), None)
            if outdated:
                await self._roll(min(outdated, key=lambda place: place.begun_at), since)
            elif worn is None:
                await self._bell.until(
                    lambda: self._stopping.is_set() or self._outdated() or any(each.is_worn for each in self._places)
                )
            elif await self._replace_worn(worn, since):
                failures = Restarts(random.random)
            elif worn.is_worn and not self._interrupted(since):
                wait_s = failures.ended(0.0) or FIRST_S
                logger.error(
                    "replica %d has served its number of requests and could not be replaced; trying again in %.1f s",
                    worn.index,
                    wait_s,
                    extra=worn.field,
                )
                await self._bell.until(partial(self._interrupted, since), wait_s)

    async def _replace_worn(self, place: Place, since: float) -> bool:
        """Replace a process that has served its requests; return whether the place can be called."""
        if place.process is not None:
            words = "replica %d: process %d has served its requests and is replaced"
            logger.info(words, place.index, place.process.pid, extra=place.field)
        return await self._replace(place, since)

    def _tell(self, words: str) -> None:
        """Say something to the user, and log it: the log has the time."""
        self._say(words)
        logger.info(words)

    async def _roll(self, place: Place, since: float) -> None:
        """Replace one of the processes that are outdated. After a failure the others are left alone."""
        done = await self._replace(place, since)
        if self._interrupted(since):
            return
        if not done:
            self._outdated_at = 0.0
            logger.error(
                "the restart stops: replica %d has no new process that can be called; the other replicas continue",
                place.index,
                extra=place.field,
            )
        elif not self._outdated():
            self._tell(f"restarted: {len(self._places)} replica(s)")

    def _interrupted(self, since: float) -> bool:
        return self._stopping.is_set() or self._outdated_at != since

    async def _replace(self, place: Place, since: float) -> bool:
        """Give a place a new process; return whether it can be called."""
        old = place.process
        if old is not None and place.is_ready and not self._drain_first:
            return await self._succeed(place, old, since)
        place.settled = False
        if old is None:
            place.restarts = Restarts(random.random)  # What is new may have no fault.
            place.due = True
        else:
            place.asked = True
            self._drain(old)
        self._bell.ring()
        await self._bell.until(lambda: place.settled or self._interrupted(since))
        return place.is_ready

    async def _succeed(self, place: Place, old: Process, since: float) -> bool:
        """Start the successor of a process that serves, and let the process drain when the successor can be called."""
        try:
            new = place.successor = self._start(place)
        except OSError as error:
            logger.warning(
                "replica %d: no successor can be started: %s; process %d goes on",
                place.index,
                error,
                old.pid,
                extra=place.field,
            )
            return False
        await self._bell.until(lambda: new.is_ready or new.is_over or self._interrupted(since))
        if place.process is new:  # The old process has ended meanwhile.
            await self._bell.until(lambda: place.settled or self._interrupted(since))
            return place.is_ready
        if new.is_ready and not self._stopping.is_set():
            place.take(new)
            self._drain(old)
            self._bell.ring()
            if self._wait:
                await self._bell.until(lambda: old.is_over or self._stopping.is_set())
            return True
        place.successor = None
        self._drain(new)
        await self._bell.until(lambda: new.is_over or self._stopping.is_set())
        if not self._interrupted(since):
            logger.warning(
                "replica %d: its successor, process %d, ended %s; process %d %s",
                place.index,
                new.pid,
                described(new.status or 0),
                old.pid,
                "has ended, too" if old.is_over else "goes on",
                extra=place.field,
            )
        return False

"""Which instances of the wanted endpoints live in a folder, as far as it has been looked at."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from triton_distributed.discovery import record
from triton_distributed.discovery.base import Added, Removed, same
from triton_distributed.discovery.file.lockfile import TEMPORARY, Signature, State, read_record, sweep_temporary
from triton_distributed.discovery.watchers import Watchers
from triton_distributed.names import EndpointName, Instance
from triton_distributed.quiet import Quiet

_log = logging.getLogger("triton_distributed.discovery")

_MAX_WARNED = 1024
"""Files that were warned about and are remembered. Beyond that, the oldest may be warned about again."""


@dataclass(frozen=True, slots=True)
class _Known:
    instance: Instance
    signature: Signature


class KnownInstances:
    """Compares single files with what is known about them, and tells the watches what has changed.

    Args:
        folder: where the records lie.
        watchers: notified of changes.
        complain: takes a text about what concerns the place and not one file.
    """

    def __init__(self, folder: str, watchers: Watchers, complain: Callable[[str], None]) -> None:
        self._folder = folder
        self._watchers = watchers
        self._complain = complain
        # Prefixes of the endpoints that are watched or registered here, None for all; how many want each.
        self._wanted: Counter[str | None] = Counter()
        # As many as there are locked files, and so live instances, of the wanted endpoints: the dead are removed.
        self._known: dict[str, _Known] = {}
        self._warned = Quiet(most=_MAX_WARNED)  # by key

    def __len__(self) -> int:
        return len(self._known)

    @property
    def keys(self) -> Iterable[str]:
        """Under which something is known, or was warned about."""
        return (*self._known, *map(str, self._warned))

    @property
    def instances(self) -> list[Instance]:
        return [each.instance for each in self._known.values()]

    def want(self, endpoint: EndpointName | None) -> None:
        """From now on keep this endpoint's instances, None for every one's. Each call has its `unwant`."""
        self._wanted[_prefix(endpoint)] += 1

    def unwant(self, endpoint: EndpointName | None) -> None:
        prefix = _prefix(endpoint)
        self._wanted[prefix] -= 1
        if not self._wanted[prefix]:
            del self._wanted[prefix]
            if None not in self._wanted:
                self._known = {key: each for key, each in self._known.items() if record.prefix_of(key) in self._wanted}

    def look(self, key: str, *, clean_all: bool = False) -> State | None:
        """Look at one file now.

        Args:
            clean_all: also at one of an endpoint that is not wanted, only to remove it if its owner is dead.

        Returns:
            What was found; None where that does not matter here.
        """
        prefix = record.prefix_of(key)
        if prefix is None:
            self._look_at_other_file(key)
            return None
        if prefix not in self._wanted and None not in self._wanted:
            if clean_all:
                read_record(self._folder, key)
            return None
        known = self._known.get(key)
        reading = read_record(self._folder, key, known.signature if known else None)
        if reading.state is State.UNKNOWN:  # what is known stays until the next look
            self._complain(f"a record could not be looked at: {reading.reason}")
            return reading.state
        if reading.state is State.BAD:
            self._warn(key, reading.reason)
        else:
            self._warned.forget(key)
        if reading.state is State.HELD:
            if reading.instance is not None:
                self._known[key] = _Known(reading.instance, reading.signature)
                if known is None or not same(known.instance, reading.instance):
                    self._watchers.publish(Added(reading.instance))
        elif known is not None:
            del self._known[key]
            self._watchers.publish(Removed(known.instance.endpoint, known.instance.id))
        return reading.state

    def clear(self) -> None:
        self._known.clear()

    def _look_at_other_file(self, name: str) -> None:
        """A file whose name is not a record's."""
        path = os.path.join(self._folder, name)
        if name.startswith("."):
            if name.endswith(TEMPORARY):
                sweep_temporary(path)
        elif os.path.lexists(path):
            self._warn(name, "its name is not a record's")
        else:
            self._warned.forget(name)

    def _warn(self, key: str, reason: str) -> None:
        """Say once that a file is skipped, however often it changes, until it is right or gone."""
        if self._warned.due(key) is not None:
            _log.warning("record %s is skipped: %s", os.path.join(self._folder, key), reason)


def _prefix(endpoint: EndpointName | None) -> str | None:
    return None if endpoint is None else record.prefix(endpoint)

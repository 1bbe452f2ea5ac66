"""The known live instances of the wanted endpoints in a folder."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable

import msgspec

from triton_distributed.discovery import record
from triton_distributed.discovery.base import Added, Removed, same
from triton_distributed.discovery.file.lockfile import TEMPORARY, Signature, State, read_record, sweep_temporary
from triton_distributed.discovery.watchers import Watchers
from triton_distributed.names import EndpointName, Instance
from triton_distributed.quiet import Quiet

_log = logging.getLogger("triton_distributed.discovery")

_MAX_WARNED = 1024
"""Most files remembered because a warning was logged. Beyond that, the oldest may be warned about again."""


class _Known(msgspec.Struct, frozen=True):
    instance: Instance
    signature: Signature


class KnownInstances:
    """Compares single files with the known state, and notifies the watches of changes.

    Args:
        folder: the folder of the records.
        watchers: the watches to notify of changes.
        complain: takes the text of a problem that concerns the folder and not a single file.
    """

    def __init__(self, folder: str, watchers: Watchers, complain: Callable[[str], None]) -> None:
        self._folder = folder
        self._watchers = watchers
        self._complain = complain
        # Number of users of each watched or registered endpoint, by prefix; None stands for all endpoints.
        self._wanted: Counter[str | None] = Counter()
        # One entry for each locked file, and so each live instance, of the wanted endpoints. Dead ones are removed.
        self._known: dict[str, _Known] = {}
        self._warned = Quiet(most=_MAX_WARNED)  # The keys that a warning was logged for.

    def __len__(self) -> int:
        return len(self._known)

    @property
    def keys(self) -> Iterable[str]:
        """The keys of known instances, and of files that a warning was logged for."""
        return (*self._known, *map(str, self._warned))

    @property
    def instances(self) -> list[Instance]:
        return [each.instance for each in self._known.values()]

    def want(self, endpoint: EndpointName | None) -> None:
        """Keep this endpoint's instances from now on; None for all endpoints. Each call needs one `unwant`."""
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
            clean_all: also look at a file of an endpoint that is not wanted, to remove it if its owner is dead.

        Returns:
            The state of the file; None if its endpoint is not wanted or its name is not a record's.
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
        if reading.state is State.UNKNOWN:  # Keep the known state until the next look.
            self._complain(f"a record cannot be read now: {reading.reason}")
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
        """Look at a file whose name is not a record's."""
        path = os.path.join(self._folder, name)
        if name.startswith("."):
            if name.endswith(TEMPORARY):
                sweep_temporary(path)
        elif os.path.lexists(path):
            self._warn(name, "its name is not a record's")
        else:
            self._warned.forget(name)

    def _warn(self, key: str, reason: str) -> None:
        """Log once that a file is skipped, however often it changes, until it is valid or gone."""
        if self._warned.due(key) is not None:
            _log.warning("record %s is skipped: %s", os.path.join(self._folder, key), reason)


def _prefix(endpoint: EndpointName | None) -> str | None:
    return None if endpoint is None else record.prefix(endpoint)

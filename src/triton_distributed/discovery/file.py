"""Discovery on one machine with nothing to set up: a private folder with one small file an instance.

Liveness is the kernel's word, not a clock's. The owner holds its record open for writing and locked. When it dies, in
whatever way, the kernel closes the file; whoever watches the folder hears of that through inotify, finds the lock free,
and deletes the record. A process that is stopped keeps its lock and its registration.

The folder must be on a local file system: neither locks nor inotify tell the truth across a network one.

Every operation is a handful of system calls on a local disk, some microseconds, so they are made on the event loop; a
folder of thousands of records is read in slices between which the loop turns.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from triton_distributed.discovery.base import Added, Removed, Sink, Watch, same
from triton_distributed.discovery.folder import BACKEND, discovery_error, private_folder
from triton_distributed.discovery.held import HeldRecord
from triton_distributed.discovery.inotify import IN_DELETE_SELF, IN_IGNORED, IN_MOVE_SELF, IN_Q_OVERFLOW, Inotify
from triton_distributed.discovery.reader import RecordReader
from triton_distributed.discovery.record import BadRecord, prefix_of
from triton_distributed.discovery.record import key as key_of
from triton_distributed.discovery.watchers import Watchers
from triton_distributed.errors import DiscoveryError
from triton_distributed.names import EndpointName, Instance

_log = logging.getLogger("triton_distributed.discovery")

POLL_S = 1.0  # how long a death may go unseen where there is no inotify
CHECK_S = 5.0  # how often everything is looked at although inotify works: what cleaners and people do to the folder
SLICE = 128  # records read, about a millisecond, before the loop turns
_REREAD = IN_Q_OVERFLOW | IN_DELETE_SELF | IN_MOVE_SELF | IN_IGNORED


class FileDiscovery:
    """Registers and watches instances in a folder.

    Args:
        directory: made with mode 0700 where it is missing; one that others may enter is refused.
        poll_s: seconds between two looks at the folder where there is no inotify.
        check_s: seconds between two where there is.

    Raises, from every operation:
        DiscoveryError: the folder is not private or cannot be used; the text says why and what helps.
    """

    def __init__(self, directory: Path | str, *, poll_s: float = POLL_S, check_s: float = CHECK_S) -> None:
        self._directory = os.path.abspath(directory)
        self._folder = os.path.join(self._directory, "instances")
        self.where = f"file://{self._directory}"
        self._poll_s = poll_s
        self._check_s = check_s
        self._held: dict[str, HeldRecord] = {}  # what we registered
        self._known: dict[str, Instance] = {}  # what lives, ours included, while somebody watches
        self._reader = RecordReader(self._folder, self.where)
        self._watchers = Watchers()
        self._inotify: Inotify | None = None
        self._identity: tuple[int, int] | None = None  # of the folder that was last opened
        self._timer: asyncio.TimerHandle | None = None
        self._reading: asyncio.Task[None] | None = None
        self._watching = False
        self._again = False
        self._closed = False

    def __repr__(self) -> str:
        how = "inotify" if self._inotify else "polling" if self._watching else "not watching"
        return f"<FileDiscovery {self.where}, {len(self._held)} held, {len(self._known)} known, {how}>"

    async def register(self, instance: Instance) -> None:
        self._open()
        self._hold(instance)
        self._schedule()
        if self._watching:
            self._look(key_of(instance.endpoint, instance.id))

    def _hold(self, instance: Instance) -> None:
        try:
            held = HeldRecord(self._folder, instance)
        except OSError as error:
            raise discovery_error(self.where, "write a record in", error) from error
        except BadRecord as error:
            raise DiscoveryError(BACKEND, self.where, str(error)) from error
        before = self._held.get(held.key)
        self._held[held.key] = held
        if before is not None:
            before.release()

    async def withdraw(self, instance: Instance) -> None:
        held = self._held.pop(key_of(instance.endpoint, instance.id), None)
        if held is not None:
            held.remove()
            if self._watching:
                self._look(held.key)

    async def watch(self, endpoint: EndpointName | None, sink: Sink) -> Watch:
        self._open()
        if not self._watching:
            self._watching = True
            self._start_inotify()
            self._read_later()
        self._schedule()
        while self._reading is not None:
            await asyncio.shield(self._reading)
        if self._closed:
            raise DiscoveryError(BACKEND, self.where, "it was closed")
        return self._watchers.add(endpoint, sink, self._known.values())

    async def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        self._stop_inotify()
        self._watchers.close()
        held, self._held = self._held, {}
        for each in held.values():
            each.remove()
        self._known.clear()

    def _open(self) -> None:
        """Make or check the folders."""
        if self._closed:
            raise DiscoveryError(BACKEND, self.where, "it was closed")
        private_folder(self._directory, self.where)
        self._identity = private_folder(self._folder, self.where)

    # what the kernel says

    def _start_inotify(self) -> None:
        inotify: Inotify | None = None
        try:
            inotify = Inotify()
            inotify.watch_folder(self._folder)
            asyncio.get_running_loop().add_reader(inotify.fd, self._notified)
        except (OSError, NotImplementedError) as error:
            if inotify is not None:
                inotify.close()
            _log.info("%s: no inotify (%s), the folder is read every %g s", self.where, error, self._poll_s)
            return
        self._inotify = inotify

    def _stop_inotify(self) -> None:
        inotify, self._inotify = self._inotify, None
        if inotify is not None:
            asyncio.get_running_loop().remove_reader(inotify.fd)
            inotify.close()

    def _notified(self) -> None:
        if self._inotify is None:
            return
        try:
            names, masks = self._inotify.read()
        except OSError as error:
            _log.warning("%s: inotify failed (%s), the folder is read every %g s", self.where, error, self._poll_s)
            self._stop_inotify()
            names, masks = set(), IN_Q_OVERFLOW
        if masks & _REREAD:
            self._read_later()
        for name in names:
            key = os.fsdecode(name)
            if prefix_of(key) is not None:
                self._look(key)

    # what the folder says

    def _look(self, key: str) -> None:
        """Bring what is known under this key up to date."""
        held = self._held.get(key)
        if held is not None and not held.in_place:
            self._restore(held)
        try:
            now = self._reader.read(key)
        except OSError as error:  # e.g. no file descriptor is left: what is known stays until the next look
            _log.warning("%s: record %s could not be read: %s", self.where, key, error)
            return
        before = self._known.get(key)
        if now is None:
            if before is not None:
                del self._known[key]
                self._watchers.publish(Removed(before.endpoint, before.id))
        elif before is None or not same(before, now):
            self._known[key] = now
            self._watchers.publish(Added(now))

    def _restore(self, held: HeldRecord) -> None:
        """Somebody deleted our record, or the folder: we still live."""
        try:
            self._open()
            self._hold(held.instance)
        except DiscoveryError as error:
            _log.warning("%s: the record of %s was deleted and cannot be restored: %s", self.where, held.key, error)
        else:
            _log.warning("%s: the record of %s was deleted by somebody and is restored", self.where, held.key)

    def _read_later(self) -> None:
        if self._reading is not None:
            self._again = True
        elif not self._closed:
            self._reading = asyncio.get_running_loop().create_task(self._read_all())
            self._reading.add_done_callback(self._read)

    def _read(self, task: asyncio.Task[None]) -> None:
        self._reading = None
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("%s: the folder could not be read: %s", self.where, error)
        if self._again and not self._closed:
            self._again = False
            self._read_later()

    async def _read_all(self) -> None:
        """Look at every record, and at every one that was known."""
        for held in list(self._held.values()):
            if not held.in_place:
                self._restore(held)
        if not self._watching:
            return
        before = self._identity
        self._open()
        if self._inotify is not None and self._identity != before:
            self._stop_inotify()
            self._start_inotify()
        names = os.listdir(self._folder)
        for number, name in enumerate(dict.fromkeys((*names, *self._known))):
            if prefix_of(name) is not None:
                self._look(name)
            elif name.endswith(".tmp"):
                self._reader.remove_temporary(name)
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)

    def _schedule(self) -> None:
        """Look at everything again after a while."""
        if self._closed:
            return
        if self._timer is not None:
            self._timer.cancel()
        polling = self._watching and self._inotify is None
        self._timer = asyncio.get_running_loop().call_later(self._poll_s if polling else self._check_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._read_later()
        self._schedule()

"""Discovery through one private folder: the default, for any number of processes of one user on one machine.

`DIRECTORY/instances/` holds one small file for each instance, named after its endpoint and id. Its owner keeps the file
open and locked. Every discovery has one inotify instance on the folder, and looks at a file when the kernel names it.
Each event of a file ends in `_look`, which compares the file with the known state, so a lost, repeated or late event
does no harm: a patrol looks at all files again every few seconds, and more often without inotify.

Any process that looks at a dead instance's file deletes it. Each process looks at all files once, and afterwards only
at files of the endpoints that it watches or serves.

Network file systems are not supported: they report no events, and some of them no locks.

Files are opened on the event loop. This takes about 10 µs each on a local file system, less than a hand-over to a
thread, and long scans let other callbacks run in between. Own records are touched every hour, so that cleaners of
temporary folders never find them old. A record that is deleted nevertheless is written again soon, but not at once:
otherwise a removal of the whole folder would fail, because the folder would not be empty.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
import time

from triton_distributed.discovery import record
from triton_distributed.discovery.base import Sink, Watch
from triton_distributed.discovery.file.known import KnownInstances
from triton_distributed.discovery.file.lockfile import HeldRecord, State
from triton_distributed.discovery.watchers import Watcher, Watchers
from triton_distributed.errors import DiscoveryError
from triton_distributed.names import EndpointName, Instance
from triton_distributed.quiet import Quiet
from triton_distributed.system import inotify
from triton_distributed.system.fork import watch_forks
from triton_distributed.system.private_folder import BACKEND, discovery_error, keep_private, private_folder

_log = logging.getLogger("triton_distributed.discovery")

POLL_S = 0.5
"""Seconds between looks at all files without inotify, to notice deaths. A look at 64 files takes 0.5 ms."""

CHECK_S = 5.0
"""Seconds between looks at all files with inotify. They find changes that the kernel did not report, which is rare."""

SETTLE_S = 0.6
"""Seconds before a deleted record is written again. By then a removal of the folder is over, and sockets are back."""

_SLICE = 128
"""Files examined before other callbacks of the loop run: 1 to 2 ms."""

_TOUCH_S = 3600.0
"""Seconds between updates of own records' file times. The strictest cleaners remove files that are a day old."""

# Seconds before each further look at a closed file that is still locked. Linux announces a file's last close just
# before it drops the lock (`__fput`): 0.12 ms at most in 60 tries, longer if the dying process is preempted between the
# two. After these looks the patrol takes over.
_LOOK_AGAIN_S = (0.001, 0.02, 0.2, 0.7)

_FOLDER_GONE = inotify.IN_DELETE_SELF | inotify.IN_IGNORED
_FOLDER_CHANGED = inotify.IN_DELETE_SELF | inotify.IN_MOVE_SELF | inotify.IN_IGNORED | inotify.IN_Q_OVERFLOW


class FileDiscovery:
    """Registers instances as files in a folder that is private to the user.

    Args:
        directory: the private folder. It is made with mode 0700 if missing, and refused if another user owns it or has
            access to it.
        poll_s: seconds between two looks at all files without inotify.
        check_s: seconds between two looks at all files with inotify.

    Attributes:
        answers, answered_at: see `Answering`; with inotify the folder answers at each event, else at each look.
    """

    def __init__(self, directory: str | os.PathLike[str], *, poll_s: float = POLL_S, check_s: float = CHECK_S) -> None:
        self._directory = os.path.abspath(directory)
        self._folder = os.path.join(self._directory, "instances")
        self.where = f"file://{self._directory}"
        self._poll_s, self._check_s = poll_s, check_s
        self._use_inotify = True
        self._notifier: inotify.Inotify | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._identity: tuple[int, int] | None = None
        self._made = False  # The folder existed and was private once, so later problems with it can be repaired.
        self._patrol: asyncio.Task[None] | None = None
        self._patrol_now = asyncio.Event()
        self._closed = False
        self._troubles = Quiet()  # Problems that were logged and still exist.
        self._troubled = False  # A problem occurred since the patrol's present round began.
        self._looked_at_all = False
        self.answers, self.answered_at = True, 0.0
        self._watchers = Watchers()
        self._known = KnownInstances(self._folder, self._watchers, self._complain)
        # Held during each change of `_held`, because `mark` is called from another thread. The holder writes at most
        # one small file, so the loop waits no longer than that.
        self._owning = threading.Lock()
        self._held: dict[str, HeldRecord] = {}
        self._look_again: dict[str, asyncio.TimerHandle] = {}
        self._restoring: dict[str, asyncio.TimerHandle] = {}  # Own records that are missing.
        watch_forks(self)

    def __repr__(self) -> str:
        how = "closed" if self._closed else "inotify" if self._notifier else "polling" if self._patrol else "idle"
        return f"<FileDiscovery {self.where} {how} held={len(self._held)} known={len(self._known)}>"

    # --- the protocol ------------------------------------------------------------------------------------------------

    async def register(self, instance: Instance) -> None:
        self._start()
        try:
            data = record.encode(instance, os.getpid())
        except record.BadRecord as error:
            raise DiscoveryError(BACKEND, self.where, f"cannot register {instance.endpoint}: {error}") from error
        key = record.key(instance.endpoint, instance.id)
        with self._owning:
            held = self._write(key, data)
            replaced, self._held[key] = self._held.get(key), held
        if replaced is None:
            self._known.want(instance.endpoint)
        else:
            replaced.release()
        self._look(key)

    async def withdraw(self, instance: Instance) -> None:
        key = record.key(instance.endpoint, instance.id)
        with self._owning:
            held = self._held.pop(key, None)
        if held is None:
            return
        held.withdraw()
        self._look(key)
        self._known.unwant(instance.endpoint)

    def mark(self, instance: Instance, busy: bool) -> None:
        key = record.key(instance.endpoint, instance.id)
        with self._owning:
            held = self._held.get(key)
            if held is None or self._closed:
                return
            data = record.marked(held.data, busy, os.getpid())
            if data == held.data or self._in_place(held) is None:
                return
            # As in a second registration, the new record is locked before it replaces the old one, so no process ever
            # sees an unlocked record. The kernel notifies the watchers.
            self._held[key] = self._write(key, data)
            held.release()

    async def watch(self, endpoint: EndpointName | None, sink: Sink) -> Watch:
        self._start()
        # The endpoint is wanted before the scan, so a change during the scan is seen by an event or by the scan.
        self._known.want(endpoint)
        try:
            await self._scan(endpoint)
            self._check_open()
        except BaseException:
            self._known.unwant(endpoint)
            raise

        def closed(_: Watcher) -> None:
            self._known.unwant(endpoint)

        return self._watchers.add(endpoint, sink, self._known.instances, closed)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._watchers.close()
            with self._owning:
                for held in self._held.values():
                    held.withdraw()
                self._held.clear()
            self._known.clear()
            for handle in (*self._look_again.values(), *self._restoring.values()):
                handle.cancel()
            self._look_again.clear()
            self._restoring.clear()
            self._stop_listening()
        patrol, self._patrol = self._patrol, None
        if patrol is not None:
            patrol.cancel()
            await asyncio.wait([patrol])

    # --- start and fork ----------------------------------------------------------------------------------------------

    def forked(self) -> None:
        """Release the parent's resources in a forked child process. The child's copy counts as closed.

        The parent's loop is not touched, since the child shares its poll set until it makes its own.
        """
        self._closed = True
        self._owning = threading.Lock()  # A thread of the parent, which the child lacks, may hold the old lock.
        for held in self._held.values():
            held.release()
        self._held.clear()
        self._patrol = None
        self._look_again.clear()
        self._restoring.clear()
        notifier, self._notifier = self._notifier, None
        if notifier is not None:
            notifier.close()

    def _check_open(self) -> None:
        if self._closed:
            raise DiscoveryError(BACKEND, self.where, "it was closed, or belongs to a process that forked this one")

    def _start(self) -> None:
        """Make sure that the folder exists, its events are reported and the patrol runs."""
        self._check_open()
        self._loop = asyncio.get_running_loop()
        identity = self._make_folders()
        moved, self._identity = identity != self._identity, identity
        if self._use_inotify and (self._notifier is None or moved):
            self._listen()
        if self._patrol is None:
            self._patrol = self._loop.create_task(self._patrol_forever(), name=f"patrol of {self.where}")

    def _make_folders(self) -> tuple[int, int]:
        """Make or check the folder of the records. Return its identity: device and inode.

        Raises:
            DiscoveryError: the folder cannot be made, or is not private.
        """
        private_folder(self._directory, self.where)
        if self._made:
            keep_private(self._folder)
        identity = private_folder(self._folder, self.where)
        self._made = True
        return identity

    def _listen(self) -> None:
        assert self._loop is not None
        listened = self._notifier is not None
        try:
            if self._notifier is None:
                notifier = inotify.Inotify()
                self._notifier = notifier
                self._loop.add_reader(notifier.fd, self._on_events)
            self._notifier.watch_folder(self._folder)
            self._patrol_now.set()  # Earlier changes are not reported.
        except OSError as error:
            self._stop_listening()
            if listened:
                self._patrol_now.set()  # The patrol must use the shorter interval from now on.
            if error.errno == errno.ENOSYS:
                self._use_inotify = False  # This system has no inotify.
                _log.info("%s: %s, looking every %g s instead", self.where, error.strerror, self._poll_s)
            else:  # The patrol tries again.
                self._complain(
                    f"no inotify ({error.strerror}), looking every {self._poll_s:g} s instead: raise "
                    "fs.inotify.max_user_instances and fs.inotify.max_user_watches"
                )

    def _stop_listening(self) -> None:
        notifier, self._notifier = self._notifier, None
        if notifier is not None:
            assert self._loop is not None
            self._loop.remove_reader(notifier.fd)
            notifier.close()

    # --- events of the folder ----------------------------------------------------------------------------------------

    def _on_events(self) -> None:
        assert self._notifier is not None
        try:
            names, folder = self._notifier.read()
            self.answered_at = time.monotonic()
        except OSError as error:
            self._stop_listening()
            self._complain(f"inotify failed ({error.strerror}), looking every {self._poll_s:g} s instead")
            self._patrol_now.set()
            return
        for key, mask in names.items():
            state = self._look(key)
            closed = mask & inotify.IN_CLOSE_WRITE and key not in self._held
            if state is State.UNKNOWN or (state is State.HELD and closed):
                self._look_later(key, 0)
        if folder & _FOLDER_CHANGED:
            self._patrol_now.set()
        if folder & _FOLDER_GONE:
            self._identity = None  # A new folder may get the inode number of the old one.

    def _look_later(self, key: str, attempt: int) -> None:
        def again() -> None:
            self._look_again.pop(key, None)
            if self._look(key) in (State.HELD, State.UNKNOWN) and attempt + 1 < len(_LOOK_AGAIN_S):
                self._look_later(key, attempt + 1)

        assert self._loop is not None
        if (pending := self._look_again.pop(key, None)) is not None:
            pending.cancel()
        self._look_again[key] = self._loop.call_later(_LOOK_AGAIN_S[attempt], again)

    def _look(self, key: str) -> State | None:
        """Compare one file with its known state, and notify the watches of a change."""
        if self._closed:
            return None
        held = self._held.get(key)
        state = self._known.look(key, clean_all=not self._looked_at_all)
        if held is None:
            return state
        if state is State.MISSING:
            self._restore_later(key)
        elif state in (State.DEAD, State.BAD):  # The record was overwritten or replaced by another file.
            self._restore(key, held)
            state = self._known.look(key)
        return state

    def _restore_later(self, key: str) -> None:
        def restore() -> None:
            del self._restoring[key]
            held = self._held.get(key)
            if held is not None and self._in_place(held) is False:
                self._restore(key, held)
                self._known.look(key)

        if key not in self._restoring:
            assert self._loop is not None
            self._restoring[key] = self._loop.call_later(SETTLE_S, restore)

    def _complain(self, text: str) -> None:
        """Log a lasting problem once, until the patrol finds no problem."""
        self._troubled = True
        if self._troubles.due(text) is not None:
            _log.warning("%s: %s", self.where, text)

    # --- own records -------------------------------------------------------------------------------------------------

    def _write(self, key: str, data: bytes) -> HeldRecord:
        try:
            return HeldRecord(self._folder, key, data)
        except OSError as error:
            # The text leaves out the temporary name, which means nothing to users.
            bare = OSError(error.errno, error.strerror)
            raise discovery_error(self.where, f"write a record in {self._folder}", bare) from error

    def _in_place(self, held: HeldRecord) -> bool | None:
        try:
            return held.in_place()
        except OSError as error:
            self._complain(f"an own record cannot be read now: {error.strerror}")
            return None

    def _restore(self, key: str, held: HeldRecord) -> None:
        """Write a deleted or damaged own record again.

        A record that another live owner has replaced is left alone: the last one counts. If the folder is gone too, it
        is made again, and the patrol then listens to the new folder.
        """
        try:
            self._make_folders()
            with self._owning:
                if self._held.get(key) is not held:
                    return  # `mark` has just written it.
                self._held[key] = self._write(key, held.data)
        except DiscoveryError as error:
            self._complain(f"a record was deleted and cannot be written again yet: {error}")
            return
        held.release()
        _log.info("record %s was deleted and has been written again", held.path)

    # --- the patrol --------------------------------------------------------------------------------------------------

    async def _patrol_forever(self) -> None:
        loop = asyncio.get_running_loop()
        touched = loop.time()
        while True:
            try:
                async with asyncio.timeout(self._check_s if self._notifier else self._poll_s):
                    await self._patrol_now.wait()
            except TimeoutError:
                pass
            if not self._folder_is_there():
                await asyncio.sleep(SETTLE_S)
            self._patrol_now.clear()
            self._troubled = False
            try:
                self._start()  # The folder may have been deleted or moved, or an inotify instance has become free.
                await self._scan(None)
                self._looked_at_all = True
                if loop.time() - touched > _TOUCH_S:
                    touched = loop.time()
                    with self._owning:
                        for held in self._held.values():
                            held.touch()
            except (DiscoveryError, OSError) as error:
                self.answers = False
                self._complain(str(error))  # The known state stays, and the next round tries again.
            if not self._troubled and not self._restoring:
                self._troubles.clear()

    def _folder_is_there(self) -> bool:
        try:
            found = os.stat(self._folder)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    async def _scan(self, endpoint: EndpointName | None) -> None:
        """Look at every file, every own record and every known instance, whether its file exists or not.

        Args:
            endpoint: look only at this endpoint's files; None for all.
        """
        try:
            names = set(os.listdir(self._folder))
        except OSError as error:
            self.answers = False
            raise discovery_error(self.where, "list", error) from error
        self.answers, self.answered_at = True, time.monotonic()
        names.update(self._known.keys, self._held)
        if endpoint is not None:
            prefix = record.prefix(endpoint)
            names = {each for each in names if record.prefix_of(each) == prefix}
        for count, name in enumerate(names, 1):
            if count % _SLICE == 0:
                await asyncio.sleep(0)
            self._look(name)

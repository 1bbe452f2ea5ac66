"""Events between the processes of one user on one machine, over Unix sockets; nothing else has to run.

A process with subscriptions listens on one socket in the private folder; publishers connect to it and write. What does
not fit is dropped at the publisher, the oldest first, and the next event says how many: a subscriber that is stopped
or busy delays no publisher. A process that finds a socket that refuses connections removes it: its owner is dead.
A process with subscriptions checks its own files every second, and makes removed ones again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triton_distributed.errors import BrokerError, DecodeError, RuntimeClosed, TritonError
from triton_distributed.events.base import unread
from triton_distributed.events.folder import SubscriberFolder
from triton_distributed.events.inbox import MAX_BYTES, MAX_EVENTS, Inbox
from triton_distributed.events.link import SEND_BUFFER, FrameReader, Link
from triton_distributed.events.subscribers import Subscribers
from triton_distributed.events.subscription import Subscription
from triton_distributed.quiet import Quiet
from triton_distributed.system import unix_sockets
from triton_distributed.system.fork import own
from triton_distributed.system.private_folder import keep_private, private_folder

logger = logging.getLogger("triton_distributed.events")

LAST_WORDS_S = 1.0
"""Seconds that a publisher that closes waits for slow subscribers."""

CHECK_S = 1.0
"""Seconds between checks whether our files were removed."""

RETRY_S = 5.0
"""Seconds between two attempts to make them again, where that fails."""

SETTLE_S = 0.3
"""Seconds before they are made again: a new file would make the removal of a folder fail, and by then it is over."""


class LocalEvents:
    """Carries events between all processes that use the same folder.

    Args:
        directory: the private folder, in which `events` is made.
        id: of this process's runtime, 0 < id < 2^63.
        max_message_bytes: of an event that arrives.
        check_s: seconds between looks at the own files.
    """

    def __init__(
        self,
        directory: Path,
        *,
        id: int,
        max_message_bytes: int,
        check_s: float = CHECK_S,
    ) -> None:
        self._directory = directory.absolute()
        self._folder = SubscriberFolder(self._directory / "events", self._make_folder)
        self.where = f"local events in {self._folder.path}"
        self._id = f"{id:016x}"
        self._max_message_bytes = max_message_bytes
        self._check_s = check_s
        self._own = Subscribers()
        self._links: dict[str, Link] = {}  # by process; those that are gone are closed when the folder is read
        self._incoming: set[_Incoming] = set()  # one a publishing process
        self._server: tuple[asyncio.AbstractServer, int] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._restoring: asyncio.Task[None] | None = None
        self._making = asyncio.Lock()
        self._opening: set[asyncio.Task[None]] = set()
        self._check: asyncio.TimerHandle | None = None
        self._checked = False
        self._troubles = Quiet()  # why our files could not be made again
        self._closed = False
        self._pid = os.getpid()

    # publishing

    async def publish(self, subject: str, data: bytes) -> None:
        if self._closed:
            raise RuntimeClosed("events")
        self._own.deliver(subject, data)
        for id in self._interested(subject):
            if id != self._id:
                self._send(id, subject, data)

    def _interested(self, subject: str) -> tuple[str, ...]:
        if not self._checked:
            self._make_folder()
        before = self._folder.reads
        try:
            ids = self._folder.interested(subject)
        except FileNotFoundError:
            return ()  # subscribers make it again; a new one would disturb the process that removes it
        except OSError:
            self._make_folder()  # what is wrong with it is mended, or said
            try:
                ids = self._folder.interested(subject)
            except OSError as error:
                raise BrokerError("local events", str(self._folder.path), f"cannot publish: {error}") from error
        if self._folder.reads != before and self._links:
            for gone in self._links.keys() - self._folder.listening:
                self._links.pop(gone).close()
        return ids

    def _make_folder(self) -> None:
        """Make the folder, or check that it is private still: after ours was removed another may lie there."""
        private_folder(str(self._directory), self.where)
        if self._checked:
            keep_private(str(self._folder.path))
        private_folder(str(self._folder.path), self.where)
        self._checked = True

    def _send(self, id: str, subject: str, data: bytes) -> None:
        link = self._links.get(id)
        if link is None:
            link = self._dial(id)
            if link is None:
                return
            self._links[id] = link
        link.send(subject, data)
        if link.closed and (again := self._dial(id)) is not None:
            self._links[id] = again  # it had closed the connection and lives, or a new one has taken its place
            again.send(subject, data)

    def _dial(self, id: str) -> Link | None:
        path = self._folder.socket(id)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            with unix_sockets.reachable(path) as name:
                sock.connect(name)
        except (ConnectionRefusedError, FileNotFoundError):
            sock.close()
            self._folder.forget(id)
            return None
        except OSError as error:  # its queue of connections is full, or our descriptors are used up
            sock.close()
            logger.warning("the subscriber at %s cannot be reached, it misses an event: %s", path, error)
            return None
        return Link(asyncio.get_running_loop(), sock, str(path), lambda link: self._lost(id, link))

    def _lost(self, id: str, link: Link) -> None:
        if self._links.get(id) is link:
            del self._links[id]

    # subscribing

    def subscribe(
        self,
        subject: str,
        *,
        read: Callable[[bytes], Any] = unread,
        max_events: int = MAX_EVENTS,
        max_bytes: int = MAX_BYTES,
    ) -> Subscription[Any]:
        if self._closed:
            raise RuntimeClosed("events")
        inbox = Inbox(subject, max_events, max_bytes)
        inbox.on_close = self._forget
        opening = asyncio.get_running_loop().create_task(self._open(inbox))
        self._opening.add(opening)
        opening.add_done_callback(self._opened)
        return Subscription(inbox, read, opening)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved here: the program may never wait for the subscription

    async def _open(self, inbox: Inbox) -> None:
        try:
            await self._listen()
            if inbox.closed:
                return
            if self._own.add(inbox):
                try:
                    self._folder.add(self._id, inbox.subject)
                except OSError:
                    await self._make_again()  # with this mark; the folder was removed
        except OSError as error:
            inbox.close()
            raise BrokerError("local events", str(self._folder.path), f"cannot subscribe: {error}") from error
        except BaseException:
            inbox.close()
            raise

    def _forget(self, inbox: Inbox) -> None:
        if self._own.remove(inbox) and os.getpid() == self._pid:  # in a forked child it is the parent's mark
            self._folder.remove(self._id, inbox.subject)

    async def _listen(self) -> None:
        if self._server is not None:
            return
        if self._listening is None:
            self._listening = asyncio.get_running_loop().create_task(self._start_listening())
            self._listening.add_done_callback(self._listens)
        await asyncio.shield(self._listening)

    def _listens(self, task: asyncio.Task[None]) -> None:
        self._listening = None
        if not task.cancelled():
            task.exception()

    async def _start_listening(self) -> None:
        self._make_folder()
        self._server = await self._listen_on(self._folder.socket(self._id))
        for dead in self._folder.orphans():  # listening has swept the sockets of dead processes
            self._folder.forget(dead)
        self._check = asyncio.get_running_loop().call_later(self._check_s, self._look)

    async def _listen_on(self, path: Path) -> tuple[asyncio.AbstractServer, int]:
        loop = asyncio.get_running_loop()
        server = await unix_sockets.listen(loop, path, lambda: _Incoming(self))
        if self._closed:
            unix_sockets.stop_listening(loop, server[0])
            unix_sockets.remove(path, server[1])
            raise RuntimeClosed("events")
        return server

    def _look(self) -> None:
        """Make removed files again, e.g. after a cleaner of temporary folders."""
        self._check = asyncio.get_running_loop().call_later(self._check_s, self._look)
        if self._restoring is None and not self._is_whole():
            self._restoring = asyncio.get_running_loop().create_task(self._restore())
            self._restoring.add_done_callback(self._restored)

    def _is_whole(self) -> bool:
        """Whether publishers find our socket and a mark for each subject."""
        assert self._server is not None
        try:
            if self._folder.missing(self._id, self._own.subjects()) or not self._folder.is_private():
                return False
        except OSError:
            return False
        return unix_sockets.in_place(self._folder.socket(self._id), self._server[1])

    async def _restore(self) -> None:
        await asyncio.sleep(SETTLE_S)
        try:
            await self._make_again()
        except (OSError, TritonError) as error:
            if self._troubles.due(str(error)) is not None:
                words = "events do not reach this process: its files in %s are gone and cannot be made again yet: %s"
                logger.warning(words, self._folder.path, error)
            await asyncio.sleep(RETRY_S)
        else:
            self._troubles.clear()

    async def _make_again(self) -> None:
        """Make the folder, our socket and our marks again, as far as they are missing.

        Raises:
            OSError, DiscoveryError: they cannot be made.
        """
        async with self._making:
            self._make_folder()
            path = self._folder.socket(self._id)
            assert self._server is not None
            if not unix_sockets.in_place(path, self._server[1]):
                before, self._server = self._server, await self._listen_on(path)
                unix_sockets.stop_listening(
                    asyncio.get_running_loop(), before[0]
                )  # connections that were made are kept
                logger.info("socket %s was removed and is made again", path)
            for subject in self._folder.missing(self._id, self._own.subjects()):
                self._folder.add(self._id, subject)

    def _restored(self, task: asyncio.Task[None]) -> None:
        self._restoring = None
        if not task.cancelled():
            task.exception()

    # life

    def inboxes(self) -> list[Inbox]:
        return self._own.inboxes()

    async def close(self) -> None:
        self._closed = True
        if self._check is not None:
            self._check.cancel()
        waiting = [*self._opening, *(each for each in (self._listening, self._restoring) if each is not None)]
        for task in waiting:
            task.cancel()
        if waiting:
            await asyncio.wait(waiting)
        self._own.close()
        server, self._server = self._server, None
        if server is not None:
            unix_sockets.remove(self._folder.socket(self._id), server[1])
            unix_sockets.stop_listening(asyncio.get_running_loop(), server[0])
        for incoming in list(self._incoming):
            incoming.close()
        await self._say_the_rest()
        for link in self._links.values():
            link.close()
        self._links.clear()

    async def _say_the_rest(self) -> None:
        end = asyncio.get_running_loop().time() + LAST_WORDS_S
        while any(not link.idle for link in self._links.values()):
            if asyncio.get_running_loop().time() > end:
                return
            await asyncio.sleep(0.005)

    def arrived(self, subject: str, data: bytes, lost: int) -> None:
        """Another process has published."""
        self._own.deliver(subject, data, lost)

    def joined(self, incoming: _Incoming) -> FrameReader:
        """A publisher has connected; where that was accepted just before the end, it is closed."""
        self._incoming.add(incoming)
        if self._closed:
            incoming.close()
        return FrameReader(self._max_message_bytes, self.arrived)

    def parted(self, incoming: _Incoming) -> None:
        """A publisher's connection is gone."""
        self._incoming.discard(incoming)


class _Incoming(asyncio.Protocol):
    """A publisher's connection, read as fast as it comes: what is too much is the inboxes' to drop."""

    def __init__(self, plane: LocalEvents) -> None:
        self._plane = plane
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        own(transport)
        self._transport = transport
        self._reader = self._plane.joined(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
        except DecodeError as error:
            logger.warning("the connection of a publisher is closed: %s", error)
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._plane.parted(self)

    def close(self) -> None:
        self._transport.close()

"""Events between the processes of one user on one machine, over Unix sockets, without a server.

A process with subscriptions listens on one socket in the private folder; publishers connect to it and write. If a
subscriber is stopped or busy, its publishers do not wait: they drop its oldest events, and the next event carries their
number. A process that finds a socket that refuses connections removes it, because its owner is dead. A process with
subscriptions checks its own files every second, and makes removed ones again.
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
"""Seconds that a closing publisher waits for slow subscribers."""

CHECK_S = 1.0
"""Seconds between checks whether this process's files were removed."""

RETRY_S = 5.0
"""Seconds between two attempts to make removed files again, if an attempt fails."""

SETTLE_S = 0.3
"""Seconds before removed files are made again. By then a removal of the folder is over; a new file would stop it."""


class LocalEvents:
    """Carries events between all processes that use the same folder.

    Args:
        directory: the private folder; a folder `events` is made in it.
        id: the instance id of this process's runtime, 0 < id < 2^63.
        max_message_bytes: the largest accepted event, in bytes.
        check_s: seconds between checks of this process's files.
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
        self._links: dict[str, Link] = {}  # By process. Reading the folder closes the links of processes that are gone.
        self._incoming: set[_Incoming] = set()  # One for each publishing process.
        self._server: tuple[asyncio.AbstractServer, int] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._restoring: asyncio.Task[None] | None = None
        self._making = asyncio.Lock()
        self._opening: set[asyncio.Task[None]] = set()
        self._check: asyncio.TimerHandle | None = None
        self._checked = False
        self._troubles = Quiet()  # Logged reasons why files could not be made again.
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
            return ()  # Subscribers make the folder again. Making it here would disturb the process that removes it.
        except OSError:
            self._make_folder()  # It repairs the folder, or raises an error that describes the problem.
            try:
                ids = self._folder.interested(subject)
            except OSError as error:
                raise BrokerError("local events", str(self._folder.path), f"cannot publish: {error}") from error
        if self._folder.reads != before and self._links:
            for gone in self._links.keys() - self._folder.listening:
                self._links.pop(gone).close()
        return ids

    def _make_folder(self) -> None:
        """Make the folder, or check that it is still private: it may have been removed and replaced by another."""
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
            self._links[id] = again  # The subscriber closed the connection but lives, or a new one has its place.
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
        except OSError as error:  # Its queue of connections is full, or this process has no free descriptor.
            sock.close()
            logger.warning("the subscriber at %s cannot be reached and misses an event: %s", path, error)
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
            task.exception()  # Retrieve it to avoid a warning: the program may never await the subscription.

    async def _open(self, inbox: Inbox) -> None:
        try:
            await self._listen()
            if inbox.closed:
                return
            if self._own.add(inbox):
                try:
                    self._folder.add(self._id, inbox.subject)
                except OSError:
                    await self._make_again()  # The folder was removed; the new one gets this mark, too.
        except OSError as error:
            inbox.close()
            raise BrokerError("local events", str(self._folder.path), f"cannot subscribe: {error}") from error
        except BaseException:
            inbox.close()
            raise

    def _forget(self, inbox: Inbox) -> None:
        if self._own.remove(inbox) and os.getpid() == self._pid:  # In a forked child the mark belongs to the parent.
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
        for dead in self._folder.orphans():  # Listening has removed the sockets of dead processes.
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
        """Make removed files again, e.g. after a cleaner of temporary folders has run."""
        self._check = asyncio.get_running_loop().call_later(self._check_s, self._look)
        if self._restoring is None and not self._is_whole():
            self._restoring = asyncio.get_running_loop().create_task(self._restore())
            self._restoring.add_done_callback(self._restored)

    def _is_whole(self) -> bool:
        """Whether publishers find this process's socket and a mark for each of its subjects."""
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
        """Make the folder, this process's socket and its marks again if they are missing.

        Raises:
            OSError, DiscoveryError: a file cannot be made.
        """
        async with self._making:
            self._make_folder()
            path = self._folder.socket(self._id)
            assert self._server is not None
            if not unix_sockets.in_place(path, self._server[1]):
                before, self._server = self._server, await self._listen_on(path)
                # Existing connections are kept.
                unix_sockets.stop_listening(asyncio.get_running_loop(), before[0])
                logger.info("socket %s was removed and has been made again", path)
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
        """Deliver an event that another process has published."""
        self._own.deliver(subject, data, lost)

    def joined(self, incoming: _Incoming) -> FrameReader:
        """Add a publisher's connection, and return its reader. If the plane is closed, close the connection."""
        self._incoming.add(incoming)
        if self._closed:
            incoming.close()
        return FrameReader(self._max_message_bytes, self.arrived)

    def parted(self, incoming: _Incoming) -> None:
        """Remove a publisher's connection, which was lost."""
        self._incoming.discard(incoming)


class _Incoming(asyncio.Protocol):
    """A publisher's connection. It is read without a limit; inboxes drop the events that they cannot hold."""

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

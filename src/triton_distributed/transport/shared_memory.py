"""A session's use of shared memory: large buffers of its messages that are not copied through its socket.

The sender copies a buffer into a segment of its runtime's pool, or finds that the buffer lies in memory that the
program has placed. The message refers to it (`wire.assembly`). The receiver has mapped the segment and uses the buffer
in place, and tells the sender when the last reference is gone.

A segment is offered first, and the peer answers whether it can open it. So nothing needs to be known of containers and
permissions: if the answer is no, buffers travel as bytes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from triton_distributed.errors import RemoteProtocolError
from triton_distributed.system import fork, placed
from triton_distributed.system.placed import Placed
from triton_distributed.system.shared_memory import Refused, Segment, mappings, peer_process
from triton_distributed.transport.shared_pool import SharedPool, Slot
from triton_distributed.wire.assembly import MOST_LENT, RETURNED, Borrow, Place
from triton_distributed.wire.connection import OnMemory
from triton_distributed.wire.hello import SHARED_MEMORY, Hello
from triton_distributed.wire.shared import Offer, Said, memory_frame, offer_frame, read_memory

if TYPE_CHECKING:
    from triton_distributed.system.mapping import Mapping

logger = logging.getLogger("triton_distributed.transport")

SMALLEST = 256 * 1024
"""Smaller buffers travel as bytes: measured, 256 KiB take half the time of the socket, and 128 KiB as long."""
COPY = 2 * 1024 * 1024
"""Bytes that are copied before other streams get a turn: 0.2 ms."""
ANSWER_S = 1.0
"""Seconds that a message waits for the answer to an offer; then its buffers travel as bytes."""
MOST_MAPPED = 256
"""Segments of one peer that are mapped at once; the kernel allows a process some 65,000 mappings."""


class MemoryConnection(Protocol):
    """What this needs from a session's connection."""

    peer: Hello | None
    hello: Hello
    on_memory: OnMemory
    borrow: Borrow

    def send(self, data: bytes) -> None:
        """Queue one frame."""


class Loan:
    """The buffers of one message that lie in shared memory.

    Attributes:
        places: of each buffer, where it lies, or None if it travels as bytes.
    """

    __slots__ = ("_lends", "_memory", "_slots", "places")

    def __init__(self, memory: SessionMemory) -> None:
        self._memory = memory
        self._slots: list[Slot] = []
        self.places: list[Place | None] = []
        self._lends = False

    async def fill(self, buffers: Sequence[memoryview]) -> None:
        """Put the large ones of these buffers into shared memory, as far as there is any."""
        places = [await self._memory.place(each, self._slots) if each.nbytes >= SMALLEST else None for each in buffers]
        if any(places):
            self.places, self._lends = places, True

    def sent(self) -> bool:
        """Note that the message is on its way: the slots come back when the peer releases them.

        Returns:
            whether the message refers to shared memory, and this is the first call.
        """
        while self._slots:
            self._memory.lent(self._slots.pop())
        first, self._lends = self._lends, False
        return first

    def drop(self) -> None:
        """Take back the slots of a message that was not sent."""
        while self._slots:
            self._memory.pool.give(self._slots.pop())


class SessionMemory:
    """One session's part in shared memory, for both directions.

    Args:
        loop: the session's loop.
        pool: the segments of the runtime.
        connection: the session's connection.

    Attributes:
        pool: see above.
        lends: the peer may be able to map segments of this process.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: SharedPool, connection: MemoryConnection) -> None:
        self.pool = pool
        self.lends = False
        self._loop = loop
        self._connection: MemoryConnection | None = connection
        connection.on_memory, connection.borrow = self._heard, self._borrow
        self._process = 0
        # Sending: segments that the peer knows, answers to offers, and slots that the peer uses. Bounded by the pool
        # and by what the program has placed.
        self._known: dict[int, Slot | Placed] = {}
        self._late = False  # An offer waits for its answer for more than `ANSWER_S`: the peer may be stopped.
        self._answers: dict[int, asyncio.Future[bool]] = {}
        self._lent: dict[int, Slot] = {}
        # Receiving: segments of the peer, and their uses by a weak reference.
        self._mapped: dict[int, tuple[Mapping, bool]] = {}  # also whether buffers in it may be returned
        self._uses: dict[Any, tuple[int, Mapping, int]] = {}
        self._returned: dict[Any, tuple[Slot, Mapping, int]] = {}  # uses of slots of this process

    def begin(self, transport: Any) -> None:
        """Find out, after the hellos, whether the peer is a process of this user on this host."""
        connection = self._connection
        if connection is not None and connection.peer is not None and SHARED_MEMORY in connection.peer.features:
            self._process = peer_process(transport.get_extra_info("socket"))
            self.lends = bool(self._process) and SHARED_MEMORY in connection.hello.features

    def lost(self) -> None:
        """Give up everything that the session used. Buffers that are still used here keep their memory."""
        self._connection = None
        self.lends = False
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(False)
        for known in self._known.values():
            known.users.discard(self)
        for slot in (*self._lent.values(), *(each[0] for each in self._returned.values())):
            self.pool.drop(slot)  # The peer, if it lives, may still read it; and nothing counts the uses here any more.
        self._lent.clear()
        self._returned.clear()
        self._known.clear()
        self._mapped.clear()
        self._uses.clear()

    # sending

    def wants(self, buffers: Sequence[memoryview]) -> bool:
        """Whether some of these buffers should be lent."""
        if not self.lends or self._late or len(buffers) > MOST_LENT:
            return False
        return any(each.nbytes >= SMALLEST for each in buffers)

    async def lend(self, buffers: Sequence[memoryview]) -> Loan:
        """Put the large buffers of a message into shared memory, as far as there is any.

        Call `sent` of the result when the message was written, else `drop`.
        """
        loan = Loan(self)
        try:
            await loan.fill(buffers)
        except BaseException:
            loan.drop()
            raise
        return loan

    async def place(self, data: memoryview, slots: list[Slot]) -> Place | None:
        """Return where one buffer lies in shared memory, or None. A slot that is taken for it is added to `slots`."""
        found = placed.find(data)
        if found is not None:
            known, offset = found
            return (known.segment.id, offset) if await self._offer(known) else None
        if (came := self._came(data)) is not None:
            return came
        slot = await self.pool.take(data.nbytes, self)
        if slot is None:
            return None
        slots.append(slot)
        if not await self._offer(slot):
            slots.remove(slot)
            self.pool.give(slot)
            return None
        target = slot.segment.memory
        for at in range(0, data.nbytes, COPY):
            if at:
                await asyncio.sleep(0)
            target[at : at + COPY][: data.nbytes - at] = data[at : at + COPY]
        return slot.segment.id, 0

    def _came(self, data: memoryview) -> Place | None:
        """Return the place of a buffer that came on this session and is still used, so that it need not be copied."""
        if self._uses:
            address: int = mappings().address_of(data)
            for segment, mapping, _ in self._uses.values():
                offset = mapping.offset_of(address, data.nbytes)
                if offset is not None and self._mapped.get(segment) == (mapping, True):
                    return segment | RETURNED, offset
        return None

    async def _offer(self, known: Slot | Placed) -> bool:
        """Return whether the peer has mapped a segment; offer it if the peer does not know it."""
        segment: Segment = known.segment
        answer = self._answers.get(segment.id)
        if answer is None:
            if self._connection is None or not self.lends or self._late or len(self._known) >= MOST_MAPPED:
                return False
            answer = self._answers[segment.id] = self._loop.create_future()
            self._known[segment.id] = known
            known.users.add(self)
            returnable = isinstance(known, Slot)
            offer = Offer(segment.id, segment.size, segment.fileno(), segment.cookie, returnable)
            self._connection.send(offer_frame(offer))
        if not answer.done() and not self._late:
            done, _ = await asyncio.wait((answer,), timeout=ANSWER_S)
            self._late = not done
        return answer.done() and answer.result()

    def lent(self, slot: Slot) -> None:
        """Note that a message on its way refers to a slot."""
        if self._connection is None:
            self.pool.drop(slot)
        else:
            slot.holds = 1
            self._lent[slot.segment.id] = slot

    def withdraw(self, segment: int) -> None:
        """Tell the peer that a segment is gone."""
        known = self._known.pop(segment, None)
        answer = self._answers.pop(segment, None)
        if answer is not None and not answer.done():
            answer.set_result(False)
        if known is not None:
            known.users.discard(self)
            if self._connection is not None:
                self._connection.send(memory_frame(Said.WITHDRAWN, segment))

    def withdraw_soon(self, segment: int) -> None:
        """Call `withdraw` in the loop. May be called in any thread."""
        self._soon(self.withdraw, segment)

    def _soon(self, call: Any, argument: Any) -> None:
        if self._connection is not None:
            try:
                self._loop.call_soon_threadsafe(call, argument)
            except RuntimeError:
                pass  # The loop was closed, and the session with it.

    # receiving

    def _heard(self, payload: bytes) -> None:
        said, about = read_memory(payload)
        if isinstance(about, Offer):
            self._offered(about)
        elif said is Said.WITHDRAWN:
            self._mapped.pop(about, None)
        elif said is Said.TAKEN or said is Said.REFUSED:
            self._late = False
            answer = self._answers.get(about)
            if answer is not None and not answer.done():
                answer.set_result(said is Said.TAKEN)
            known = self._known.get(about)
            # That the peer cannot open what was closed here meanwhile says nothing about other segments.
            if said is Said.REFUSED and self.lends and known is not None and known.segment.fileno() >= 0:
                self.lends = False
                logger.info("process %d cannot map this one's memory: large buffers travel as bytes", self._process)
        elif (slot := self._lent.pop(about, None)) is not None:
            (self.pool.release if said is Said.RELEASED else self.pool.drop)(slot)

    def _offered(self, offer: Offer) -> None:
        if offer.segment in self._mapped:
            raise RemoteProtocolError(f"shared memory {offer.segment} was offered twice")
        said = Said.REFUSED
        if self._process and len(self._mapped) < MOST_MAPPED:
            try:
                where = self._process, offer.descriptor
                mapping = mappings().Mapping(*where, offer.size, offer.cookie, reopens=offer.returnable)
                self._mapped[offer.segment] = mapping, offer.returnable
                said = Said.TAKEN
            except Refused:
                pass
        self._say(said, offer.segment)

    def _borrow(self, segment: int, offset: int, size: int) -> memoryview:
        slot, found = None, None
        if segment & RETURNED:
            slot = self._lent.get(segment ^ RETURNED)
        else:
            found = self._mapped.get(segment)
        limit = slot.segment.size if slot is not None else found[0].size if found is not None else -1
        if limit < 0:
            raise RemoteProtocolError(f"a message refers to shared memory {segment}, which is not mapped here")
        if not size or offset + size > limit:
            raise RemoteProtocolError(f"a message refers to bytes outside of shared memory {segment}")
        if slot is not None:
            return self._take_back(slot, offset, size)
        assert found is not None
        try:
            mapping = found[0].fresh()
        except Refused as error:
            raise RemoteProtocolError(f"shared memory {segment} cannot be mapped again: {error}") from error
        self._mapped[segment] = mapping, found[1]
        view, reference = mapping.lend(offset, size, self._ended)
        self._uses[reference] = segment, mapping, fork.count()
        return view

    def _take_back(self, slot: Slot, offset: int, size: int) -> memoryview:
        """Return a buffer that the peer got from here, still uses, and has sent back."""
        try:
            mapping = slot.read()
        except Refused:  # This process has no descriptors left.
            return memoryview(bytearray(slot.segment.memory[offset : offset + size]))
        view, reference = mapping.lend(offset, size, self._ended)
        slot.holds += 1
        self._returned[reference] = slot, mapping, fork.count()
        return view

    def _ended(self, reference: Any) -> None:
        """Note that a buffer is not used any more. The garbage collector may call this in any thread."""
        self._soon(self._release, reference)

    def _release(self, reference: Any) -> None:
        if (use := self._uses.pop(reference, None)) is not None:
            segment, mapping, forks = use
            mapping.uses -= 1
            self._say(Said.RELEASED if forks == fork.count() else Said.KEPT, segment)
        elif (returned := self._returned.pop(reference, None)) is not None:
            slot, mapping, forks = returned
            mapping.uses -= 1
            (self.pool.release if forks == fork.count() else self.pool.drop)(slot)

    def _say(self, said: Said, segment: int) -> None:
        if self._connection is not None:
            self._connection.send(memory_frame(said, segment))

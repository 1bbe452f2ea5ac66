"""The instances of one endpoint in etcd: a list first, then a watch of its changes. It runs in etcd's thread.

A broken watch continues after its last event if the store still has the later ones. Otherwise the endpoint is listed
again and compared with the known instances. The lineage of a store (see `etcd.keys`) shows whether it is still the same
store. Revisions alone cannot show it, because an emptied etcd soon reaches the revisions of the old one.

After a break, an instance that etcd lacks may still live: an emptied etcd knows no instance, and a frozen one lets all
leases expire when it wakes. In both cases the workers will soon register again. So a missing or deleted instance stays
known for a grace period after each break, counted while etcd answers, and is dropped if it has not come back by then.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from triton_distributed.discovery.base import same
from triton_distributed.discovery.etcd.keys import EtcdKeys
from triton_distributed.discovery.record import BadRecord
from triton_distributed.external import etcd_messages as messages
from triton_distributed.external.etcd import FIRST_WAIT_S, LAST_WAIT_S, READ_S, EtcdClient
from triton_distributed.external.etcd_endpoint import EtcdRefused
from triton_distributed.names import EndpointName, Instance
from triton_distributed.quiet import Quiet

_log = logging.getLogger("triton_distributed.discovery")

PAGE = 512
"""Records listed at a time: about 300 KB, decoded in 2 ms, so that other threads can run in between."""

_MAX_WARNED = 1024
"""Most keys remembered because a warning was logged."""

#: Changes in order: each a key and its present instance, None if it was removed.
Changes = list[tuple[bytes, Instance | None]]


class EndpointWatch:
    """Follows the instances of one endpoint, or of all.

    Args:
        client: a client of the loop that uses this watch.
        keys: the layout of the keys.
        endpoint: the endpoint to follow; None for all.
        grace_s: seconds after a break during which missing instances stay known.
        publish: called with each set of changes.
    """

    def __init__(
        self,
        client: EtcdClient,
        keys: EtcdKeys,
        endpoint: EndpointName | None,
        grace_s: float,
        publish: Callable[[Changes], None],
    ) -> None:
        self._client, self._keys, self._publish = client, keys, publish
        self._name = str(endpoint or "every endpoint")
        self._first, self._end = keys.range(endpoint)
        self._grace_s = grace_s
        self._known: dict[bytes, Instance] = {}  # The live instances.
        self._doubtful: set[bytes] = set()  # Keys that are known, but missing in etcd since the last break.
        self._dropping: asyncio.TimerHandle | None = None  # The end of the present grace period.
        self._lineage = b""
        self._next = 0  # The first revision that was not seen yet.
        self._live = False
        self._warned = Quiet(most=_MAX_WARNED)  # The keys that a warning was logged for.

    async def take_stock(self) -> None:
        """Read all instances that exist now.

        Raises:
            EtcdError: etcd cannot be read.
        """
        lineage, revision, listed = await self._read()
        self._lineage, self._next = lineage, revision + 1
        changes: Changes = []
        found = {}
        for kv in listed:
            if (instance := self._decode(kv)) is not None:
                found[kv.key] = instance
                self._take(kv.key, instance, changes)
        self._doubtful |= self._known.keys() - found.keys()
        if changes:
            self._publish(changes)

    async def run(self) -> None:
        """Follow the changes since `take_stock`, for ever. Call `take_stock` first, then run this as a task."""
        wait_s = FIRST_WAIT_S
        broken = False
        while True:
            try:
                if broken and not await self._can_resume():
                    await self.take_stock()
                watch = await self._client.watch(self._first, self._end, self._next)
                try:
                    self._live = True
                    if broken:
                        self._count_grace()
                    wait_s = FIRST_WAIT_S
                    while True:
                        self._apply(await watch.read())
                finally:
                    self._live = False
                    watch.close()
            except OSError as error:
                _log.debug("the watch of %s broke: %s", self._name, error)
            except Exception as error:  # For any error, the known instances stay and the watch is tried again.
                _log.warning("etcd at %s: cannot watch %s: %s", self._client.where, self._name, error)
            broken = True
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, LAST_WAIT_S)

    def close(self) -> None:
        """Cancel the timer. The owner of the tasks that run this watch ends them."""
        if self._dropping is not None:
            self._dropping.cancel()

    # --- reading -----------------------------------------------------------------------------------------------------

    async def _can_resume(self) -> bool:
        if not self._lineage or not self._next:
            return False
        reply = await self._client.range(self._keys.lineage)
        lineage = reply.kvs[0].value if reply.kvs else b""
        # A store that was restored from a backup has the lineage, but not yet the revisions.
        return lineage == self._lineage and reply.header.revision >= self._next - 1

    async def _read(self) -> tuple[bytes, int, list[messages.KeyValue]]:
        """Return the lineage, a revision, and all keys at that revision."""
        while True:
            first = await self._client.txn(
                [],
                [messages.get(self._keys.lineage), messages.get(self._first, self._end, limit=PAGE)],
                attempt_s=READ_S,
            )
            marks, page = (each.response_range for each in first.responses)
            lineage, revision = marks.kvs[0].value if marks.kvs else b"", first.header.revision
            listed = list(page.kvs)
            try:
                while page.more:
                    after = listed[-1].key + b"\0"
                    page = await self._client.range(after, self._end, limit=PAGE, revision=revision)
                    listed += page.kvs
            except EtcdRefused as error:
                if not error.compacted:
                    raise
                continue  # Listing took so long that the revision was compacted.
            return lineage, revision, listed

    def _decode(self, kv: messages.KeyValue) -> Instance | None:
        try:
            return self._keys.read(kv.key, kv.value)
        except BadRecord as error:
            if self._warned.due(kv.key) is not None:
                _log.warning("record %s in etcd is skipped: %s", kv.key.decode(errors="replace"), error)
            return None

    # --- changes -----------------------------------------------------------------------------------------------------

    def _apply(self, reply: messages.WatchReply) -> None:
        if reply.canceled:
            if reply.compact_revision:
                _log.info("etcd has compacted later changes of %s: listing again", self._name)
                self._next = 0
            raise ConnectionError(reply.cancel_reason or "etcd ended the watch")
        changes: Changes = []
        for event in reply.events:
            key = event.kv.key
            if event.type == "PUT":
                self._take(key, self._decode(event.kv), changes)
            elif self._dropping is None:
                self._take(key, None, changes)
            elif key in self._known:
                self._doubtful.add(key)
        if reply.events:
            # A revision may hold several changes and a fragment only some of them. They may be seen twice.
            self._next = reply.events[-1].kv.mod_revision + (0 if reply.fragment else 1)
        if changes:
            self._publish(changes)

    def _take(self, key: bytes, instance: Instance | None, changes: Changes) -> None:
        self._doubtful.discard(key)
        known = self._known.get(key)
        if instance is None:
            if self._known.pop(key, None) is None:
                return
        elif known is not None and same(known, instance):
            return
        else:
            self._known[key] = instance
            self._warned.forget(key)
        changes.append((key, instance))

    # --- after a break -----------------------------------------------------------------------------------------------

    def _count_grace(self) -> None:
        """Begin the grace period: etcd answers again, so live workers can register."""
        if self._dropping is not None:
            self._dropping.cancel()
        if self._doubtful:
            _log.info("etcd lacks %d instances of %s, which may come back", len(self._doubtful), self._name)
        self._dropping = asyncio.get_running_loop().call_later(self._grace_s, self._drop_doubtful)

    def _drop_doubtful(self) -> None:
        if not self._live:  # etcd is away, so no worker could register. The next watch begins a new grace period.
            return
        self._dropping = None
        changes: Changes = []
        for key in tuple(self._doubtful):
            self._take(key, None, changes)
        if changes:
            self._publish(changes)

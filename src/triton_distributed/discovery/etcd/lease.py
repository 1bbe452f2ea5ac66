"""What one process registers in etcd: one lease, kept alive, and the records under it. Lives in etcd's thread.

The lease may be lost: it ran out while the process was stopped, etcd came back empty, an operator revoked it. Then a
new one is made and every record is written again under its key. After each failure and from time to time it is checked
that all records exist, so that what an operator deleted or an old backup lacks comes back too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random

from triton_distributed.discovery import record
from triton_distributed.discovery.etcd.keys import EtcdKeys
from triton_distributed.external import etcd_messages as messages
from triton_distributed.external.etcd import ATTEMPT_S, EtcdClient
from triton_distributed.external.etcd_endpoint import EtcdRefused

_log = logging.getLogger("triton_distributed.discovery")

CHECK_BEATS = 10
"""Beats between two checks whether every record exists."""

AGAIN_S = 1.0
"""Seconds until an operation that etcd refused is tried again: a permission may have been forgotten."""

WITHDRAW_S = 2.0
"""Seconds that a withdrawal is waited for. A slower one is left to the background and to the lease."""


class _Entry:
    """One record: `value` as it was registered, None for not at all. The lock keeps writes of one key in order."""

    __slots__ = ("before", "busy", "lock", "value")

    def __init__(self) -> None:
        self.value: bytes | None = None
        self.before: bytes | None = None  # what `value` has replaced
        self.busy = False  # it is to be written down as busy
        self.lock = asyncio.Lock()


class Registrar:
    """Keeps records in etcd as they should be.

    Args:
        client: of the loop on which this is used.
        keys: where they lie.
        ttl_s: seconds after which etcd deletes them when it hears nothing.
    """

    def __init__(self, client: EtcdClient, keys: EtcdKeys, ttl_s: int) -> None:
        self._client, self._keys, self._ttl_s = client, keys, ttl_s
        self._entries: dict[bytes, _Entry] = {}  # one an endpoint that the process ever served
        self._lease = 0
        self._granting = asyncio.Lock()
        self._granted = asyncio.Event()
        self._wrong: set[bytes] = set()  # keys whose record in etcd is not known to be as it should
        self._repair = asyncio.Event()

    async def register(self, key: bytes, value: bytes) -> None:
        """Write a record; if that fails, what was there before stays."""
        entry = self._entries.setdefault(key, _Entry())
        async with entry.lock:
            entry.before, entry.value, entry.busy = entry.value, value, False
            try:
                await self._write(key, value)
            except BaseException:
                self.undo(key, value)  # the write may have been done all the same
                raise

    def undo(self, key: bytes, value: bytes) -> None:
        """Restore what `register` replaced with this value: it failed, or its caller did not wait any more."""
        entry = self._entries.get(key)
        if entry is not None:
            if entry.value is value:  # else it was withdrawn meanwhile
                entry.value = entry.before
            self._needs_repair(key)

    async def withdraw(self, key: bytes) -> None:
        """Delete a record unless another process has replaced it; what cannot be done now is done later."""
        entry = self._entries.get(key)
        if entry is None or entry.value is None:
            return
        entry.value = None
        self._needs_repair(key)
        if self._client.reachable:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WITHDRAW_S):
                    await self._mend(key)

    def mark(self, key: bytes, busy: bool) -> None:
        """Have the record say whether its instance is busy, as soon as etcd can be reached."""
        entry = self._entries.get(key)
        if entry is not None and entry.value is not None and entry.busy is not busy:
            entry.busy = busy
            self._needs_repair(key)

    async def run(self) -> None:
        """Keep the lease alive and the records right; run this as a task."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._beat())
            both.create_task(self._mend_all())

    async def revoke(self) -> None:
        """Delete everything at once, at the end; tries each endpoint once."""
        for entry in self._entries.values():
            entry.value = None
        lease, self._lease = self._lease, 0
        if lease:
            await self._client.revoke(lease)

    # --- the lease ---------------------------------------------------------------------------------------------------

    async def _get_lease(self) -> int:
        async with self._granting:
            if not self._lease:
                lease = await self._client.grant(self._ttl_s)
                await self._mark_store()
                self._lease = lease
                self._granted.set()
            return self._lease

    async def _mark_store(self) -> None:
        """Give a store its lineage before anything else is written; nearly always it has one."""
        key = self._keys.lineage
        if not (await self._client.range(key)).kvs:
            lineage = random.randbytes(16).hex().encode()
            await self._client.txn([messages.is_absent(key)], [messages.put(key, lineage)])

    def _lost(self, lease: int) -> None:
        if self._lease == lease:
            _log.warning("etcd at %s has forgotten this process: registering again", self._client.where)
            self._lease = 0
            self._granted.clear()
            self._needs_repair(*self._entries)

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        beats = 0
        while True:
            await self._granted.wait()
            await asyncio.sleep(self._ttl_s / 3)
            lease, began = self._lease, loop.time()
            if not lease:
                continue
            try:
                if not await self._client.keep_alive(lease, min(ATTEMPT_S, self._ttl_s / 3)):
                    self._lost(lease)
                    continue
                beats += 1
                if beats % CHECK_BEATS == 0 or loop.time() - began > self._ttl_s / 3:
                    there = await self._client.keys_of(lease)
                    self._needs_repair(
                        *(key for key, entry in self._entries.items() if entry.value and key not in there)
                    )
            except Exception as error:  # whatever it is, the next beat must come
                _log.warning("etcd at %s does not renew the lease: %s", self._client.where, error)

    # --- the records -------------------------------------------------------------------------------------------------

    async def _write(self, key: bytes, value: bytes) -> None:
        while True:
            lease = await self._get_lease()
            try:
                await self._client.txn([], [messages.put(key, value, lease)])
                return
            except EtcdRefused as error:
                if not error.lease_is_gone:
                    raise
                self._lost(lease)

    def _needs_repair(self, *keys: bytes) -> None:
        self._wrong.update(keys)
        if keys:
            self._repair.set()

    async def _mend_all(self) -> None:
        while True:
            await self._repair.wait()
            self._repair.clear()
            results = await asyncio.gather(*map(self._mend, tuple(self._wrong)), return_exceptions=True)
            for error in filter(None, results):
                _log.warning("etcd at %s: a record cannot be written: %s", self._client.where, error)
            if self._wrong:
                self._repair.set()
                await asyncio.sleep(AGAIN_S)

    async def _mend(self, key: bytes) -> None:
        """Make the record in etcd what it should be."""
        entry = self._entries[key]
        async with entry.lock:
            if key not in self._wrong:
                return
            value, busy = entry.value, entry.busy
            if value is None:
                await self._remove(key)
            else:
                await self._restore(key, entry, value, record.marked(value, True, os.getpid()) if busy else value)
            if entry.value is value and entry.busy is busy:
                self._wrong.discard(key)

    async def _remove(self, key: bytes) -> None:
        if self._lease:  # else it went with the lease
            await self._client.txn([messages.has_lease(key, self._lease)], [messages.delete(key)])

    async def _restore(self, key: bytes, entry: _Entry, value: bytes, shown: bytes) -> None:
        """Write a record again, unless another process has replaced it meanwhile: the last one counts."""
        while True:
            lease = await self._get_lease()
            write = [messages.put(key, shown, lease)]
            try:
                reply = await self._client.txn([messages.is_absent(key)], write, [messages.get(key)])
                if not reply.succeeded and reply.responses[0].response_range.kvs[0].lease == lease:
                    reply = await self._client.txn([messages.has_lease(key, lease)], write)
                    if not reply.succeeded:
                        continue  # it changed between the two
            except EtcdRefused as error:
                if not error.lease_is_gone:
                    raise
                self._lost(lease)
                continue
            if reply.succeeded:
                _log.info("written again in etcd: %s", key.decode())
                return
            _log.warning("%s was replaced by another process while this one was forgotten", key.decode())
            if entry.value is value:
                entry.value = None
            return

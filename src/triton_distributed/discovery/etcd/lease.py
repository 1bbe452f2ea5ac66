"""The registrations of one process in etcd: one lease that is kept alive, and its records. It runs in etcd's thread.

The lease may be lost: it expired while the process was stopped, etcd came back empty, or an operator revoked it. Then a
new lease is made and every record is written again under its key. After each failure, and from time to time, all
records are checked, so that records that an operator deleted or an old backup lacks come back too.
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
"""Renewals of the lease between two checks whether all records exist."""

AGAIN_S = 1.0
"""Seconds until an operation that etcd refused is tried again, e.g. because an operator may add a permission."""

WITHDRAW_S = 2.0
"""Seconds to wait for a withdrawal. A slower one ends in the background, or with the lease."""


class _Entry:
    """One record. `value` is None if it is not registered. The lock keeps the writes of one key in order."""

    __slots__ = ("before", "busy", "lock", "value")

    def __init__(self) -> None:
        self.value: bytes | None = None
        self.before: bytes | None = None  # The value that `value` has replaced.
        self.busy = False  # The record must be written as busy.
        self.lock = asyncio.Lock()


class Registrar:
    """Keeps the records of this process in etcd correct.

    Args:
        client: a client of the loop that uses this registrar.
        keys: the layout of the keys.
        ttl_s: seconds without renewal after which etcd deletes the records.
    """

    def __init__(self, client: EtcdClient, keys: EtcdKeys, ttl_s: int) -> None:
        self._client, self._keys, self._ttl_s = client, keys, ttl_s
        self._entries: dict[bytes, _Entry] = {}  # One for each endpoint that the process ever served.
        self._lease = 0
        self._granting = asyncio.Lock()
        self._granted = asyncio.Event()
        self._wrong: set[bytes] = set()  # Keys with records in etcd that may be wrong.
        self._repair = asyncio.Event()

    async def register(self, key: bytes, value: bytes) -> None:
        """Write a record. If that fails, the former record stays."""
        entry = self._entries.setdefault(key, _Entry())
        async with entry.lock:
            entry.before, entry.value, entry.busy = entry.value, value, False
            try:
                await self._write(key, value)
            except BaseException:
                self.undo(key, value)  # The write may have succeeded nevertheless.
                raise

    def undo(self, key: bytes, value: bytes) -> None:
        """Restore the value that `register` replaced, because it failed or its caller stopped waiting."""
        entry = self._entries.get(key)
        if entry is not None:
            if entry.value is value:  # Otherwise the record was withdrawn meanwhile.
                entry.value = entry.before
            self._needs_repair(key)

    async def withdraw(self, key: bytes) -> None:
        """Delete a record unless another process has replaced it. If that is impossible now, it is done later."""
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
        """Publish in the record whether its instance is busy, as soon as etcd can be reached."""
        entry = self._entries.get(key)
        if entry is not None and entry.value is not None and entry.busy is not busy:
            entry.busy = busy
            self._needs_repair(key)

    async def run(self) -> None:
        """Keep the lease alive and the records correct. Run this as a task."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._beat())
            both.create_task(self._mend_all())

    async def revoke(self) -> None:
        """Delete all records at the end by revoking the lease; each endpoint of etcd is tried once."""
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
        """Write the lineage of a store before any record. Nearly always the store has one already."""
        key = self._keys.lineage
        if not (await self._client.range(key)).kvs:
            lineage = random.randbytes(16).hex().encode()
            await self._client.txn([messages.is_absent(key)], [messages.put(key, lineage)])

    def _lost(self, lease: int) -> None:
        if self._lease == lease:
            _log.warning("etcd at %s has lost the lease of this process: registering again", self._client.where)
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
            except Exception as error:  # After any error, the next renewal must still come.
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
        """Correct the record in etcd."""
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
        if self._lease:  # Otherwise the record ended with the lease.
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
                        continue  # The record changed between the two transactions.
            except EtcdRefused as error:
                if not error.lease_is_gone:
                    raise
                self._lost(lease)
                continue
            if reply.succeeded:
                _log.info("record %s was written again in etcd", key.decode())
                return
            _log.warning("record %s was replaced by another process after this one lost its lease", key.decode())
            if entry.value is value:
                entry.value = None
            return

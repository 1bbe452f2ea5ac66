"""Simulated workers: `python -m benchmarks.scaling_workers NUMBER ETCD_URL TTL_S`. See scaling.py.

Each has the same as a real worker in etcd: its own lease and a record under it, kept alive as often. They share a few
clients of etcd, while real workers have one each. So etcd has fewer connections here, but as many requests.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from typing import Any

from benchmarks.scaling_clients import ENDPOINT
from harness.processes import answer_questions
from triton_distributed.discovery import record
from triton_distributed.discovery.etcd.keys import EtcdKeys
from triton_distributed.external import etcd_messages as messages
from triton_distributed.external.etcd import EtcdClient
from triton_distributed.external.etcd_endpoint import EtcdOptions
from triton_distributed.names import EndpointName, Instance

PREFIX = "triton-distributed"
CLIENTS = 4  # The clients of etcd, for 32 requests under way.
BEATING = 32  # Keep-alives under way: as many as two cores can bear that run etcd and all workers.
BEATS_A_TTL = 3  # The same as in discovery/etcd/lease.py.


class Worker:
    """One lease and one record."""

    def __init__(self, client: EtcdClient, keys: EtcdKeys, instance_id: int) -> None:
        self._client = client
        instance = Instance(
            EndpointName.parse(ENDPOINT),
            instance_id,
            (f"unix:///run/user/1000/triton-distributed/sockets/{instance_id:016x}.sock", "tcp://10.123.45.67:43210"),
            "0f3c8a52-4c1e-4b55-9a53-1f4d6f2d7a10",
            {"model": "llama-3.1-70b-instruct"},
        )
        self._key, self._value = keys.of(instance.endpoint, instance.id), record.encode(instance, 12345)
        self.lease = 0

    async def register(self, ttl_s: int) -> None:
        self.lease = await self._client.grant(ttl_s)
        await self._client.txn([], [messages.put(self._key, self._value, self.lease)])

    async def withdraw(self) -> None:
        await self._client.txn([], [messages.delete(self._key)])

    async def beat(self) -> bool:
        return await self._client.keep_alive(self.lease)


async def main(number: int, url: str, ttl_s: int) -> None:
    keys = EtcdKeys(PREFIX)
    clients = [EtcdClient(EtcdOptions(endpoints=url), keys.lineage) for _ in range(CLIENTS)]
    workers: list[Worker] = []
    beats = lost = 0
    beating = asyncio.Semaphore(BEATING)
    base = (number + 1) << 40

    def worker() -> Worker:
        made = Worker(clients[len(workers) % CLIENTS], keys, base + len(workers) + 1)
        workers.append(made)
        return made

    async def keep(member: Worker) -> None:
        """Keep a lease alive at the worker's own times until the lease is lost."""
        nonlocal beats, lost
        pause_s = random.uniform(0.0, ttl_s / BEATS_A_TTL)  # Real workers do not start at the same moment.
        while True:
            await asyncio.sleep(pause_s)
            pause_s = ttl_s / BEATS_A_TTL
            async with beating:
                if not await member.beat():
                    lost += 1
                    return
            beats += 1

    async def register(count: int) -> dict[str, Any]:
        made = [worker() for _ in range(count)]
        for first in range(0, count, 64):
            part = made[first : first + 64]
            await asyncio.gather(*(each.register(ttl_s) for each in part))
            keeping.extend(asyncio.create_task(keep(each)) for each in part)
        return {}

    async def change(what: str) -> dict[str, Any]:
        if what == "added":
            await asyncio.sleep(0.05)  # The clients begin to wait for the change first.
            worker()
        member = workers[-1]
        at = time.monotonic()
        if what == "added":
            await member.register(ttl_s * 100)
        else:
            await member.withdraw()
            workers.pop()
        return {"at": at}

    async def rest(seconds: float) -> dict[str, Any]:
        before = beats
        await asyncio.sleep(seconds)
        return {"beats": beats - before}

    async def answer(question: str, **arguments: Any) -> Any:
        if question == "register":
            return await register(**arguments)
        if question == "rest":
            return await rest(**arguments)
        return {"lost": lost} if question == "count" else await change(question)

    keeping: list[asyncio.Task[None]] = []
    await answer_questions(answer)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))

"""A worker process: `python -m benchmarks.survival.worker JOURNAL [SERVICE_S MAX_INFLIGHT MAX_QUEUE]`.

Before its first item a handler writes its request's key into the journal. The kernel has it then, and keeps it however
the process ends: so a journal knows which handlers have begun, and how often.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import uvloop

from benchmarks.processes import answer_questions
from benchmarks.survival.content import LIMITED, WORK, item
from triton_distributed.runtime import Client, Context, DistributedRuntime


async def main(journal: str, service_s: str = "0.02", max_inflight: str = "8", max_queue: str = "64") -> None:
    runtime = DistributedRuntime()
    begun = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    seconds = float(service_s)

    async def work(request: Any, context: Context) -> AsyncIterator[Any]:
        key, every = request["key"], request["every"]
        os.write(begun, f"{key}\n".encode())
        for index in range(context.resume_token or 0, request["items"]):
            await asyncio.sleep(request["pause_s"])
            if every and index % every == every - 1:
                context.checkpoint(index + 1)
            yield item(key, index)
        if request["tail_s"]:
            await asyncio.sleep(request["tail_s"])

    async def limited(request: Any) -> Any:
        if request["busy"]:  # computes for all of its time, and nothing else of this process runs meanwhile
            end = time.thread_time() + seconds
            while time.thread_time() < end:
                pass
        else:
            await asyncio.sleep(seconds)
        return item(request["key"], 0)

    limits = {"max_inflight": int(max_inflight), "max_queue": int(max_queue)}
    serving = [
        runtime.endpoint(WORK).serve_endpoint(work),
        runtime.endpoint(LIMITED).serve_endpoint(limited, **limits),
    ]
    clients = [await runtime.endpoint(name).client() for name in (WORK, LIMITED)]
    for client in clients:
        await listed(client, runtime.instance_id)

    async def answer(question: str) -> Any:
        if question == "about":
            instance = clients[0].view.table.by_id[runtime.instance_id]
            return {"id": instance.id, "addresses": instance.addresses, "pid": os.getpid()}
        if question == "counts":
            return {path: stats.outcomes() for path, stats in runtime.stats().items()}
        raise ValueError(f"unknown question {question!r}")

    answering = asyncio.ensure_future(answer_questions(answer))
    await asyncio.wait([answering, *serving], return_when=asyncio.FIRST_COMPLETED)
    answering.cancel()
    await runtime.close()


async def listed(client: Client, instance_id: int) -> None:
    """Wait until a client knows an instance."""
    changed = asyncio.Event()
    client.view.table.listeners.append(changed.set)
    while instance_id not in client.instance_ids():
        await changed.wait()
        changed.clear()
    client.view.table.listeners.remove(changed.set)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))

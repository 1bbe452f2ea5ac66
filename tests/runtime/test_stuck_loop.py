"""A handler that blocks its worker's loop: the log says where, and clients call the other worker meanwhile."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, patiently, until
from tests.runtime.programs import Program, program
from tests.timing import MS
from triton_distributed.context import Context
from triton_distributed.names import EndpointName, Instance

NAME = EndpointName("t", "c", "e")

WORKER = """
import asyncio, logging, os, sys
from triton_distributed import log_requests
from triton_distributed.runtime import DistributedRuntime

logging.basicConfig(stream=sys.stderr, level="INFO", format="%(levelname)s %(name)s %(request_id)s %(message)s")
log_requests()

def blocks():
    open(os.environ["UNTIL_WRITTEN"]).close()  # the line

async def main():
    runtime = DistributedRuntime(asyncio.get_running_loop())
    async def handler(request):
        if request == "block":
            blocks()
        if request == "stats":
            yield runtime.loop_stats.stalls
        yield os.getpid()
    await runtime.endpoint("t.c.e").serve_endpoint(handler)

if os.environ.get("USE_UVLOOP"):
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""
LINE = next(number for number, text in enumerate(WORKER.splitlines(), 1) if "# the line" in text)


async def stderr_of(worker: Program) -> str:
    worker.signal(signal.SIGTERM)
    return (await worker.output())[1]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_calls_go_elsewhere_while_it_is_stuck_and_come_back(unix: Cluster, tmp_path: Path, loop: str) -> None:
    fifo = tmp_path / "fifo"  # The worker opens it for reading, which blocks until the test opens it for writing.
    os.mkfifo(fifo)
    environment = {"UNTIL_WRITTEN": str(fifo)} | ({"USE_UVLOOP": "1"} if loop == "uvloop" else {})
    async with (
        program(tmp_path, WORKER, environment=environment) as one,
        program(tmp_path, WORKER, environment=environment) as other,
    ):
        client = await unix.client()
        await until(lambda: len(client.instance_ids()) == 2)
        pids = {await patiently(client.call(0, policy=only(id))): id for id in client.instance_ids()}
        stuck, free = pids[one.pid], pids[other.pid]
        blocking = client.direct("block", stuck, annotated=False, context=Context("THE-STUCK-ONE"))
        await until(lambda: client.candidates.table.by_id[stuck].busy)
        assert {each.id for each in client.candidates.instances} == {free}
        assert {await patiently(client.call(n)) for n in range(20)} == {other.pid}
        fifo.write_text("")
        assert [item async for item in blocking] == [one.pid]
        await until(lambda: not client.candidates.table.by_id[stuck].busy)
        assert {await patiently(client.call(n)) for n in range(4)} == {one.pid, other.pid}
        assert await patiently(anext(client.direct("stats", stuck, annotated=False))) == 1
        assert await patiently(anext(client.direct("stats", free, annotated=False))) == 0
        said = await stderr_of(one)
        assert len(re.findall("WARNING triton_distributed.watchdog", said)) == 2, said
        file = next(tmp_path.glob("program_*.py"))
        assert f"WARNING triton_distributed.watchdog THE-STUCK-ONE the event loop is stuck at {file}:{LINE} in " in said
        assert f'File "{file}", line {LINE}, in blocks' in said
        assert re.search(r"turns again: it was stuck for \d+\.\d+ s at ", said)
        assert "watchdog" not in await stderr_of(other)


def only(id: int) -> Any:
    return lambda request, instances, load: next(each for each in instances if each.id == id)


async def test_a_process_that_was_stopped_says_nothing_for_ever(unix: Cluster, tmp_path: Path) -> None:
    async with program(tmp_path, WORKER) as worker:
        client = await unix.client()
        (id,) = client.instance_ids()
        assert await patiently(client.call(0)) == worker.pid
        worker.signal(signal.SIGSTOP)
        waiting = asyncio.ensure_future(client.call(0))
        await asyncio.wait([waiting], timeout=600 * MS)  # that it stands still for long is what is tested
        assert not waiting.done()
        worker.signal(signal.SIGCONT)
        assert await patiently(waiting) == worker.pid
        await until(lambda: not client.candidates.table.by_id[id].busy)
        stalls = await patiently(anext(client.direct("stats", id, annotated=False)))
        assert stalls <= 1
        assert (await stderr_of(worker)).count("is stuck at") == stalls


async def test_busy_instances_are_called_where_all_are(cluster: Cluster) -> None:
    async def echo(request: Any) -> Any:
        return request

    workers = [await cluster.worker(echo) for _ in range(2)]
    client = await cluster.client()
    await until(lambda: len(client.instance_ids()) == 2)

    async def publish(worker: Any, busy: bool) -> None:
        (endpoint,) = worker.worker.server.endpoints
        old: Instance = endpoint.instance
        await worker.discovery.register(Instance(NAME, old.id, old.addresses, old.host, busy=busy))
        await until(lambda: client.candidates.table.by_id[old.id].busy is busy)

    ids = {each.instance_id for each in workers}
    await publish(workers[0], True)
    assert {each.id for each in client.candidates.instances} == {workers[1].instance_id}
    client.candidates.mark_down(client.candidates.instances[0].addresses)  # stuck beats dead
    assert {each.id for each in client.candidates.instances} == {workers[0].instance_id}
    client.candidates.mark_up(client.candidates.table.by_id[workers[1].instance_id].addresses)
    await publish(workers[1], True)
    assert {each.id for each in client.candidates.instances} == ids
    assert [await patiently(client.call(n)) for n in range(4)] == [*range(4)]
    await publish(workers[0], False)
    await publish(workers[1], False)
    assert {each.id for each in client.candidates.instances} == ids

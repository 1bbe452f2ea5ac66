"""Workers that are stopped: what may be sent again goes elsewhere, everything else waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, patiently, until
from tests.runtime.programs import Program, program
from tests.timing import MS
from triton_distributed.runtime import Client

pytestmark = pytest.mark.any_loop

# Says who began what, and how it ended, in the folder that it is given; a file there holds its answers back.
WORKER = """
import asyncio, os, sys
from triton_distributed.runtime import DistributedRuntime

def note(word):
    with open(f"{sys.argv[1]}/{os.getpid()}", "a") as file:
        print(word, file=file)

async def main():
    runtime = DistributedRuntime(asyncio.get_running_loop())
    async def handler(request, context):
        note(f"began {request[:9]!s}")
        try:
            if request == "who":
                yield os.getpid()
            elif request == "count":
                for n in range(context.resume_token or 0, 400):
                    context.checkpoint(n + 1)
                    yield n
                    await asyncio.sleep(0.01)
            elif request == "unended":
                yield os.getpid()
                for _ in range(10):
                    await asyncio.sleep(0)  # an item leaves at the end of the turn
                note("answered")
                while os.path.exists(f"{sys.argv[1]}/hold-{os.getpid()}"):
                    await asyncio.sleep(0.01)
            else:
                while os.path.exists(f"{sys.argv[1]}/hold-{os.getpid()}"):
                    await asyncio.sleep(0.01)
                yield os.getpid()
        except asyncio.CancelledError:
            note(f"cancelled {request}")
            raise
    await runtime.endpoint("t.c.e").serve_endpoint(handler)

asyncio.run(main())
"""


class Pair:
    """Two workers, of which one can be stopped, and a client that prefers that one."""

    def __init__(self, cluster: Cluster, one: Program, other: Program, folder: Path) -> None:
        self._cluster, self.one, self.other, self._folder = cluster, one, other, folder
        self.ids: dict[int, int] = {}

    async def client(self) -> Client:
        client = await self._cluster.client(policy=self._preferred)
        await until(lambda: len(client.instance_ids()) == 2)
        for each in client.instance_ids():
            self.ids[await patiently(client.direct("who", each, annotated=False).__anext__())] = each
        return client

    def _preferred(self, request: Any, instances: Any, load: Any) -> Any:
        preferred = self.ids.get(self.one.pid)
        return next((each for each in instances if each.id == preferred), instances[0])

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The one that can be stopped holds its answers back."""
        file = self._folder / f"hold-{self.one.pid}"
        file.touch()
        yield
        file.unlink()

    def notes(self, worker: Program) -> list[str]:
        return (self._folder / str(worker.pid)).read_text().splitlines()


@pytest.fixture
async def pair(trd_dir: Path, tmp_path: Path) -> AsyncIterator[Pair]:
    cluster = Cluster(discovery="file", directory=trd_dir, health_timeout_s=400 * MS, connect_timeout_s=400 * MS)
    folder = str(tmp_path)
    async with program(tmp_path, WORKER, folder) as one, program(tmp_path, WORKER, folder) as other:
        yield Pair(cluster, one, other, tmp_path)
        await cluster.close()


async def begun(pair: Pair, request: str) -> None:
    await until(lambda: f"began {request}" in pair.notes(pair.one))


async def test_an_idempotent_call_leaves_a_stopped_worker_and_any_other_waits_for_it(pair: Pair) -> None:
    client = await pair.client()
    with pair.held():
        plain = asyncio.ensure_future(client.call("plain"))
        again = asyncio.ensure_future(client.call("again", idempotent=True))
        await begun(pair, "plain")
        await begun(pair, "again")
        pair.one.signal(signal.SIGSTOP)
        try:
            assert await patiently(again) == pair.other.pid
            assert not plain.done()
        finally:
            pair.one.signal(signal.SIGCONT)
        await until(lambda: "cancelled again" in pair.notes(pair.one))
    assert await patiently(plain) == pair.one.pid
    assert "cancelled plain" not in pair.notes(pair.one)
    assert pair.notes(pair.other) == ["began who", "began again"]


async def test_a_large_request_leaves_a_stopped_worker(pair: Pair) -> None:
    """The worker does not answer the offer of shared memory, and no stream is open yet."""
    client = await pair.client()
    pair.one.signal(signal.SIGSTOP)
    try:
        assert await patiently(client.call(bytes(1 << 20), idempotent=True)) == pair.other.pid
    finally:
        pair.one.signal(signal.SIGCONT)


async def test_an_idempotent_call_leaves_a_stopped_worker_whose_answer_had_not_ended(pair: Pair) -> None:
    client = await pair.client()
    with pair.held():
        call = asyncio.ensure_future(client.call("unended", idempotent=True))
        await until(lambda: "answered" in pair.notes(pair.one))
        pair.one.signal(signal.SIGSTOP)
        try:
            assert await patiently(call) == pair.other.pid
        finally:
            pair.one.signal(signal.SIGCONT)
        await until(lambda: "cancelled unended" in pair.notes(pair.one))


async def test_a_stream_that_can_be_resumed_goes_on_elsewhere_while_its_worker_is_stopped(pair: Pair) -> None:
    client = await pair.client()
    resumed, plain = client.generate("count", annotated=False, resume=True), client.generate("count", annotated=False)
    got = [await patiently(anext(resumed)) for _ in range(10)]
    assert [await patiently(anext(plain)) for _ in range(10)] == got
    pair.one.signal(signal.SIGSTOP)
    try:
        assert [*got, *await patiently(drained(resumed))] == [*range(400)]
        assert "began count" in pair.notes(pair.other)
    finally:
        pair.one.signal(signal.SIGCONT)
    assert [*got, *await patiently(drained(plain))] == [*range(400)]
    await until(lambda: "cancelled count" in pair.notes(pair.one))  # the one that moved


async def test_where_nobody_else_is_even_an_idempotent_call_waits(pair: Pair) -> None:
    client = await pair.client()
    with pair.held():
        call = asyncio.ensure_future(client.call("again", idempotent=True))
        await begun(pair, "again")
        for each in (pair.other, pair.one):
            each.signal(signal.SIGSTOP)
        try:
            other = asyncio.ensure_future(client.direct("who", pair.ids[pair.other.pid], annotated=False).__anext__())
            await until(lambda: len(client.candidates.rotation.down) == 2)
            await until(lambda: all(each.failures > 2 for each in client.candidates.rotation.down.values()))
            assert not call.done()
        finally:
            for each in (pair.other, pair.one):
                each.signal(signal.SIGCONT)
    assert await patiently(call) in (pair.one.pid, pair.other.pid)
    assert await patiently(other) == pair.other.pid


async def test_who_asked_for_this_worker_waits_for_it(pair: Pair) -> None:
    client = await pair.client()
    with pair.held():
        call = asyncio.ensure_future(
            client.direct("again", pair.ids[pair.one.pid], annotated=False, idempotent=True).__anext__()
        )
        await begun(pair, "again")
        pair.one.signal(signal.SIGSTOP)
        try:
            await until(lambda: client.candidates.rotation.down)
            assert await patiently(client.call("who")) == pair.other.pid
            assert not call.done()
        finally:
            pair.one.signal(signal.SIGCONT)
    assert await patiently(call) == pair.one.pid


async def test_requests_that_a_stopped_worker_does_not_take_go_elsewhere(pair: Pair) -> None:
    """They wait until it takes what was sent before, and no byte of them has left."""
    client = await pair.client()
    pair.one.signal(signal.SIGSTOP)
    try:
        # The first ones send as much as their streams' windows allow, until the socket takes no more. They are text,
        # because large buffers would travel in shared memory.
        large = [asyncio.ensure_future(client.call("x" * 1_000_000)) for _ in range(8)]
        session = client.pool.get(client.candidates.table.by_id[pair.ids[pair.one.pid]].addresses)
        assert session is not None
        await until(lambda: session.paused)
        waiting = [asyncio.ensure_future(client.call("who")) for _ in range(5)]
        assert {await patiently(each) for each in waiting} == {pair.other.pid}
        assert not large[0].done()
    finally:
        pair.one.signal(signal.SIGCONT)
    assert await patiently(large[0]) == pair.one.pid
    assert {await patiently(each) for each in large} <= {pair.one.pid, pair.other.pid}

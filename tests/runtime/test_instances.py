"""What a client and its policies know of the instances: state, own streams, and the load that workers report."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, patiently, until
from triton_distributed.errors import RuntimeClosed
from triton_distributed.names import Instance
from triton_distributed.routing.load import LoadBook, ReportedLoad
from triton_distributed.runtime import Client, Context, InstanceStatus
from triton_distributed.testing import run_in_virtual_time


class Held:
    """A handler whose requests end when the test says so."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.begun = 0

    async def handler(self, request: Any) -> Any:
        self.begun += 1
        await self.go.wait()
        return request


async def echo(request: Any) -> Any:
    return request


def loads(client: Client) -> dict[int, tuple[int, int] | None]:
    return {each.id: each.load and (each.load.in_flight, each.load.queued) for each in client.instances()}


@pytest.mark.any_loop
async def test_load_as_the_worker_reports_it(cluster: Cluster) -> None:
    held = Held()
    worker = await cluster.worker(held.handler, max_inflight=2, max_queue=5)
    other = cluster.runtime()
    ours, theirs = await cluster.client(), await other.endpoint("t.c.e").client()
    calls = [asyncio.ensure_future(theirs.call(n)) for n in range(5)]
    await until(lambda: held.begun == 2)
    assert loads(ours) == {worker.instance_id: None}  # not connected yet
    calls.append(asyncio.ensure_future(ours.call(5)))
    await until(lambda: loads(ours) == {worker.instance_id: (2, 4)})  # the calls of both clients
    [status] = ours.instances()
    assert (status.streams, status.state) == (1, "available")
    assert status.load is not None
    assert 0 <= status.load.age_s < 60
    held.go.set()
    await patiently(asyncio.gather(*calls))
    await until(lambda: loads(ours) == {worker.instance_id: (0, 0)})
    assert ours.instances()[0].streams == 0


async def test_a_policy_uses_the_reported_load(cluster: Cluster) -> None:
    """Two clients that know nothing of each other do not choose the same worker."""
    held = [Held(), Held()]
    workers = [await cluster.worker(each.handler) for each in held]

    def fewest(request: Any, instances: tuple[Instance, ...], load: LoadBook) -> Instance:
        known = {each.id: load.reported(each.id) for each in instances}
        figures.append(known)
        return min(instances, key=lambda each: found.in_flight if (found := known[each.id]) else 0)

    figures: list[dict[int, ReportedLoad | None]] = []
    other = cluster.runtime()
    theirs = await other.endpoint("t.c.e").client()
    calls = [asyncio.ensure_future(_of(theirs.direct(n, workers[0].instance_id))) for n in range(3)]
    await until(lambda: held[0].begun == 3)
    ours = await cluster.client(policy=fewest)
    for each in workers:  # connect
        calls.append(asyncio.ensure_future(_of(ours.direct(9, each.instance_id))))
    await until(lambda: held[0].begun + held[1].begun == 5)
    await until(lambda: loads(ours) == {workers[0].instance_id: (4, 0), workers[1].instance_id: (1, 0)})
    calls.append(asyncio.ensure_future(ours.call(9)))
    await until(lambda: held[1].begun == 2)
    assert [each.in_flight if each else None for each in figures[-1].values()] in ([4, 1], [1, 4])
    for one in held:
        one.go.set()
    await patiently(asyncio.gather(*calls))


async def _of(stream: Any) -> list[Any]:
    return [item async for item in stream]


async def test_nothing_is_asked_before_the_first_use(cluster: Cluster) -> None:
    client = await cluster.connect(echo)
    await patiently(client.call(1))
    [session] = client.pool.sessions
    assert not session.connection._on_load
    client.instances()
    assert list(session.connection._on_load) == [client.name.key]


async def test_loads_come_on_sessions_with_a_token_too(trd_dir: Path) -> None:
    cluster = Cluster(discovery="file", directory=trd_dir, token="a token of thirty-two characters")
    worker = await cluster.worker(echo)
    client = await cluster.client()
    await patiently(client.call(1))
    await until(lambda: loads(client) == {worker.instance_id: (0, 0)})
    await cluster.close()


async def test_one_session_reports_each_endpoint_alone(cluster: Cluster) -> None:
    held = Held()
    worker = await cluster.worker(held.handler, "t.c.one")
    await cluster.serve(worker, echo, "t.c.two")
    one, two = await cluster.client("t.c.one"), await cluster.client("t.c.two")
    call = asyncio.ensure_future(one.call(1))
    await patiently(two.call(1))
    await until(lambda: (loads(one), loads(two)) == ({worker.instance_id: (1, 0)}, {worker.instance_id: (0, 0)}))
    held.go.set()
    await patiently(call)


async def test_a_lost_worker_has_no_load_and_a_new_connection_is_asked_again(cluster: Cluster) -> None:
    worker = await cluster.worker(echo)
    client = await cluster.client()
    await patiently(client.call(1))
    await until(lambda: loads(client) == {worker.instance_id: (0, 0)})
    for session in client.pool.sessions:
        session.close("lost by the test")
    assert loads(client) == {worker.instance_id: None}
    assert [each.state for each in client.instances()] == ["unreachable"]
    await until(lambda: [each.state for each in client.instances()] == ["available"])
    await until(lambda: loads(client) == {worker.instance_id: (0, 0)})


async def test_states_metadata_and_order(cluster: Cluster) -> None:
    workers = [await cluster.worker(echo, metadata={"n": n}) for n in range(3)]
    client = await cluster.client()
    found = client.instances()
    assert [each.id for each in found] == sorted(each.instance_id for each in workers) == client.instance_ids()
    assert {each.id: each.metadata for each in found} == {w.instance_id: {"n": n} for n, w in enumerate(workers)}
    assert all(each.addresses and each.host and each.state == "available" for each in found)
    with pytest.raises(TypeError):
        found[0].metadata["n"] = 9  # type: ignore[index]
    with pytest.raises(AttributeError):
        found[0].state = "busy"  # type: ignore[misc]
    await workers[0].endpoint("t.c.e").pause()
    await until(lambda: workers[0].instance_id not in [each.id for each in client.instances()])


async def test_a_busy_and_an_ejected_instance(cluster: Cluster) -> None:
    workers = [await cluster.worker(echo) for _ in range(4)]
    client = await cluster.client()
    table = client.candidates.table
    table._replace(dataclasses.replace(each, busy=each.id == workers[0].instance_id) for each in table.instances)
    assert _states(client)[workers[0].instance_id] == "busy"
    for _ in range(5):
        client.candidates.ejector.failed(workers[1].instance_id)
        for peer in workers[2:]:
            for _ in range(20):
                client.candidates.ejector.answered(peer.instance_id)
    assert _states(client)[workers[1].instance_id] == "ejected"


def _states(client: Client) -> dict[int, str]:
    return {each.id: each.state for each in client.instances()}


async def test_after_the_end_of_the_runtime_there_is_a_clear_error(cluster: Cluster) -> None:
    client = await cluster.connect(echo)
    client.instances()
    await cluster.caller.close()
    with pytest.raises(RuntimeClosed, match="instances"):
        client.instances()


def test_reports_stop_when_nothing_uses_them() -> None:
    """In virtual time: reports come once a second while used, and end within a minute of the last use."""

    async def program() -> None:
        cluster = Cluster()
        worker = await cluster.worker(echo)
        client = await cluster.client()
        await client.call(1, context=Context("r"))
        client.instances()
        for _ in range(60):
            await asyncio.sleep(0.5)
            [status] = client.instances()
            assert status.load is not None
            assert status.load.age_s <= 1.2
        [session] = worker.worker.server.sessions
        reports = worker.worker.server._reports
        assert list(reports._clients) == [session.connection]
        await asyncio.sleep(60)
        assert reports._timer is None
        assert not reports._clients
        assert client.candidates._load_watch._timer is None
        assert _status(client).load is None  # an old report is not kept
        await asyncio.sleep(0.2)
        load = _status(client).load
        assert load is not None
        assert (load.in_flight, load.queued, round(load.age_s, 3)) == (0, 0, 0.2)
        await cluster.close()

    run_in_virtual_time(program())


def _status(client: Client) -> InstanceStatus:
    [status] = client.instances()
    return status

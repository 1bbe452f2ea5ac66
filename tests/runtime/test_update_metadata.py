"""`endpoint.update_metadata`: what a worker says of itself, changed while it serves."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, patiently, until
from triton_distributed.errors import DiscoveryError, NotServed
from triton_distributed.testing.servers import EtcdServer


async def handler(request: Any) -> Any:
    return request


@pytest.fixture(params=["memory", "file"])
async def anywhere(request: pytest.FixtureRequest, trd_dir: Path) -> AsyncIterator[Cluster]:
    made = Cluster(discovery=request.param, directory=trd_dir)
    yield made
    await made.close()


@pytest.fixture
async def in_etcd(lasting_etcd: EtcdServer, trd_dir: Path) -> AsyncIterator[Cluster]:
    prefix = f"metadata-{uuid.uuid4().hex}"
    made = Cluster(discovery="etcd", directory=trd_dir, etcd_endpoints=lasting_etcd.url, etcd_prefix=prefix)
    yield made
    await made.close()


async def check_the_change(cluster: Cluster) -> None:
    worker = await cluster.worker(handler, metadata={"state": "loading"})
    client = await cluster.client()
    table = client.candidates.table
    assert [dict(each.metadata) for each in table.instances] == [{"state": "loading"}]
    # A client may see the instance in etcd before the worker has etcd's answer.
    await until(lambda: worker.worker.server.endpoints[0].registered)
    metadata: dict[str, Any] = {"state": "ready", "models": ["a"]}
    await patiently(worker.endpoint("t.c.e").update_metadata(metadata))
    metadata["models"].append("b")  # It was copied.
    await until(lambda: [dict(each.metadata) for each in table.instances] == [{"state": "ready", "models": ["a"]}])
    assert await patiently(client.call(5)) == 5


async def test_clients_see_the_change(anywhere: Cluster) -> None:
    await check_the_change(anywhere)


async def test_clients_see_the_change_in_etcd(in_etcd: Cluster) -> None:
    await check_the_change(in_etcd)


async def test_a_paused_endpoint_publishes_it_when_it_resumes(anywhere: Cluster) -> None:
    worker = await anywhere.worker(handler)
    client = await anywhere.client()
    endpoint = worker.endpoint("t.c.e")
    await patiently(endpoint.pause())
    await until(lambda: not client.instance_ids())
    await patiently(endpoint.update_metadata({"awake": True}))
    assert not client.instance_ids()
    await patiently(endpoint.resume())
    await until(client.instance_ids)
    assert [dict(each.metadata) for each in client.candidates.table.instances] == [{"awake": True}]


async def test_what_cannot_be_published_is_refused_and_the_former_stays(anywhere: Cluster) -> None:
    worker = await anywhere.worker(handler, metadata={"state": "ready"})
    client = await anywhere.client()
    endpoint = worker.endpoint("t.c.e")
    with pytest.raises(DiscoveryError, match="metadata"):
        await patiently(endpoint.update_metadata({"value": object()}))
    with pytest.raises(NotServed):
        await worker.endpoint("t.c.other").update_metadata({})
    await patiently(endpoint.pause())
    await patiently(endpoint.resume())
    await until(client.instance_ids)
    assert [dict(each.metadata) for each in client.candidates.table.instances] == [{"state": "ready"}]

"""Components and namespaces publish and subscribe, on every plane alike."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.cluster import Cluster, patiently
from tests.servers import missing
from tests.timing import PATIENCE_S
from triton_distributed.config import Config
from triton_distributed.errors import ConfigError, InvalidName, MessageTooLarge, RuntimeClosed
from triton_distributed.external.nats import NatsConnection, NatsOptions
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.testing import NatsServer, ServerMissing


@dataclasses.dataclass
class Loaded:
    blocks: int
    kind: str


@pytest.fixture(params=["memory", "local", "nats"])
async def cluster(request: pytest.FixtureRequest, trd_dir: Path) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        settings = {"memory": {}, "local": {"discovery": "file", "directory": trd_dir}}.get(request.param)
        if settings is None:
            try:
                server = NatsServer(environ=os.environ)
            except ServerMissing as error:
                missing(error)
            settings = {"nats_server": (await stack.enter_async_context(server)).url}
        made = Cluster(**settings)
        yield made
        await made.close()


async def test_a_component_and_its_namespace(cluster: Cluster):
    one, other = cluster.runtime(), cluster.runtime()
    namespace = one.namespace("room/é")
    component = namespace.component("comp.onent")
    theirs = other.namespace("room/é")
    async with theirs.component("comp.onent").subscribe("loaded") as of_component, theirs.subscribe("loaded") as of_all:
        await component.publish("loaded", Loaded(3, "k"))
        await namespace.publish("loaded", [1, None, "é"])
        event = await of_component.get(PATIENCE_S)
        assert (event.name, event.data, event.publisher) == ("loaded", {"blocks": 3, "kind": "k"}, one.instance_id)
        assert event.subject == component.event_subject("loaded") == of_component.subject
        event = await of_all.get(PATIENCE_S)
        assert (event.name, event.data) == ("loaded", [1, None, "é"])
        assert event.subject == namespace.event_subject("loaded") == "namespace.room/%C3%A9.loaded"
        assert (of_component.waiting, of_all.waiting) == (0, 0)


async def test_arrays_and_buffers_travel(cluster: Cluster):
    component = cluster.runtime().namespace("t").component("c")
    subscriptions = [
        await each.namespace("t").component("c").subscribe("e") for each in (cluster.runtime(), cluster.runtime())
    ]
    sent: dict[str, Any] = {
        "array": np.arange(30_000.0).reshape(3, -1),
        "small": np.float32(1.5),
        "bytes": b"x" * 20_000,
    }
    await component.publish("e", sent)
    for each in subscriptions:
        data = (await each.get(PATIENCE_S)).data
        assert np.array_equal(data["array"], sent["array"])
        assert (data["small"], data["bytes"]) == (1.5, sent["bytes"])
        data["array"][:] = 0  # the other subscriber's is its own


async def test_names_that_nats_would_read_as_patterns(cluster: Cluster):
    one, other = cluster.runtime(), cluster.runtime()
    names = ["*", ">", "a.b", "a", "a b", "a%2Eb", "é" * 255]
    subscriptions = [await other.namespace("t").component("c").subscribe(name) for name in names]
    subscriptions += [await other.namespace(name).subscribe(name) for name in names]
    for name in names:
        await one.namespace("t").component("c").publish(name, f"{name} of c")
        await one.namespace(name).publish(name, name)
    expected = [f"{name} of c" for name in names] + names
    got = [(await each.get(PATIENCE_S)).data for each in subscriptions]
    assert got == expected
    assert [each.waiting for each in subscriptions] == [0] * len(subscriptions)


async def test_what_cannot_travel_raises_in_the_publisher(cluster: Cluster):
    component = cluster.runtime(max_message_bytes=64 * 1024).namespace("t").component("c")
    with pytest.raises(TypeError, match=r'event\["a"\]'):
        await component.publish("e", {"a": object()})
    with pytest.raises(MessageTooLarge, match="TRD_MAX_MESSAGE_BYTES"):
        await component.publish("e", bytes(64 * 1024))
    with pytest.raises(InvalidName, match="event"):
        await component.publish("", 1)
    for subscribe in (component.subscribe, cluster.runtime().namespace("t").subscribe):
        with pytest.raises(InvalidName, match="event"):
            subscribe("a\x00")
        with pytest.raises(ValueError, match="max_events=0"):
            subscribe("e", max_events=0)


async def test_the_end_of_a_runtime_ends_its_subscriptions(cluster: Cluster):
    runtime = cluster.runtime()
    component = runtime.namespace("t").component("c")
    subscription = await component.subscribe("e")

    async def reads() -> list[object]:
        return [event.data async for event in subscription]

    reading = asyncio.ensure_future(reads())
    await asyncio.sleep(0)
    await runtime.close()
    assert await patiently(reading) == []
    with pytest.raises(RuntimeClosed):
        await component.publish("e", 1)
    with pytest.raises(RuntimeClosed):
        component.subscribe("e")


async def test_who_only_publishes_lets_its_own_loop_turn():
    """2,000 events without a pause of their own, to somebody on the same loop who keeps 500."""
    async with DistributedRuntime(config=Config(discovery="memory")) as runtime:
        component = runtime.namespace("t").component("c")
        subscription = await component.subscribe("e", max_events=500)

        async def reads() -> list[int]:
            return [(await subscription.get(PATIENCE_S)).data for _ in range(2000)]

        reading = asyncio.ensure_future(reads())
        for number in range(2000):
            await component.publish("e", number)
        assert await patiently(reading) == list(range(2000))
        assert subscription.dropped == 0


async def test_the_subjects_on_nats_are_those_of_the_original(nats: NatsServer):
    connection = NatsConnection(NatsOptions(nats.url))
    client = await connection.client()
    raw = [
        await client.subscribe(subject)
        for subject in ("triton_init_backend_720278f8.events.kv_events", "namespace.triton-init.kv-hit-rate")
    ]
    await connection.settle(PATIENCE_S)
    async with DistributedRuntime(config=Config(discovery="memory", nats_server=nats.url)) as runtime:
        namespace = runtime.namespace("triton-init")
        await namespace.component("backend").publish("kv_events", 1)
        await namespace.publish("kv-hit-rate", 2)
        for subscription in raw:
            await subscription.next_msg(PATIENCE_S)
    await connection.close()


@pytest.mark.parametrize(
    ("environ", "plane"),
    [
        ({}, "local"),
        ({"TRD_DISCOVERY": "memory"}, "local"),
        ({"TRD_DISCOVERY": "static"}, ""),
        ({"ETCD_ENDPOINTS": "http://h:2379"}, ""),
        ({"ETCD_ENDPOINTS": "http://h:2379", "NATS_SERVER": "nats://h"}, "nats"),
        ({"ETCD_ENDPOINTS": "http://h:2379", "TRD_EVENTS": "local"}, "local"),
        ({"NATS_SERVER": "nats://h"}, "nats"),
        ({"NATS_SERVER": "nats://h", "TRD_EVENTS": "local"}, "local"),
        ({"TRD_EVENTS": "nats"}, "nats"),
    ],
)
def test_what_carries_events(environ, plane):
    assert Config.from_env(environ).event_plane == plane


@pytest.mark.parametrize(
    ("environ", "urls"),
    [
        ({}, ""),
        ({"TRD_EVENTS": "nats"}, "nats://localhost:4222"),
        ({"TRD_REQUEST_PLANE": "nats"}, "nats://localhost:4222"),
        ({"NATS_SERVER": "nats://h:1", "TRD_EVENTS": "nats"}, "nats://h:1"),
        ({"NATS_SERVER": "nats://h:1"}, "nats://h:1"),
    ],
)
def test_where_nats_is(environ, urls):
    assert Config.from_env(environ).nats_urls == urls


def test_an_unknown_plane_is_an_error():
    with pytest.raises(ConfigError, match="TRD_EVENTS='carrier pigeon': one of local, nats$"):
        Config.from_env({"TRD_EVENTS": "carrier pigeon"})


@pytest.mark.parametrize("discovery", ["etcd", "static"])
async def test_where_members_may_be_on_other_hosts_nothing_is_guessed(discovery: str, trd_dir: Path):
    settings: dict[str, Any] = {
        "discovery": discovery,
        "directory": trd_dir,
        "static": "t.c.e=tcp://127.0.0.1:1",
        "handle_signals": False,
    }
    async with DistributedRuntime(config=Config(**settings)) as runtime:
        component = runtime.namespace("t").component("c")
        with pytest.raises(ConfigError, match="NATS_SERVER.*TRD_EVENTS=local"):
            await component.publish("e", 1)
        with pytest.raises(ConfigError, match="NATS_SERVER.*TRD_EVENTS=local"):
            component.subscribe("e")
    async with DistributedRuntime(config=Config(**settings, events="local")) as runtime:
        component = runtime.namespace("t").component("c")
        async with component.subscribe("e") as subscription:
            await component.publish("e", 1)
            assert (await subscription.get(PATIENCE_S)).data == 1


async def test_who_uses_no_events_leaves_no_trace(trd_dir: Path):
    async with DistributedRuntime(config=Config(directory=trd_dir)) as runtime:
        assert runtime.namespace("t").component("c").event_subject("e")
    assert not (trd_dir / "events").exists()

"""What is particular to requests over NATS; everything else is tested on both planes."""

from __future__ import annotations

import asyncio
import functools
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, patiently, until
from tests.runtime.programs import program
from tests.timing import SCALE
from triton_distributed.errors import BrokerError, ConfigError, ConnectionFailed, StreamIncomplete
from triton_distributed.names import EndpointName, request_subject, service_name
from triton_distributed.testing import NatsServer
from triton_distributed.transport.address import Address
from triton_distributed.transport.nats import network
from triton_distributed.transport.nats.network import NatsNetwork

WORKER = """
import asyncio, os
from triton_distributed.runtime import DistributedRuntime

async def main():
    runtime = DistributedRuntime(asyncio.get_running_loop())
    async def handler(request):
        yield os.getpid()
        if request == "wait":
            yield 2
            await asyncio.Event().wait()
        if request == "fork":
            if os.fork() == 0:
                os.read(0, 1)  # lives as long as the test lets it
                os._exit(0)
            yield "forked"
            await asyncio.Event().wait()
    await runtime.endpoint("t.c.e").serve_endpoint(handler)

asyncio.run(main())
"""


async def echo(request: Any) -> Any:
    return request


@pytest.fixture
async def over_nats(nats: NatsServer) -> AsyncIterator[Cluster]:
    """Runtimes that share a NATS server that is this test's own."""
    made = Cluster(request_plane="nats", nats_server=nats.url, connect_timeout_s=2 * SCALE)
    yield made
    await made.close()


def beats_every(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "NatsNetwork", functools.partial(NatsNetwork, beat_s=seconds))


@pytest.mark.parametrize(
    ("endpoint", "token"),
    [
        ("generate", "generate"),
        ("chat/completions", "chat/completions"),
        ("a.b", "a%2Eb"),
        ("a b", "a%20b"),
        ("*", "%2A"),
        (">", "%3E"),
        ("é", "%C3%A9"),
    ],
)
def test_subjects(endpoint, token):
    subject = request_subject(EndpointName("n s", "c.*", endpoint), 0x1F)
    assert subject == f"{service_name('n s', 'c.*')}.{token}-1f"
    assert str(Address.parse(f"nats://{subject}")) == f"nats://{subject}"


def test_no_two_endpoints_share_a_subject():
    names = ["a.b", "a b", "a_b", "a*b", "a>b", "x" * 254, "x" * 255, "*", ">", "é", "è"]
    assert len({request_subject(EndpointName("n", "c", each), 1) for each in names}) == len(names)


async def test_a_worker_has_one_subject_and_a_client_one_session(over_nats: Cluster) -> None:
    names = [EndpointName("t", "c", each) for each in ("e", "a b", "*", ">", "a.b")]
    worker = over_nats.runtime()
    for name in names:
        endpoint = worker.namespace("t").component("c").endpoint(name.endpoint)
        endpoint.serve_endpoint(lambda request, name=name: f"{name.endpoint}: {request}")
    for name in names:
        client = await over_nats.caller.namespace("t").component("c").endpoint(name.endpoint).client()
        await patiently(client.wait_for_instances())
        assert await patiently(client.call(1)) == f"{name.endpoint}: 1"
        (instance,) = client.candidates.instances
        (address,) = instance.addresses
        assert address.startswith(f"nats://{service_name('t', 'c')}.")
        assert address.endswith(f"-{worker.instance_id:x}")
    assert len(over_nats.caller.statistics().sessions) == 1


async def test_a_client_calls_whatever_a_worker_publishes(over_nats: Cluster) -> None:
    await over_nats.worker(echo)
    direct = over_nats.runtime(request_plane="direct")
    await over_nats.serve(direct, echo)
    client = await over_nats.client()
    await until(lambda: len(client.instance_ids()) == 2)
    assert {each.addresses[0].split(":")[0] for each in client.candidates.instances} == {"nats", "memory"}
    assert [await patiently(client.call(n)) for n in range(10)] == [*range(10)]


@pytest.mark.parametrize("plane", ["direct", "nats"])
async def test_an_address_of_the_other_plane_is_refused(plane: str) -> None:
    cluster = Cluster(request_plane=plane, listen={"direct": "nats://a.b", "nats": "tcp://127.0.0.1:0"}[plane])
    with pytest.raises(ConfigError, match=f"TRD_REQUEST_PLANE is {plane}"):
        await cluster.runtime().endpoint("t.c.e").serve_endpoint(echo)
    await cluster.close()


async def test_without_a_server_workers_and_callers_name_it(over_nats: Cluster, nats: NatsServer) -> None:
    await over_nats.worker(echo)
    client = await over_nats.client()
    assert await patiently(client.call(1)) == 1
    nats.kill()
    late = over_nats.runtime(connect_timeout_s=0.3)
    with pytest.raises(BrokerError, match=f"NATS at {nats.url}: .*tried for 0.3 s"):
        await patiently(late.endpoint("t.c.other").serve_endpoint(echo))
    lonely = await over_nats.runtime(connect_timeout_s=0.3).endpoint("t.c.e").client()
    with pytest.raises(ConnectionFailed, match=f"NATS at {nats.url}"):
        await patiently(lonely.call(1))
    await nats.start()
    assert await patiently(client.call(2)) == 2


async def test_calls_go_on_over_a_restart_of_the_server(over_nats: Cluster, nats: NatsServer) -> None:
    go = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[Any]:
        yield "before"
        await go.wait()
        yield "after"

    client = await over_nats.connect(handler)
    reading = aiter(client.generate(1, annotated=False))
    assert await patiently(anext(reading)) == "before"
    nats.kill()
    await until(lambda: not over_nats.caller.nats.connected)
    go.set()
    later = client.generate(2, annotated=False)
    await nats.start()
    assert [each async for each in reading] == ["after"]
    assert await patiently(drained(later)) == ["before", "after"]


async def killed(worker: Any, client: Any) -> None:
    stream = client.generate("wait", annotated=False)
    items = [await patiently(anext(stream)), await patiently(anext(stream))]
    worker.signal(signal.SIGKILL)
    with pytest.raises(StreamIncomplete, match="nothing listens on its subject") as caught:
        await patiently(anext(stream))
    assert items == [worker.pid, 2]
    assert caught.value.items == 2
    assert caught.value.address.startswith("nats://")
    assert not len(client.load)
    await worker.ended()


async def test_a_killed_worker_is_noticed_as_soon_as_discovery_notices(
    nats: NatsServer, trd_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats_every(3600, monkeypatch)
    cluster = Cluster(discovery="file", directory=trd_dir, request_plane="nats", nats_server=nats.url)
    environment = {"TRD_REQUEST_PLANE": "nats", "NATS_SERVER": nats.url}
    async with program(tmp_path, WORKER, environment=environment) as worker:
        await killed(worker, await cluster.client())
    await cluster.close()


async def test_a_killed_worker_is_noticed_by_the_next_beat(
    nats: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Static discovery notices nothing."""
    beats_every(0.05, monkeypatch)
    static = "t.c.e=nats://some.where"
    cluster = Cluster(discovery="static", static=static, request_plane="nats", nats_server=nats.url)
    environment = {
        "TRD_REQUEST_PLANE": "nats", "NATS_SERVER": nats.url,
        "TRD_DISCOVERY": "static", "TRD_STATIC": static, "TRD_LISTEN": "nats://some.where",
    }  # fmt: skip
    async with program(tmp_path, WORKER, environment=environment) as worker:
        client = await cluster.client()

        async def answers() -> bool:
            try:
                return bool(await client.call(1))
            except ConnectionFailed:
                return False

        while not await patiently(answers()):
            pass
        await killed(worker, client)
    await cluster.close()


async def test_a_forked_child_does_not_keep_the_connection_of_its_dead_parent(
    nats: NatsServer, trd_dir: Path, tmp_path: Path
) -> None:
    cluster = Cluster(discovery="file", directory=trd_dir, request_plane="nats", nats_server=nats.url)
    environment = {"TRD_REQUEST_PLANE": "nats", "NATS_SERVER": nats.url}
    async with program(
        tmp_path, WORKER, environment=environment, options=("-W", "ignore::DeprecationWarning")
    ) as worker:
        client = await cluster.client()
        stream = client.generate("fork", annotated=False)
        assert [await patiently(anext(stream)), await patiently(anext(stream))] == [worker.pid, "forked"]
        worker.signal(signal.SIGKILL)
        with pytest.raises(StreamIncomplete, match="nothing listens on its subject"):
            await patiently(anext(stream))
    await cluster.close()

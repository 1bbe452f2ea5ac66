"""Work queues on a real JetStream: consumers die, servers die, nothing that was stored is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.cluster import Cluster, patiently, until
from tests.runtime.programs import program
from tests.timing import MS, PATIENCE_S
from triton_distributed.config import Config
from triton_distributed.errors import BrokerError, ConfigError, InvalidName, MessageTooLarge, RuntimeClosed
from triton_distributed.events import WorkQueue
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.testing import NatsServer

# Takes messages and says which; acknowledges but for `hold`, with which it stands still.
TAKES = """
import asyncio, sys
from triton_distributed.config import Config
from triton_distributed.runtime import DistributedRuntime

async def main():
    async with DistributedRuntime(config=Config.from_env(handle_signals=False)) as runtime:
        queue = runtime.namespace("t").component("c").queue("jobs", ack_wait_s=float(sys.argv[1]))
        async with queue.pull() as messages:
            print("ready", flush=True)
            async for message in messages:
                print("took", message.data, message.attempt, flush=True)
                if message.data == "hold":
                    await asyncio.sleep(3600)
                await message.ack()
                if message.data == "end":
                    return

asyncio.run(main())
"""


@pytest.fixture
async def cluster(nats: NatsServer) -> AsyncIterator[Cluster]:
    made = Cluster(nats_server=nats.url)
    yield made
    await made.close()


def jobs(runtime: DistributedRuntime, **options: Any) -> WorkQueue:
    return runtime.namespace("t").component("c").queue("jobs", **options)


async def test_what_is_put_is_taken_once_in_order(cluster: Cluster):
    one, other = jobs(cluster.runtime()), jobs(cluster.runtime())
    for number in range(20):
        await one.put(number)
    assert await other.depth() == 20
    for number in range(20):
        message = await other.get(PATIENCE_S)
        assert (message.data, message.attempt) == (number, 1)
        await message.ack()
    assert await one.depth() == 0
    with pytest.raises(TimeoutError, match='queue "jobs" of t/c: no message within 0.05 s'):
        await other.get(0.05)


async def test_it_waits_for_what_is_put_later(cluster: Cluster):
    one, other = cluster.runtime(), cluster.runtime()
    taking = asyncio.ensure_future(jobs(other).get())
    await jobs(one).put("first")
    message = await patiently(taking)
    assert message.data == "first"
    assert message.publisher == one.instance_id
    await message.ack()


async def test_payloads_are_those_of_requests(cluster: Cluster):
    queue = jobs(cluster.runtime())
    await queue.put({"array": np.arange(10_000.0), "bytes": b"x" * 30_000, "none": None})
    data = (await queue.get(PATIENCE_S)).data
    assert np.array_equal(data["array"], np.arange(10_000.0))
    data["array"][0] = 1
    assert (data["bytes"], data["none"]) == (b"x" * 30_000, None)
    with pytest.raises(TypeError, match="message"):
        await queue.put(object())
    with pytest.raises(MessageTooLarge, match="max_payload of the NATS server"):
        await queue.put(bytes(2_000_000))
    small = jobs(cluster.runtime(max_message_bytes=64 * 1024))
    with pytest.raises(MessageTooLarge, match="TRD_MAX_MESSAGE_BYTES"):
        await small.put(bytes(70_000))


async def test_giving_back(cluster: Cluster):
    queue = jobs(cluster.runtime())
    await queue.put("job")
    for attempt in (1, 2, 3):
        message = await queue.get(PATIENCE_S)
        assert message.attempt == attempt
        await message.nack()
    message = await queue.get(PATIENCE_S)
    await message.nack(delay=60)
    with pytest.raises(TimeoutError):
        await queue.get(0.05)
    assert await queue.depth() == 1
    with pytest.raises(ValueError, match="delay"):
        await message.nack(-1)


async def test_who_says_nothing_loses_it_and_who_is_in_progress_does_not(cluster: Cluster):
    queue, other = jobs(cluster.runtime(), ack_wait_s=0.5), jobs(cluster.runtime(), ack_wait_s=0.5)
    loop = asyncio.get_running_loop()
    await queue.put("silent")
    message = await queue.get(PATIENCE_S)
    start = loop.time()
    again = await other.get(PATIENCE_S)
    assert again.attempt == 2
    assert loop.time() - start > 0.4
    end = loop.time() + 1.5
    taking = asyncio.ensure_future(queue.get(1.5))
    while loop.time() < end:
        await again.in_progress()
        await asyncio.wait([taking], timeout=0.05)
    with pytest.raises(TimeoutError):
        await taking
    await again.ack()
    await again.ack()  # twice is harmless, and so is a late word of whoever had it first
    await message.ack()
    assert await queue.depth() == 0


async def test_the_last_delivery(cluster: Cluster, caplog):
    queue = jobs(cluster.runtime(), max_deliveries=2)
    await queue.put("poison")
    await queue.put("good")
    for _ in range(2):
        message = await queue.get(PATIENCE_S)
        assert message.data == "poison"
        await message.nack()
    message = await queue.get(PATIENCE_S)
    assert message.data == "good"
    await message.ack()
    with pytest.raises(TimeoutError):
        await queue.get(0.2)
    assert await queue.depth() == 0
    assert [each.message for each in caplog.records if each.levelno == logging.ERROR] == [
        'queue "jobs" of t/c: a message is dropped after 2 deliveries without ack'
    ]


async def test_pulling_ahead_and_leaving_gives_back_what_was_not_handed_out(cluster: Cluster):
    queue = jobs(cluster.runtime())
    for number in range(50):
        await queue.put(number)
    async with queue.pull(ahead=16) as messages:
        async for message in messages:
            await message.ack()
            if message.data == 4:
                break
    assert await queue.depth() == 45
    got: set[object] = set()
    async with jobs(cluster.runtime()).pull(ahead=100) as messages:
        while len(got) < 45:
            message = await messages.next(PATIENCE_S)
            got.add(message.data)
            await message.ack()
    assert got == set(range(5, 50))
    assert await queue.depth() == 0


async def test_competing_processes_share(cluster: Cluster, nats: NatsServer, tmp_path: Path):
    queue = jobs(cluster.runtime())
    environment = {"NATS_SERVER": nats.url}
    async with (
        program(tmp_path, TAKES, "30", environment=environment) as one,
        program(tmp_path, TAKES, "30", environment=environment) as other,
    ):
        for each in (one, other):
            assert await each.line() == "ready"
        for number in range(100):
            await queue.put(number)
        await queue.put("end")
        await queue.put("end")
        outputs = [(await each.output())[0].splitlines() for each in (one, other)]
        took = [[line.split()[1] for line in lines] for lines in outputs]
        assert sorted(int(each) for each in took[0] + took[1] if each != "end") == list(range(100))
        assert all(each[-1] == "end" for each in took)
        assert all(line.endswith(" 1") for lines in outputs for line in lines)
    assert await queue.depth() == 0


async def test_a_killed_consumers_message_goes_to_another(cluster: Cluster, nats: NatsServer, tmp_path: Path):
    queue = jobs(cluster.runtime(), ack_wait_s=1)
    environment = {"NATS_SERVER": nats.url}
    async with program(tmp_path, TAKES, "1", environment=environment) as victim:
        assert await victim.line() == "ready"
        await queue.put("hold")
        assert await victim.line() == "took hold 1"
        victim.signal(signal.SIGKILL)
        await victim.ended()
    assert await queue.depth() == 1
    message = await queue.get(PATIENCE_S)
    assert (message.data, message.attempt) == ("hold", 2)
    await message.ack()
    assert await queue.depth() == 0


@pytest.mark.slow
async def test_a_server_that_is_killed_and_started_again_keeps_everything(cluster: Cluster, nats: NatsServer):
    producer, consumer = jobs(cluster.runtime()), jobs(cluster.runtime())
    for number in range(10):
        await producer.put(number)
    held = await consumer.get(PATIENCE_S)
    got: list[int] = []

    async def consumes() -> None:
        async with consumer.pull(ahead=4) as messages:
            while len({*got, 0}) < 30:
                message = await messages.next()
                got.append(message.data)
                with contextlib.suppress(BrokerError):  # a server that was killed may forget a delivery, and repeat it
                    await message.ack()

    consuming = asyncio.ensure_future(consumes())
    await until(lambda: len(got) >= 9 and all(each._asked for each in consumer.pulls))  # a request stands
    nats.kill()
    putting = asyncio.gather(*(producer.put(number) for number in range(10, 30)))
    await until(lambda: not producer.jetstream.connection.connected)
    await nats.start()
    await patiently(putting)
    await patiently(consuming)
    assert sorted({*got, held.data}) == list(range(30))
    with contextlib.suppress(BrokerError):
        await held.ack()
    while await producer.depth():
        await (await patiently(consumer.get())).ack()


async def test_what_is_sent_again_is_stored_once(cluster: Cluster, nats: NatsServer, monkeypatch):
    monkeypatch.setattr("triton_distributed.events.jetstream.ATTEMPT_S", 200 * MS)
    queue = jobs(cluster.runtime())
    await queue.put(1)
    client = await queue.jetstream.connection.client()
    sent = client.stats["out_msgs"]
    nats.freeze()
    putting = asyncio.ensure_future(queue.put(2))
    try:
        await until(lambda: client.stats["out_msgs"] > sent + 1)  # the first attempt is over, its message is on its way
    finally:
        nats.thaw()
    await patiently(putting)
    assert await queue.depth() == 2


async def test_a_server_that_came_back_empty_gets_the_queue_anew(cluster: Cluster, nats: NatsServer):
    queue = jobs(cluster.runtime())
    await queue.put("lost")
    taking = asyncio.ensure_future(_second(queue))
    nats.kill()
    nats.empty()
    await until(lambda: not queue.jetstream.connection.connected)
    await nats.start()
    await patiently(queue.put("kept"))
    assert (await patiently(taking)).data == "kept"


async def _second(queue: WorkQueue) -> Any:
    async with queue.pull() as messages:
        first = await messages.next()
        if first.data == "kept":
            return first
        return await messages.next()


async def test_a_server_that_is_gone_is_an_error_in_time(cluster: Cluster, nats: NatsServer):
    queue = jobs(cluster.runtime())
    await queue.put(1)
    nats.kill()
    await until(lambda: not queue.jetstream.connection.connected)
    with pytest.raises(BrokerError, match='queue "jobs" of t/c: stored nothing: not connected') as caught:
        await queue.put(2, timeout=300 * MS)
    assert nats.url in str(caught.value)


async def test_a_server_without_jetstream_says_what_it_needs(monkeypatch, nats: NatsServer):
    nats.stop()
    monkeypatch.setattr(NatsServer, "command", lambda self: [self._program, "-a", "127.0.0.1", "-p", str(self.port)])
    await nats.start()
    runtime = DistributedRuntime(config=Config(discovery="memory", nats_server=nats.url))
    queue = jobs(runtime)
    for attempt in (queue.put(1), queue.get(PATIENCE_S), queue.depth()):
        with pytest.raises(BrokerError, match="nats-server -js"):
            await patiently(attempt)
    await runtime.close()


async def test_a_full_queue_refuses(cluster: Cluster, monkeypatch):
    monkeypatch.setattr("triton_distributed.events.jetstream.MAX_MESSAGES", 3)
    queue = jobs(cluster.runtime())
    for number in range(3):
        await queue.put(number)
    with pytest.raises(BrokerError, match='queue "jobs" of t/c: .'):
        await queue.put(3)
    assert await queue.depth() == 3


async def test_the_end_of_the_runtime_ends_waiting(cluster: Cluster):
    runtime = cluster.runtime()
    taking = asyncio.ensure_future(jobs(runtime).get())
    await until(lambda: runtime.events._pulls and next(iter(runtime.events._pulls))._asked)
    await runtime.close()
    with pytest.raises(RuntimeClosed):
        await patiently(taking)
    with pytest.raises(RuntimeClosed):
        jobs(runtime)


async def test_queues_with_unusual_names_stay_apart(cluster: Cluster):
    runtime = cluster.runtime()
    names = ["a.b", "a>b", "a*b", "a b", "A.B", "é" * 255, "a/b", "$SYS"]
    queues = [runtime.namespace("x/y z").component("c.*").queue(name) for name in names]
    for name, queue in zip(names, queues, strict=True):
        await queue.put(name)
    for name, queue in zip(names, queues, strict=True):
        assert (await queue.get(PATIENCE_S)).data == name
        assert await queue.depth() == 1


async def test_without_nats():
    async with DistributedRuntime(config=Config(discovery="memory")) as runtime:
        with pytest.raises(ConfigError, match="NATS_SERVER.*JetStream"):
            jobs(runtime)


@pytest.mark.parametrize("options", [{"ack_wait_s": 0}, {"max_deliveries": 0}, {"ack_wait_s": -1.0}])
async def test_limits_that_are_none(options):
    async with DistributedRuntime(config=Config(discovery="memory", nats_server="nats://127.0.0.1:1")) as runtime:
        with pytest.raises(ValueError, match=next(iter(options))):
            jobs(runtime, **options)
        with pytest.raises(InvalidName, match="queue"):
            runtime.namespace("t").component("c").queue("")
        with pytest.raises(ValueError, match="ahead"):
            jobs(runtime).pull(ahead=0)

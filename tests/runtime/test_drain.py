"""Shutdown: what runs finishes, what is new goes elsewhere, and nothing is left."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, patiently, turns, until
from tests.runtime.programs import program
from triton_distributed.errors import Draining, NoInstances, StreamIncomplete
from triton_distributed.names import EndpointName
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.system.signals import ECHO_S
from triton_distributed.transport.address import Address
from triton_distributed.wire import frames as f
from triton_distributed.wire.decoder import FrameDecoder
from triton_distributed.wire.hello import Hello, hello_frame


class Slow:
    """Streams items, one each time it is let on."""

    def __init__(self) -> None:
        self.began = 0
        self.go = asyncio.Event()

    async def __call__(self, request: Any) -> AsyncIterator[Any]:
        self.began += 1
        yield "first"
        await self.go.wait()
        yield "last"


@pytest.mark.any_loop
async def test_shutdown_returns_at_once_and_serving_completes_with_none(cluster: Cluster) -> None:
    async def echo(request: Any) -> Any:
        return request

    runtime = cluster.runtime()
    tasks = [await cluster.serve(runtime, echo, f"t.c.e{n}") for n in range(3)]
    assert runtime.shutdown() is None  # type: ignore[func-returns-value]
    assert not any(each.done() for each in tasks)
    assert await patiently(asyncio.gather(*tasks)) == [None, None, None]
    runtime.shutdown()
    await runtime.close()
    await runtime.close()


LATER = pytest.mark.parametrize("later", [0, 1, 2, 3, 5, 10])


async def begun_then_shut_down(cluster: Cluster, later: int) -> None:
    async def echo(request: Any) -> Any:
        return request

    runtime = cluster.runtime()
    serving = runtime.endpoint("t.c.e").serve_endpoint(echo)
    await turns(later)
    runtime.shutdown()
    assert await patiently(serving) is None  # type: ignore[func-returns-value]


@LATER
async def test_serving_that_has_just_begun_completes_with_none(later: int, cluster: Cluster) -> None:
    await begun_then_shut_down(cluster, later)


@LATER
async def test_serving_that_has_just_begun_to_listen_completes_with_none(later: int, unix: Cluster) -> None:
    await begun_then_shut_down(unix, later)


@pytest.mark.any_loop
async def test_what_runs_finishes_and_what_is_new_goes_elsewhere(cluster: Cluster) -> None:
    slow = Slow()

    async def other(request: Any) -> AsyncIterator[str]:
        yield "other"

    draining = await cluster.worker(slow)
    client = await cluster.client()
    stream = client.generate(1, annotated=False)
    reading = aiter(stream)
    assert await patiently(anext(reading)) == "first"
    await cluster.worker(other)
    closing = asyncio.create_task(draining.close())
    await turns()
    for _ in range(10):
        assert await patiently(drained(client.generate(1, annotated=False))) == ["other"]
    assert slow.began == 1
    assert not closing.done()
    slow.go.set()
    assert [item async for item in reading] == ["last"]
    await patiently(closing)
    assert await patiently(drained(client.generate(1, annotated=False))) == ["other"]


async def test_with_nobody_else_the_error_says_that_it_drains(cluster: Cluster) -> None:
    slow = Slow()
    draining = await cluster.worker(slow)
    client = await cluster.client()
    stream = client.generate(1, annotated=False)
    reading = aiter(stream)
    await patiently(anext(reading))
    closing = asyncio.create_task(draining.close())
    await turns()
    with pytest.raises((Draining, NoInstances, ConnectionError)):
        await patiently(client.call(1))
    slow.go.set()
    assert [item async for item in reading] == ["last"]
    await patiently(closing)


async def test_what_waits_in_the_queue_goes_elsewhere(cluster: Cluster) -> None:
    slow = Slow()

    async def other(request: Any) -> AsyncIterator[str]:
        yield "other"

    draining = await cluster.worker(slow, max_inflight=1, max_queue=10)
    client = await cluster.client()
    first = client.generate(1, annotated=False)
    reading = aiter(first)
    await patiently(anext(reading))
    waiting = [client.generate(n, annotated=False) for n in range(5)]
    await turns()
    await cluster.worker(other)
    closing = asyncio.create_task(draining.close())
    for each in waiting:
        assert await patiently(drained(each)) == ["other"]
    slow.go.set()
    assert [item async for item in reading] == ["last"]
    await patiently(closing)


async def test_without_grace_what_runs_is_cut_at_once(cluster: Cluster) -> None:
    ended = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            ended.set()

    worker = await cluster.worker(handler, graceful_shutdown=False)
    client = await cluster.client()
    reading = aiter(client.generate(1, annotated=False))
    await patiently(anext(reading))
    await patiently(worker.close())
    assert ended.is_set()
    with pytest.raises(StreamIncomplete):
        await patiently(anext(reading))


@pytest.mark.parametrize("idempotent", [False, True])
async def test_an_idempotent_call_that_a_shutdown_cuts_goes_elsewhere(idempotent: bool, cluster: Cluster) -> None:
    began: list[int] = []

    async def handler(request: Any) -> str:
        began.append(request)
        if len(began) == 1:
            await asyncio.Event().wait()
        return "answer"

    worker = await cluster.worker(handler, graceful_shutdown=False)
    client = await cluster.client()
    calling = asyncio.ensure_future(client.call(1, idempotent=idempotent))
    await until(lambda: began)
    await cluster.worker(handler)
    await patiently(worker.close())
    if idempotent:
        assert await patiently(calling) == "answer"
    else:
        with pytest.raises(StreamIncomplete):
            await patiently(calling)
    assert len(began) == 1 + idempotent


async def test_a_drain_is_bounded() -> None:
    cluster = Cluster(drain_timeout_s=0.05)
    slow = Slow()
    worker = await cluster.worker(slow)
    client = await cluster.client()
    reading = aiter(client.generate(1, annotated=False))
    await patiently(anext(reading))
    await patiently(worker.close())
    with pytest.raises(StreamIncomplete):
        await patiently(anext(reading))
    await cluster.close()


async def test_cancelling_one_serve_task_leaves_the_others(cluster: Cluster) -> None:
    async def echo(request: Any) -> Any:
        return request

    runtime = cluster.runtime()
    one = await cluster.serve(runtime, echo, "t.c.one")
    await cluster.serve(runtime, echo, "t.c.other")
    gone = await cluster.client("t.c.one")
    one.cancel()
    await asyncio.wait([one])
    assert one.cancelled()
    assert gone.instance_ids() == []
    assert await patiently((await cluster.client("t.c.other")).call(5)) == 5
    await cluster.serve(runtime, echo, "t.c.one")
    assert await patiently(gone.call(6)) == 6


async def test_a_runtime_is_a_context_manager_and_tells_its_state(cluster: Cluster) -> None:
    async with DistributedRuntime(asyncio.get_running_loop(), config=cluster.caller.config) as runtime:
        assert "open" in repr(runtime)
    assert "closed" in repr(runtime)


@pytest.mark.any_loop
async def test_a_session_that_is_just_being_made_holds_up_no_shutdown(cluster: Cluster) -> None:
    async def echo(request: Any) -> Any:
        return request

    runtime = cluster.runtime()
    serving = await cluster.serve(runtime, echo)
    session = runtime.worker.server._listener._accept()  # its transport comes in a later turn of the loop
    runtime.shutdown()
    assert await patiently(serving) is None  # type: ignore[func-returns-value]
    assert session.lost


@pytest.mark.any_loop
async def test_what_the_kernel_still_holds_reaches_a_client_that_says_something(cluster: Cluster) -> None:
    """Closed at once, a TCP socket would answer its CREDIT with a reset, and throw the answer away."""

    async def handler(request: Any) -> AsyncIterator[bytes]:
        for _ in range(20):
            yield bytes(10_000)

    loop = asyncio.get_running_loop()
    runtime = cluster.runtime(request_plane="direct", listen="tcp://127.0.0.1:0")
    await cluster.serve(runtime, handler)
    address = Address.parse(runtime.statistics().endpoints[0].addresses[0])
    with socket.socket() as client:
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await loop.sock_connect(client, (address.host, address.port))
        key = EndpointName("t", "c", "e").key
        request = f.REQUEST_PREFIX.pack(runtime.instance_id, key, float("inf"), 1 << 20, 0) + b"\x01"
        await loop.sock_sendall(client, hello_frame(Hello()) + f.frame(f.REQUEST, 1, request, f.END))
        await until(lambda: runtime.stats()["t/components/c/e"].ended[0])
        closing = asyncio.create_task(runtime.close())
        await turns(100)
        await loop.sock_sendall(client, f.frame(f.CREDIT, 1, f.UINT32.pack(1000)))
        await turns(100)
        heard = b""
        while piece := await patiently(loop.sock_recv(client, 4096)):
            heard += piece
            assert not closing.done()
    decoder = FrameDecoder()
    decoder.limit = f.MAX_FRAME
    items = [(flags, payload) for _, flags, stream, payload in decoder.feed(heard) if stream == 1]
    assert b"".join(payload for _, payload in items).count(bytes(10_000)) == 20
    assert items[-1][0] & f.END
    await patiently(closing)


@pytest.mark.any_loop
async def test_a_client_that_reads_nothing_keeps_a_drained_worker_for_so_long(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton_distributed.transport.session.PART_S", 0.05)
    runtime = cluster.runtime(request_plane="direct", listen="tcp://127.0.0.1:0")
    await cluster.serve(runtime, Slow())
    address = Address.parse(runtime.statistics().endpoints[0].addresses[0])
    with socket.create_connection((address.host, address.port)) as client:
        client.sendall(hello_frame(Hello()))
        sessions = runtime.worker.server.sessions
        await until(lambda: sessions)
        (session,) = sessions
        await patiently(session.ready)
        await patiently(runtime.close())
        assert session.lost


# --- signals ---------------------------------------------------------------------------------------------------------


WORKER = """
import asyncio, sys
from triton_distributed.runtime import DistributedRuntime, triton_worker

@triton_worker()
async def main(runtime):
    async def handler(request, context):
        yield context.id()
        if request == "go on":
            print("running", flush=True)
            await go.wait()
            yield "last"
        if request == "for ever":
            print("running", flush=True)
            await asyncio.Event().wait()
    go = asyncio.Event()

    async def release(request):
        go.set()

    await asyncio.gather(
        runtime.endpoint("t.c.e").serve_endpoint(handler),
        runtime.endpoint("t.c.release").serve_endpoint(release),
    )
    print("served", flush=True)

if len(sys.argv) > 1:
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_the_worker_exits_with_0(
    number: signal.Signals, loop: str, unix: Cluster, tmp_path: Path
) -> None:
    async with program(tmp_path, WORKER, *(["uvloop"] if loop == "uvloop" else [])) as worker:
        client, release = await unix.client(), await unix.client("t.c.release")
        reading = aiter(client.generate("go on", annotated=False))
        await patiently(anext(reading))
        assert await worker.line() == "running"
        held = release.generate(None)  # connected, and not refused, before the drain
        await patiently(drained(held))
        worker.signal(number)
        assert [item async for item in reading] == ["last"]
        assert await worker.ended() == 0
        assert (await worker.output())[0] == "served\n"
        assert client.instance_ids() == []


async def test_an_idle_worker_exits_with_0(unix: Cluster, tmp_path: Path) -> None:
    async with program(tmp_path, WORKER) as worker:
        client = await unix.client()
        worker.signal(signal.SIGTERM)
        assert await worker.ended() == 0
        await until(lambda: not client.instance_ids())


async def test_during_a_drain_requests_go_to_another_process(unix: Cluster, tmp_path: Path) -> None:
    async with program(tmp_path, WORKER) as one:
        client = await unix.client()
        reading = aiter(client.generate("for ever", annotated=False))
        await patiently(anext(reading))
        assert await one.line() == "running"
        async with program(tmp_path, WORKER):
            await until(lambda: len(client.instance_ids()) == 2)
            one.signal(signal.SIGTERM)
            for _ in range(50):
                assert len(await patiently(drained(client.generate("short", annotated=False)))) == 1
            await until(lambda: len(client.instance_ids()) == 1)
        one.signal(signal.SIGTERM)
        with pytest.raises(StreamIncomplete):
            await patiently(anext(reading))
        await one.ended()


@pytest.mark.leaves("socket files", reason="the second signal ends the worker without cleaning up")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_second_signal_exits_now_and_names_what_was_cut(loop: str, unix: Cluster, tmp_path: Path) -> None:
    async with program(tmp_path, WORKER, *(["uvloop"] if loop == "uvloop" else [])) as worker:
        client = await unix.client()
        reading = aiter(client.generate("for ever", annotated=False))
        name = await patiently(anext(reading))
        assert await worker.line() == "running"
        worker.signal(signal.SIGTERM)
        await until(lambda: not client.instance_ids())
        await asyncio.sleep(2 * ECHO_S)  # a second signal, not an echo of the first
        worker.signal(signal.SIGTERM)
        assert await worker.ended() not in (0, None)
        _, err = await worker.output()
        assert name in err
        assert "1 request(s) cut" in err
        with pytest.raises(StreamIncomplete):
            await patiently(anext(reading))


@pytest.mark.leaves("socket files", reason="SIGTERM ends it without cleaning up, as it would any program")
async def test_signals_are_left_alone_where_asked(unix: Cluster, tmp_path: Path) -> None:
    async with program(tmp_path, WORKER, environment={"TRD_HANDLE_SIGNALS": "0"}) as worker:
        await unix.client()
        worker.signal(signal.SIGTERM)
        assert await worker.ended() == -signal.SIGTERM


async def test_a_signal_that_is_repeated_while_an_idle_worker_ends_changes_nothing(
    unix: Cluster, tmp_path: Path
) -> None:
    """As `timeout` sends it: to the process and to its group."""
    async with program(tmp_path, WORKER) as worker:
        await unix.client()
        for _ in range(3):
            worker.signal(signal.SIGTERM)
        assert await worker.ended() == 0
        _, err = await worker.output()
        assert err == ""

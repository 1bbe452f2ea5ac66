"""The client of etcd's gateway, against a real one."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator

import pytest

from tests.timing import PATIENCE_S
from triton_distributed.external import etcd_messages as messages
from triton_distributed.external.etcd import EtcdClient
from triton_distributed.external.etcd_endpoint import EtcdOptions, EtcdRefused, EtcdUnreachable, refusal
from triton_distributed.testing import EtcdServer, FaultProxy
from triton_distributed.testing.servers import free_port

MIB = 1024 * 1024
OUT_OF_RANGE = 11  # a code of gRPC


@pytest.fixture
async def client(lasting_etcd: EtcdServer) -> AsyncIterator[EtcdClient]:
    made = EtcdClient(EtcdOptions(lasting_etcd.url), b"probe")
    yield made
    made.close()
    await asyncio.sleep(0)


async def test_what_is_written_can_be_read(client: EtcdClient):
    await client.txn([], [messages.put(b"client/\xff\0", b"\0value")])
    reply = await client.range(b"client/\xff\0")
    assert [(each.key, each.value, each.lease) for each in reply.kvs] == [(b"client/\xff\0", b"\0value", 0)]
    assert reply.kvs[0].mod_revision == reply.header.revision
    assert (await client.range(b"client/nothing")).kvs == ()


async def test_conditions(client: EtcdClient):
    lease = await client.grant(60)
    key = b"client/condition"
    write = [messages.put(key, b"1", lease)]
    assert not (await client.txn([messages.has_lease(key, lease)], write)).succeeded
    assert (await client.txn([messages.is_absent(key)], write)).succeeded
    assert not (await client.txn([messages.is_absent(key)], write)).succeeded
    assert (await client.txn([messages.has_lease(key, lease)], write)).succeeded
    assert await client.keys_of(lease) == {key}
    assert await client.keep_alive(lease)
    await client.revoke(lease)
    assert not await client.keep_alive(lease)
    assert await client.keys_of(lease) == set()
    assert (await client.range(key)).kvs == ()


async def test_refusals_leave_the_connection_usable(client: EtcdClient):
    """Their bodies are chunked and end in trailers."""
    for _ in range(3):
        with pytest.raises(EtcdRefused) as caught:
            await client.txn([], [messages.put(b"client/x", b"", 12345)])
        assert caught.value.lease_is_gone
        with pytest.raises(EtcdRefused) as caught:
            await client.range(b"client/x", revision=2**40)
        assert caught.value.code == OUT_OF_RANGE  # a revision of the future
        assert not caught.value.compacted
    assert client.reachable


async def test_large_replies_and_events(client: EtcdClient):
    """12 MB, in a listing and in a watch that catches up."""
    start = (await client.range(b"x")).header.revision + 1
    value = random.Random(0).randbytes(MIB)
    for number in range(12):
        key = b"large/%02d" % number
        await client.txn([messages.is_absent(key)], [messages.put(key, value)])  # once, also if it is sent again
    listed = await client.range(b"large/", messages.past(b"large/"))
    assert [each.value for each in listed.kvs] == [value] * 12
    watch = await client.watch(b"large/", messages.past(b"large/"), start)
    found: list[bytes] = []
    async with asyncio.timeout(PATIENCE_S):
        while len(found) < 12:
            found += [each.kv.key for each in (await watch.read()).events]
    assert found == [b"large/%02d" % number for number in range(12)]
    watch.close()
    watch.close()


async def test_calls_at_once_share_few_connections(lasting_etcd: EtcdServer):
    async with FaultProxy(f"tcp://127.0.0.1:{lasting_etcd.port}") as proxy:
        client = EtcdClient(EtcdOptions(proxy.address.replace("tcp", "http")), b"probe")
        await asyncio.gather(*(client.range(b"client/%d" % number) for number in range(100)))
        assert 1 <= proxy.connections <= 8
        client.close()


async def test_a_connection_that_was_closed_meanwhile(lasting_etcd: EtcdServer):
    async with FaultProxy(f"tcp://127.0.0.1:{lasting_etcd.port}") as proxy:
        client = EtcdClient(EtcdOptions(proxy.address.replace("tcp", "http")), b"probe")
        for reset in (True, False, True):
            await client.range(b"x")
            proxy.cut(reset=reset)
        await client.range(b"x")
        client.close()


async def test_it_goes_to_whoever_answers(lasting_etcd: EtcdServer):
    dead = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    client = EtcdClient(EtcdOptions(",".join([*dead, lasting_etcd.url])), b"probe")
    began = time.monotonic()
    await client.range(b"x")
    assert time.monotonic() - began < 2.9  # an endpoint that says nothing would have had 1.5 s
    assert f"at {lasting_etcd.url} of" in repr(client)
    client.close()


async def test_once_tries_each_once():
    dead = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    client = EtcdClient(EtcdOptions(",".join(dead)), b"probe")
    with pytest.raises(EtcdUnreachable) as caught:
        await client.revoke(1)
    assert all(f"{each}: connection refused" in str(caught.value) for each in dead)
    assert "unreachable" in repr(client)


async def test_silence_is_noticed_on_an_open_watch(lasting_etcd: EtcdServer):
    """Nobody closes anything: the connection just carries nothing more."""
    async with FaultProxy(f"tcp://127.0.0.1:{lasting_etcd.port}") as proxy:
        client = EtcdClient(EtcdOptions(proxy.address.replace("tcp", "http")), b"probe")
        over = asyncio.ensure_future(client.watch_over())
        watch = await client.watch(b"x", b"", 0)
        proxy.black_hole()
        with pytest.raises(ConnectionAbortedError):
            await asyncio.wait_for(watch.read(), PATIENCE_S)
        assert "no answer within 1.5 s" in client.troubles()
        watch.close()
        over.cancel()
        await asyncio.wait([over])
        client.close()


async def test_a_server_that_is_not_etcd():
    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(replies.pop(0))
        writer.close()

    page = b"HTTP/1.1 %s\r\nContent-Length: 5\r\n\r\nhello"
    replies = [b"SSH-2.0\r\n\r\n", page % b"200 OK", page % b"502 Bad", b""]
    async with await asyncio.start_server(answers, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        client = EtcdClient(EtcdOptions(f"http://127.0.0.1:{port}"), b"probe")
        for words in ("not HTTP", "malformed", "HTTP status 502", "the server closed the connection"):
            with pytest.raises(EtcdUnreachable, match=words):
                await client.revoke(1)
        client.close()


def test_refusals_of_every_age():
    old = refusal(404, b'{"error":"lease not found","message":"lease not found","code":5}')
    new = refusal(404, b'{"code":5,"message":"lease not found","details":[]}')
    assert (old.code, old.message) == (new.code, new.message) == (5, "lease not found")

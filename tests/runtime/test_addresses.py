"""Where a worker listens, what it publishes, and how a caller on this host or another finds its way."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, patiently, until
from tests.transport.sessions import needs_ipv6
from triton_distributed.config import Config
from triton_distributed.discovery.memory import MemoryDiscovery
from triton_distributed.errors import ConfigError, ConnectionFailed, DiscoveryError
from triton_distributed.names import EndpointName, Instance
from triton_distributed.serving import addresses
from triton_distributed.serving.addresses import begin_to_listen, listen_addresses, own_address, published
from triton_distributed.system.identity import host_name
from triton_distributed.testing import EtcdServer
from triton_distributed.transport.address import Address
from triton_distributed.transport.listener import Listener
from triton_distributed.transport.pool import MOST_ADDRESSES
from triton_distributed.transport.tcp import wildcard

IPV4, IPV6 = socket.AF_INET, socket.AF_INET6
NAME = EndpointName("t", "c", "e")
DEAD = "tcp://127.0.0.1:1"
NAME = EndpointName("t", "c", "e")


async def echo(request: Any) -> Any:
    return request


@pytest.fixture
def plane() -> dict[str, str]:
    """The direct plane alone: the other one's addresses are subjects."""
    return {}


# --- where it listens ------------------------------------------------------------------------------------------------


def test_etcd_has_workers_on_this_host_and_on_others(trd_dir: Path) -> None:
    unix, tcp = listen_addresses(Config(discovery="etcd", directory=trd_dir), NAME, 5, "etcd")
    assert unix == Address("unix", str(trd_dir / "sockets" / f"{5:016x}.sock"))
    assert tcp == Address("tcp", wildcard(), 0)


def test_files_are_for_this_host_alone(trd_dir: Path) -> None:
    (only,) = listen_addresses(Config(directory=trd_dir), NAME, 5, "file")
    assert only.scheme == "unix"


def test_the_setting_wins(trd_dir: Path) -> None:
    listen = f"unix://{trd_dir}/w.sock, tcp://[::1]:7000"
    found = listen_addresses(Config(discovery="etcd", directory=trd_dir, listen=listen), NAME, 5, "etcd")
    assert [*map(str, found)] == [f"unix://{trd_dir}/w.sock", "tcp://[::1]:7000"]


def test_a_folder_that_cannot_be_had_leaves_tcp_and_says_so(trd_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.chmod(trd_dir, 0o777)
    with caplog.at_level(logging.WARNING, "triton_distributed.runtime"):
        (only,) = listen_addresses(Config(discovery="etcd", directory=trd_dir), NAME, 5, "etcd")
    assert only.scheme == "tcp"
    assert "listening on TCP only" in caplog.text
    with pytest.raises(DiscoveryError):
        listen_addresses(Config(directory=trd_dir), NAME, 5, "file")


async def test_all_addresses_or_none(trd_dir: Path) -> None:
    loop = asyncio.get_running_loop()
    listener = Listener(loop, lambda on_lost: None, 10, 10.0, 30.0)  # type: ignore[arg-type, return-value]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"unix://{trd_dir}/w.sock,tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match="cannot listen on tcp://"):
            await begin_to_listen(loop, listener, Config(listen=listen), NAME, 5, "here")
    assert not (trd_dir / "w.sock").exists()


# --- what it publishes -----------------------------------------------------------------------------------------------

UNIX, TCP = Address("unix", "/w.sock"), Address("tcp", "10.0.0.9", 7000)


@pytest.mark.parametrize(
    ("advertise", "listened", "expected"),
    [
        pytest.param("", (TCP, UNIX), ["unix:///w.sock", "tcp://10.0.0.9:7000"], id="Unix first"),
        pytest.param("a.example", (UNIX, TCP), ["unix:///w.sock", "tcp://a.example:7000"], id="a host"),
        pytest.param("tcp://a.example", (TCP,), ["tcp://a.example:7000"], id="a host with its scheme"),
        pytest.param("a.example:1", (TCP,), ["tcp://a.example:1"], id="host and port"),
        pytest.param("10.1.1.1, tcp://b:2,", (TCP,), ["tcp://10.1.1.1:7000", "tcp://b:2"], id="several"),
        pytest.param("fd00::5", (TCP,), ["tcp://[fd00::5]:7000"], id="IPv6"),
        pytest.param("[fd00::5]", (TCP,), ["tcp://[fd00::5]:7000"], id="IPv6 in brackets"),
        pytest.param("tcp://[fd00::5]:9", (TCP,), ["tcp://[fd00::5]:9"], id="IPv6 with a port"),
        pytest.param("a:1,a:1", (TCP,), ["tcp://a:1"], id="twice"),
        pytest.param("a:1", (UNIX,), ["unix:///w.sock", "tcp://a:1"], id="in front of a Unix socket"),
        pytest.param("unix:///seen/w.sock", (UNIX, TCP), ["unix:///seen/w.sock", "tcp://10.0.0.9:7000"], id="path"),
        pytest.param("a:1", (Address("tcp", "::", 7), TCP), ["tcp://a:1"], id="instead of a wildcard"),
    ],
)
async def test_what_is_published(advertise: str, listened: tuple[Address, ...], expected: list[str]) -> None:
    assert [*await published(asyncio.get_running_loop(), Config(advertise=advertise), listened)] == expected


@pytest.mark.parametrize(
    ("advertise", "says"),
    [
        ("0.0.0.0", "cannot be dialled"),
        ("tcp://[::]:7000", "cannot be dialled"),
        ("a:0", "cannot be dialled"),
        ("a:b", "a TCP address is"),
        ("http://a:1", "an address is"),
        (",".join(f"a:{port}" for port in range(1, MOST_ADDRESSES + 2)), f"at most {MOST_ADDRESSES} addresses"),
    ],
)
async def test_what_nobody_can_publish(advertise: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^TRD_ADVERTISE=.*{says}"):
        await published(asyncio.get_running_loop(), Config(advertise=advertise), [TCP])


async def test_a_host_alone_needs_a_port_that_is_listened_on() -> None:
    with pytest.raises(ConfigError, match="name a port too: the worker listens on no TCP address"):
        await published(asyncio.get_running_loop(), Config(advertise="a.example"), [UNIX])


@pytest.mark.any_loop
@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
@pytest.mark.parametrize("etcd", ["http://127.0.0.1:2379", "http://localhost", "http://no-such-host.invalid:1", "?"])
async def test_a_wildcard_is_never_published(host: str, etcd: str) -> None:
    config = Config(discovery="etcd", etcd_endpoints=etcd, connect_timeout_s=0.5)
    (text,) = await published(asyncio.get_running_loop(), config, [Address("tcp", host, 7000)])
    address = Address.parse(text)
    found = ipaddress.ip_address(address.host)
    assert not found.is_unspecified
    assert host == "::" or found.version == 4
    assert address.port == 7000


async def test_the_address_towards_etcd_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def source(family: int, target: Any) -> str:
        asked.append(target[0])
        return {"10.7.0.1": "10.7.0.2", "192.0.2.1": "172.16.0.2", "fd00::1": "fd00::2"}.get(target[0], "")

    monkeypatch.setattr(addresses, "_source", source)
    loop = asyncio.get_running_loop()

    async def own(etcd: str, *families: socket.AddressFamily, discovery: str = "etcd") -> str:
        return await own_address(loop, Config(discovery=discovery, etcd_endpoints=etcd), families)

    assert await own("https://10.7.0.1:2379,http://10.8.0.1:2379", IPV4, IPV6) == "10.7.0.2"
    assert asked == ["10.7.0.1"]
    assert await own("http://127.0.0.1:2379", IPV4, IPV6) == "172.16.0.2"
    assert await own("http://[fd00::1]:2379", IPV4, IPV6) == "fd00::2"
    assert await own("http://[fd00::1]:2379", IPV4) == "172.16.0.2"
    assert await own("http://10.7.0.1:2379", IPV4, discovery="file") == "172.16.0.2"


@pytest.mark.parametrize("answer", ["", "127.0.0.1", "0.0.0.0", "::", "::1", "fe80::1%eth0", "fe80::1"])
async def test_a_host_with_nothing_but_loopback(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_source", lambda family, target: answer)
    loop = asyncio.get_running_loop()
    assert await own_address(loop, Config(), (IPV4, IPV6)) == "127.0.0.1"
    assert await own_address(loop, Config(), (IPV6,)) == "::1"


# --- how a caller finds its way --------------------------------------------------------------------------------------


@pytest.mark.any_loop
async def test_a_worker_on_every_interface_is_called_from_here_by_its_unix_socket(trd_dir: Path) -> None:
    cluster = Cluster(discovery="file", directory=trd_dir, listen=f"tcp://[::]:0, unix://{trd_dir}/w.sock")
    needs_ipv6()
    try:
        await cluster.worker(echo)
        client = await cluster.client()
        (instance,) = client.candidates.table.instances
        unix, tcp = instance.addresses
        assert unix == f"unix://{trd_dir}/w.sock"
        assert tcp.startswith("tcp://")
        assert await patiently(client.call(1)) == 1
        session = cluster.caller.pool.get(instance.addresses)
        assert session is not None
        assert session.address == unix
    finally:
        await cluster.close()


async def registered(instance_id: int, where: tuple[str, ...], host: str = "") -> MemoryDiscovery:
    """What another process would publish."""
    discovery = MemoryDiscovery()
    await discovery.register(Instance(NAME, instance_id, where, host))
    return discovery


@pytest.mark.any_loop
async def test_a_container_on_this_kernel_falls_through_to_tcp(trd_dir: Path, cluster: Cluster) -> None:
    """It shares the boot id, but not the file system: its socket is not there."""
    worker = cluster.runtime(request_plane="direct", listen="tcp://127.0.0.1:0", discovery="file", directory=trd_dir)
    worker.endpoint("t.c.e").serve_endpoint(echo)
    await until(lambda: worker.statistics().endpoints)
    (served,) = worker.statistics().endpoints
    where = (f"unix://{trd_dir}/of-another-file-system.sock", *served.addresses)
    discovery = await registered(worker.instance_id, where, host_name())
    client = await cluster.client()
    assert await patiently(client.call(1)) == 1
    session = cluster.caller.pool.get(where)
    assert session is not None
    assert session.address == where[1]
    await discovery.close()


async def test_a_socket_that_is_another_workers_by_now_is_refused(trd_dir: Path, cluster: Cluster) -> None:
    worker = cluster.runtime(
        request_plane="direct", listen=f"unix://{trd_dir}/w.sock", discovery="file", directory=trd_dir
    )
    worker.endpoint("t.c.e").serve_endpoint(echo)
    await until(lambda: worker.statistics().endpoints)
    discovery = await registered(worker.instance_id ^ 1, (f"unix://{trd_dir}/w.sock", DEAD), host_name())
    client = await cluster.client()
    with pytest.raises(ConnectionFailed, match="this worker is instance"):
        await patiently(client.call(1))
    await discovery.close()


@pytest.mark.any_loop
async def test_an_address_that_nobody_reaches_is_said_to_be_the_workers_word(cluster: Cluster) -> None:
    discovery = await registered(5, (DEAD, "tcp://127.0.0.1:2"))
    client = await cluster.client()
    with pytest.raises(ConnectionFailed) as caught:
        await patiently(client.call(1))
    text = str(caught.value)
    assert "tcp://127.0.0.1:1: " in text
    assert "tcp://127.0.0.1:2: " in text
    assert "the worker advertises that address, see TRD_ADVERTISE and TRD_LISTEN there" in text
    await discovery.close()


async def test_a_worker_of_another_host_with_a_unix_socket_alone(cluster: Cluster) -> None:
    discovery = await registered(5, ("unix:///w.sock",), "another host")
    client = await cluster.client()
    with pytest.raises(ConnectionFailed, match="Unix sockets of another host only, set TRD_LISTEN there"):
        await patiently(client.call(1))
    await discovery.close()


@pytest.mark.any_loop
async def test_with_etcd_one_host_meets_on_its_socket_and_two_on_tcp(
    etcd: EtcdServer, trd_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(discovery="etcd", etcd_endpoints=etcd.url, directory=trd_dir)
    try:
        await cluster.worker(echo)
        here = await cluster.client()
        assert await patiently(here.call(1)) == 1
        (instance,) = here.candidates.table.instances
        unix, tcp = instance.addresses
        assert unix.startswith("unix://")
        assert not ipaddress.ip_address(Address.parse(tcp).host).is_unspecified
        monkeypatch.setattr("triton_distributed.runtime.distributed.host_name", lambda: "another host")
        elsewhere = await cluster.runtime().endpoint("t.c.e").client()
        await patiently(elsewhere.wait_for_instances())
        assert [each.addresses for each in elsewhere.candidates.table.instances] == [(tcp,)]
        assert await patiently(elsewhere.call(2)) == 2
    finally:
        await cluster.close()


async def test_both_endpoints_of_a_worker_have_one_session(trd_dir: Path) -> None:
    cluster = Cluster(discovery="file", directory=trd_dir, listen="tcp://0.0.0.0:0,tcp://127.0.0.1:0")
    try:
        worker = await cluster.worker(echo)
        await cluster.serve(worker, echo, "t.c.f")
        one, other = await cluster.client(), await cluster.client("t.c.f")
        assert await patiently(one.call(1)) == await patiently(other.call(1)) == 1
        (of_one,), (of_other,) = one.candidates.table.instances, other.candidates.table.instances
        assert replace(of_one, endpoint=of_other.endpoint) == of_other
        assert len(of_one.addresses) == 2
        assert "0.0.0.0" not in str(of_one.addresses)
        assert cluster.caller.pool.get(of_one.addresses) is cluster.caller.pool.get(of_other.addresses)
    finally:
        await cluster.close()

"""TCP between hosts."""

from __future__ import annotations

import errno
import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tests.transport.sessions import calling, needs_ipv6, numbers, serving
from triton_distributed.transport import host_loss, tcp
from triton_distributed.transport.address import Address
from triton_distributed.transport.tcp import NOT_SENT_LOW_WATER, dual_stack, patience, wildcard

pytestmark = pytest.mark.any_loop


async def test_any_free_port_and_its_text():
    async with serving("tcp://127.0.0.1:0") as service, calling() as caller:
        assert service.address.startswith("tcp://127.0.0.1:")
        assert not service.address.endswith(":0")
        assert await numbers(await caller.call(service.address, b"count 3")) == [0, 1, 2]


async def test_both_ends_are_tuned():
    async with serving() as service, calling() as caller:
        await caller.pool.connect((service.address,))
        for each in (caller.made[0], service.accepted[0]):
            sock = each.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == NOT_SENT_LOW_WATER
            if host_loss.KEPT:  # it would end a connection to a stopped process
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
            if hasattr(socket, "TCP_KEEPIDLE"):
                names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
                times = dict(name[1:] for name in patience(30.0))
                found = [sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names]
                assert found == [times[name] for name in names]


@pytest.mark.parametrize("host_timeout_s", [3.0, 6.0, 10.0, 29.5, 30.0, 36.0, 90.0, 600.0])
async def test_an_idle_host_is_asked_for_so_long_that_a_cut_of_two_thirds_costs_nothing(host_timeout_s):
    times = dict(name[1:] for name in patience(host_timeout_s))
    idle, every, count = (times[f"TCP_KEEP{name}"] for name in ("IDLE", "INTVL", "CNT"))
    assert every * (count - 1) >= host_timeout_s * 2 / 3 - 1  # whole seconds
    assert host_timeout_s <= idle + every * count < host_timeout_s + every + 1


@pytest.mark.parametrize("host_timeout_s", [1.0, 10.0, 30.0, 90.0, 600.0])
async def test_linux_waits_longer_than_the_setting_before_it_gives_up_by_itself(monkeypatch, host_timeout_s):
    monkeypatch.setattr(host_loss, "KEPT", True)
    cap_s = dict(name[1:] for name in patience(host_timeout_s))["TCP_RTO_MAX_MS"] / 1000
    waits, wait = [], 0.2  # TCP_RTO_MIN of Linux, doubled 15 times (net.ipv4.tcp_retries2)
    for _ in range(15):
        waits.append(min(wait, cap_s))
        wait *= 2
    assert sum(waits) > host_timeout_s


async def test_other_systems_give_up_by_themselves(monkeypatch):
    """What is asked of them, for there are none here: macOS knows one of the two, others know the other."""
    monkeypatch.setattr(host_loss, "KEPT", False)
    monkeypatch.setattr(sys, "platform", "darwin")
    asked: dict[tuple[int, int], object] = {}
    sock = SimpleNamespace(
        family=socket.AF_INET, setsockopt=lambda level, number, value: asked.__setitem__((level, number), value)
    )
    transport: Any = SimpleNamespace(get_extra_info=lambda name: sock)
    tcp.tune(transport, 30.0)
    assert asked[socket.IPPROTO_TCP, 0x80] == 30  # TCP_RXT_CONNDROPTIME, seconds
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        assert asked[socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT] == 30_000
    assert host_loss.host_gone(sock, 30.0) is False


async def test_an_option_that_the_kernel_lacks_leaves_the_others(monkeypatch):
    monkeypatch.setattr(tcp, "OPTIONS", ((9999, "TCP_NODELAY", 1), (0, "NONE_OF_PYTHONS", 1), *tcp.OPTIONS[1:]))
    async with serving() as service, calling() as caller:
        await caller.pool.connect((service.address,))
        sock = caller.made[0].transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_ipv6():
    needs_ipv6()
    async with serving("tcp://[::1]:0") as service, calling() as caller:
        assert service.address.startswith("tcp://[::1]:")
        assert await numbers(await caller.call(service.address, b"count 3")) == [0, 1, 2]


async def test_all_interfaces_take_both_families():
    host = wildcard()
    async with serving(str(Address("tcp", host, 0))) as service, calling() as caller:
        port = Address.parse(service.address).port
        assert await numbers(await caller.call(f"tcp://127.0.0.1:{port}", b"count 3")) == [0, 1, 2]
        if host == "::":
            assert await numbers(await caller.call(f"tcp://[::1]:{port}", b"count 3")) == [0, 1, 2]
            with pytest.raises(OSError, match="cannot listen on") as caught:
                async with serving(f"tcp://[::]:{port}"):
                    pass
            assert caught.value.errno == errno.EADDRINUSE


async def test_without_dual_stack_all_interfaces_are_those_of_ipv4(monkeypatch):
    dual_stack.cache_clear()
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    try:
        assert wildcard() == "0.0.0.0"
    finally:
        dual_stack.cache_clear()


async def test_a_port_that_is_taken():
    async with serving() as service:
        with pytest.raises(OSError, match=f"cannot listen on {service.address}") as caught:
            async with serving(service.address):
                pass
        assert caught.value.errno == errno.EADDRINUSE

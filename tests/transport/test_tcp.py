"""TCP between hosts."""

from __future__ import annotations

import errno
import socket

import pytest

from tests.transport.sessions import calling, needs_ipv6, numbers, serving
from triton_distributed.transport import tcp
from triton_distributed.transport.address import Address
from triton_distributed.transport.tcp import NOT_SENT_LOW_WATER, SILENCE_S, dual_stack, wildcard

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
            sock = each._transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == NOT_SENT_LOW_WATER
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == SILENCE_S * 1000


async def test_an_option_that_the_kernel_lacks_leaves_the_others(monkeypatch):
    monkeypatch.setattr(tcp, "OPTIONS", ((9999, "TCP_NODELAY", 1), (0, "NONE_OF_PYTHONS", 1), *tcp.OPTIONS[1:]))
    async with serving() as service, calling() as caller:
        await caller.pool.connect((service.address,))
        sock = caller.made[0]._transport.get_extra_info("socket")
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

"""TCP between hosts."""

from __future__ import annotations

import errno
import socket

import pytest

from tests.transport.sessions import calling, numbers, serving
from triton_distributed.transport.tcp import NOT_SENT_LOW_WATER

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


async def test_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no ::1")
    async with serving("tcp://[::1]:0") as service, calling() as caller:
        assert service.address.startswith("tcp://[::1]:")
        assert await numbers(await caller.call(service.address, b"count 3")) == [0, 1, 2]


async def test_a_port_that_is_taken():
    async with serving() as service:
        with pytest.raises(OSError, match=f"cannot listen on {service.address}") as caught:
            async with serving(service.address):
                pass
        assert caught.value.errno == errno.EADDRINUSE

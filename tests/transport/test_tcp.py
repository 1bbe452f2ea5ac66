"""TCP between hosts."""

from __future__ import annotations

import errno
import socket

import pytest

from tests.transport.sessions import calling, numbers, serving
from triton_distributed.transport import tcp
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
            if hasattr(socket, "TCP_KEEPIDLE"):
                names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                idle, interval, probes = (sock.getsockopt(socket.IPPROTO_TCP, name) for name in names)
                assert idle + interval * probes == 10  # TRD_HEALTH_TIMEOUT_S


@pytest.mark.parametrize(
    ("state", "gone"),
    [
        # retransmits, probes, unacked, ms since: data were sent, data came, an acknowledgement came
        pytest.param((0, 0, 0, 50_000, 50_000, 4_000), False, id="idle, kept alive"),
        pytest.param((0, 0, 1, 0, 50_000, 50_000), False, id="sent this moment after a long silence"),
        pytest.param((1, 0, 1, 100, 50_000, 50_000), False, id="sent again a moment ago"),
        pytest.param((3, 0, 2, 2_600, 9_000, 9_000), False, id="not for long enough"),
        pytest.param((5, 0, 2, 3_900, 10_300, 10_200), True, id="sent again and again"),
        pytest.param((5, 0, 2, 3_900, 50, 10_200), False, id="what comes is heard, what is sent is not acknowledged"),
        pytest.param((0, 1, 0, 40_000, 40_000, 25_000), False, id="full window, asked rarely and answered"),
        pytest.param((0, 2, 0, 1_000, 1_000, 900), False, id="full window, the first quick probes"),
        pytest.param((7, 0, 9, 20_000, 60_000, 20_000), False, id="full window, asked by data and answered at once"),
        pytest.param((0, 6, 0, 40_000, 40_000, 25_000), True, id="full window, and nobody answers"),
    ],
)
async def test_which_hosts_are_gone(state, gone):
    assert tcp.gone(*state, timeout_ms=10_000) is gone


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

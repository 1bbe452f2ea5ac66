"""Detects that the host at the other end of a TCP connection is unreachable, from Linux's statistics of it.

TCP_USER_TIMEOUT would end such a connection on its own. But it would also end a connection to a stopped process whose
window is full, although the host of that process answers every probe (measured with Linux 6.18). The kernel's
statistics distinguish the two, at the cost of one system call on a connection that has been silent for long.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import Any, NamedTuple

KEPT = sys.platform == "linux" and hasattr(socket, "TCP_INFO")  # other systems have other layouts of TCP_INFO
# After this many unanswered probes of a full window a host counts as gone. A live host skips at most two, of the first
# quick ones: it answers twice a second (net.ipv4.tcp_invalid_ratelimit).
MOST_PROBES = 4
# A network that returns within two thirds of the timeout must not cost a connection, and TCP retransmits ever more
# rarely. So a host counts as gone only if the last retransmission was in the last third (1 / `LATE`) of the timeout,
# yet at least 1 / `ANSWER` of the timeout ago, which leaves time for an answer.
LATE, ANSWER = 3, 24
# tcpi_retransmits, tcpi_probes; tcpi_unacked; tcpi_last_data_sent; tcpi_last_data_recv, tcpi_last_ack_recv.
_INFO = struct.Struct("=2xBB20xI16xI4xII")


class Account(NamedTuple):
    """The kernel's statistics of a connection.

    Attributes:
        retransmits: how often the oldest unacknowledged segment was sent again.
        probes: number of unanswered probes of a full window.
        unacked: number of segments under way.
        sent_ms: milliseconds since data was sent or sent again.
        received_ms: milliseconds since data arrived.
        acknowledged_ms: milliseconds since an acknowledgement arrived.
    """

    retransmits: int
    probes: int
    unacked: int
    sent_ms: int
    received_ms: int
    acknowledged_ms: int


def host_gone(sock: Any, timeout_s: float) -> bool:
    """Return whether the host at the other end has answered nothing for `timeout_s` seconds, although it had to.

    Args:
        sock: a connected TCP socket.

    Returns:
        True if it has; False also if the kernel does not provide these statistics.
    """
    if not KEPT:
        return False
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
    except OSError:
        return False
    return len(info) == _INFO.size and gone(Account(*_INFO.unpack(info)), timeout_s)


def gone(known: Account, timeout_s: float) -> bool:
    """Judge for `host_gone` by the kernel's statistics."""
    timeout_ms = timeout_s * 1000
    if min(known.received_ms, known.acknowledged_ms) < timeout_ms:
        return False
    asked = known.unacked > 0 and known.retransmits > 0
    return (asked and timeout_ms / ANSWER <= known.sent_ms <= timeout_ms / LATE) or known.probes >= MOST_PROBES

"""Whether the host at the other end of a TCP connection is gone, by what Linux says of the connection.

TCP_USER_TIMEOUT would end such a connection without being asked, but it also ends one to a process that is stopped and
whose window is full, although its host answers every probe (measured with Linux 6.18). The kernel's own account tells
the two apart, and costs one system call on a connection that has been silent for long.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import Any, NamedTuple

KEPT = sys.platform == "linux" and hasattr(socket, "TCP_INFO")  # other systems keep accounts of other shapes
# A host is gone that has left this many probes into a full window unanswered. One that is there leaves out two at most,
# of the first quick ones: it answers twice a second (net.ipv4.tcp_invalid_ratelimit).
MOST_PROBES = 4
# A network that comes back within two thirds of the timeout must not cost a connection, and TCP asks ever more rarely:
# so the last question must be of the last third, and have had its time to be answered.
LATE, ANSWER = 3, 24
# tcpi_retransmits, tcpi_probes; tcpi_unacked; tcpi_last_data_sent; tcpi_last_data_recv, tcpi_last_ack_recv.
_INFO = struct.Struct("=2xBB20xI16xI4xII")


class Account(NamedTuple):
    """What the kernel knows of a connection.

    Attributes:
        retransmits: how often the first of what is under way was sent again.
        probes: into a full window, since one was answered.
        unacked: segments under way.
        sent_ms: milliseconds since data were sent, for the first time or again.
        received_ms: milliseconds since data came.
        acknowledged_ms: milliseconds since an acknowledgement came.
    """

    retransmits: int
    probes: int
    unacked: int
    sent_ms: int
    received_ms: int
    acknowledged_ms: int


def host_gone(sock: Any, timeout_s: float) -> bool:
    """Whether the host at the other end has answered nothing for `timeout_s` seconds, although it had to.

    Args:
        sock: a connected TCP socket.

    Returns:
        False also where the kernel keeps no account of this shape.
    """
    if not KEPT:
        return False
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
    except OSError:
        return False
    return len(info) == _INFO.size and gone(Account(*_INFO.unpack(info)), timeout_s)


def gone(known: Account, timeout_s: float) -> bool:
    """The judgement of `host_gone` on what the kernel knows."""
    timeout_ms = timeout_s * 1000
    if min(known.received_ms, known.acknowledged_ms) < timeout_ms:
        return False
    asked = known.unacked > 0 and known.retransmits > 0
    return (asked and timeout_ms / ANSWER <= known.sent_ms <= timeout_ms / LATE) or known.probes >= MOST_PROBES

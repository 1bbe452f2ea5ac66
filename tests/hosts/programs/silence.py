"""How long a silent network is waited for, shortened by HOSTS_SILENCE_S: what takes 90 s takes 2 in a test."""

import os
import socket

from triton_distributed.transport import tcp

SCALED = {
    "TCP_KEEPIDLE": lambda seconds: 1,
    "TCP_KEEPINTVL": lambda seconds: 1,
    "TCP_KEEPCNT": lambda seconds: max(1, seconds - 1),
    "TCP_USER_TIMEOUT": lambda seconds: seconds * 1000,
}


def scale_silence():
    """Replace the four times among `tcp.OPTIONS` by shorter ones of the same kind."""
    if seconds := int(os.environ.get("HOSTS_SILENCE_S", "0")):
        assert all(hasattr(socket, name) for name in SCALED)
        names = [name for _, name, _ in tcp.OPTIONS]
        assert set(SCALED) <= set(names), f"transport/tcp.py sets {names}"
        tcp.OPTIONS = tuple(
            (level, name, SCALED[name](seconds) if name in SCALED else value) for level, name, value in tcp.OPTIONS
        )

"""The name of this host. Unix sockets are tried only between processes of one host."""

from __future__ import annotations

import contextlib
import functools
import socket
from pathlib import Path


@functools.cache
def host_name() -> str:
    """Return a name that is unique to this machine and boot."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()

"""Which host this is: Unix sockets are only tried between processes of one."""

from __future__ import annotations

import contextlib
import functools
import socket
from pathlib import Path


@functools.cache
def host_name() -> str:
    """A name of this machine and boot: two machines never share it, two boots of one do not either."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()

"""Unix sockets between processes of one host. The mode of their folder keeps them private to the user."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from triton_distributed.system.fork import own
from triton_distributed.system.protocol import StreamProtocol

# `sun_path` holds 108 bytes on Linux and 104 on macOS, including one zero; see unix(7).
LONGEST_PATH = 107 if sys.platform == "linux" else 103
LONGEST_NAME = LONGEST_PATH - len("/proc/self/fd/1234567890/")
SUPPORTED = hasattr(socket, "AF_UNIX")

BACKLOG = 4096
"""Connections that may wait to be accepted. The kernel caps it at net.core.somaxconn."""

FRESH_S = 60.0
"""Seconds in which a new socket begins to listen. It takes microseconds; after this time the worker is dead."""

SWEEP = 256
"""The largest number of sockets that a process checks when it begins to listen, in order to remove dead ones."""

SOCKET_BUFFER = 512 * 1024
"""Bytes of the send buffer. The kernel may cap them, and Linux doubles them. A large one means fewer wake-ups."""

SHORT_BUFFER = 32 * 1024
"""Bytes of the send buffer while small messages come between arrays: they wait for all that the buffer holds."""

# The default names of sockets: the worker's id; before the worker listens, its process id and a number.
_OURS = r"[0-9a-f]{16}\.sock|\.\d+-\d+\.sock"
_numbers = itertools.count()
# The errors of file systems without hard links.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@contextlib.contextmanager
def reachable(path: Path) -> Iterator[str]:
    """Yield a name for `path` that is short enough for a socket address.

    On Linux, a long path is reached through an open descriptor of its folder. On other systems it is an error.

    Raises:
        OSError: the path is too long, and it cannot be reached in another way.
    """
    if len(os.fsencode(path)) <= LONGEST_PATH:
        yield str(path)
        return
    if sys.platform != "linux":
        raise OSError(
            errno.ENAMETOOLONG, f"a Unix socket's path has at most {LONGEST_PATH} bytes: shorten TRD_DIR", str(path)
        )
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise OSError(
            errno.ENAMETOOLONG, f"the name of a Unix socket is too long: at most {LONGEST_NAME} bytes", str(path)
        )
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    own(sock)
    sock.setblocking(False)
    return sock


def set_buffer(transport: asyncio.BaseTransport, short: bool) -> None:
    """Set the size of a Unix socket's send buffer; other transports are left alone."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SHORT_BUFFER if short else SOCKET_BUFFER)


async def connect(loop: asyncio.AbstractEventLoop, path: str, protocol: StreamProtocol) -> None:
    """Join `protocol` to the worker that listens on `path`.

    Raises:
        OSError: the worker cannot be reached.
    """
    sock = _socket()
    try:
        with reachable(Path(path)) as name:
            await loop.sock_connect(sock, name)
        transport, _ = await loop.create_unix_connection(lambda: cast(asyncio.Protocol, protocol), sock=sock)
    except BaseException as error:
        sock.close()
        if isinstance(error, ConnectionRefusedError) and re.fullmatch(_OURS, Path(path).name):
            _remove(Path(path))  # The worker is dead, see `listen`.
        raise
    if transport.is_closing() and not isinstance(loop, asyncio.BaseEventLoop):
        # uvloop has closed the descriptor, but it has not taken over the socket object. The object would close the same
        # number again, which another connection may have by then.
        sock.detach()


async def listen(
    loop: asyncio.AbstractEventLoop, path: Path, factory: Callable[[], asyncio.Protocol]
) -> tuple[asyncio.AbstractServer, int]:
    """Listen on `path`, whose folder exists and is private.

    The socket is bound under another name and gets its final name when it listens. A socket that refuses connections
    counts as dead, and any process may remove it.

    Returns:
        the server and the inode of its socket. Another listener may have the path later.

    Raises:
        OSError: the path cannot be bound, or a living worker listens there.
    """
    sock, inode = claim(path)
    try:
        return await loop.create_unix_server(factory, sock=sock, backlog=BACKLOG), inode
    except BaseException:
        sock.close()
        remove(path, inode)
        raise


def stop_listening(loop: asyncio.AbstractEventLoop, server: asyncio.AbstractServer) -> None:
    """Close a server in a later turn of the loop.

    asyncio accepts a connection in one turn and gives it to its protocol in the next one. If the server closed between
    them, the connection would be neither served nor closed, and its client would wait for ever.
    """
    for sock in getattr(server, "sockets", ()):
        with contextlib.suppress(NotImplementedError):  # The loop does not accept by readers.
            loop.remove_reader(sock.fileno())
    loop.call_soon(server.close)


def claim(path: Path, *, clean: bool = True) -> tuple[socket.socket, int]:
    """Return a socket that listens on `path`, and its inode, as `listen` does.

    Args:
        clean: also connect to each socket in the folder and remove the dead ones.

    Raises:
        OSError: the path cannot be bound, or a living worker listens there.
    """
    if clean:
        sweep(path.parent)
    if path.exists() and not _remove_if_dead(path) and path.exists():
        raise OSError(errno.EADDRINUSE, _why_taken(path), str(path))
    with reachable(path):
        pass  # Clients could not reach a name that is too long.
    sock = _socket()
    temporary = _temporary(path)
    try:
        with reachable(temporary) as name:
            sock.bind(name)
        os.chmod(temporary, 0o600)
        sock.listen(BACKLOG)
        inode = temporary.stat().st_ino
        _link(temporary, path)
        return sock, inode
    except BaseException:
        sock.close()
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _link(temporary: Path, path: Path) -> None:
    """Give a socket its name unless the name is taken by now. A rename would replace the socket of a living worker."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise OSError(errno.EADDRINUSE, _why_taken(path), str(path)) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.rename(temporary, path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}-{next(_numbers)}.sock")


def in_place(path: Path, inode: int) -> bool:
    """Whether clients that dial `path` reach the listener with this inode.

    The inode is not given to another file while the socket is open. If the file's mode does not let its owner connect,
    the mode is changed.
    """
    try:
        found = path.lstat()
        if found.st_ino != inode or not stat.S_ISSOCK(found.st_mode):
            return False
        if found.st_mode & 0o600 != 0o600:
            path.chmod(stat.S_IMODE(found.st_mode) | 0o600)
    except OSError:
        return False
    return True


def remove(path: Path, inode: int) -> None:
    """Remove the socket of a closed listener, unless the path belongs to another listener by now."""
    with contextlib.suppress(OSError):
        if path.stat().st_ino == inode:
            path.unlink()


def sweep(folder: Path) -> None:
    """Remove the sockets of workers that were killed, and no other files."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for _, entry in zip(range(SWEEP), entries, strict=False):
            if not re.fullmatch(_OURS, entry.name):
                continue
            if entry.name.startswith(".") and time.time() - entry.stat(follow_symlinks=False).st_mtime < FRESH_S:
                continue  # The socket was bound a moment ago and will listen soon.
            _remove_if_dead(Path(entry.path))


def _why_taken(path: Path) -> str:
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return "there is a file that is not a socket"
    return "another worker listens there"


def _remove_if_dead(path: Path) -> bool:
    if not _is_dead(path):
        return False
    # Two processes may find a socket dead. The slower one would remove the other one's new socket. So the socket is
    # moved to a name that no other process uses, and checked again.
    aside = _temporary(path)
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return False
        os.rename(path, aside)
    except OSError:
        return False
    if _is_dead(aside):
        return _remove(aside)
    with contextlib.suppress(OSError):
        _link(aside, path)
        aside.unlink()
    return False


def _is_dead(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            with reachable(path) as name:
                probe.connect(name)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False  # The listener is alive but busy, or its state is unknown.
    return False


def _remove(path: Path) -> bool:
    """Remove a socket that refuses connections. A plain file refuses them, too, but stays."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return False
        path.unlink()
    except OSError:
        return False
    return True

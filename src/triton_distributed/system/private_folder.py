"""The folder of file discovery. It is made and checked so that only its user can put anything into it."""

from __future__ import annotations

import errno
import os
import stat

from triton_distributed.errors import DiscoveryError

BACKEND = "file"

_NOBODY = 65534
"""Linux's default of kernel.overflowuid: the uid shown for owners without a number in this user namespace."""

_HELP = {
    errno.EMFILE: "raise this process's limit of open files: ulimit -n",
    errno.ENFILE: "the system has no open file left: raise fs.file-max",
    errno.ENOSPC: "free space on that file system, or set TRD_DIR to a folder on another",
    errno.EDQUOT: "free space in your quota, or set TRD_DIR to a folder on another file system",
    errno.EACCES: "set TRD_DIR to a folder that you own",
    errno.EPERM: "set TRD_DIR to a folder that you own",
    errno.EROFS: "set TRD_DIR to a folder that can be written to",
    errno.ENOTDIR: "set TRD_DIR to a folder",
    errno.ENAMETOOLONG: "set TRD_DIR to a shorter path",
    errno.ENOLCK: "the file system has no locks; set TRD_DIR to a folder on a local one",
}


def discovery_error(where: str, action: str, error: OSError) -> DiscoveryError:
    """Return a DiscoveryError for an operating system's error: the action, the error and a remedy. The caller chains
    it."""
    place = f" {error.filename}" if error.filename else ""
    help_text = f"; {_HELP[error.errno]}" if error.errno in _HELP else ""
    return DiscoveryError(BACKEND, where, f"cannot {action}{place}: {error.strerror or error}{help_text}")


def private_folder(path: str, where: str) -> tuple[int, int]:
    """Make the folder, or check that an existing one belongs to this user alone and is not another user's link.

    Another user that can write into the folder can redirect our calls. So any doubt is an error, and nothing is
    repaired silently.

    Args:
        path: the folder. A missing parent is made private, too; missing folders above the parent follow the umask.
        where: the place of discovery, for the error's text.

    Returns:
        Device and inode, which distinguish the folder from another one made later under the same path.

    Raises:
        DiscoveryError: another user owns the folder, may use it or may replace it, or it cannot be made. The text names
            the problem and the fix.
    """
    user = os.geteuid()
    try:
        parent = os.path.dirname(path)
        os.makedirs(parent, 0o700, exist_ok=True)  # It may be our own folder, removed after its check.
        _check_parent(os.stat(parent), user, path, where)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        link = os.lstat(path)
        _let_ourselves_in(path, user)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise discovery_error(where, "make or open the folder", error) from error
    if stat.S_ISLNK(link.st_mode) and link.st_uid != user:
        raise _refused(path, where, f"is a symbolic link that belongs to uid {link.st_uid}, not to uid {user}")
    if found.st_uid != user:
        raise _refused(path, where, f"belongs to uid {found.st_uid}, not to uid {user}")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise DiscoveryError(
            BACKEND,
            where,
            f"{path} has mode {mode:04o}, so others may enter it: `chmod 700 {path}`, "
            "or set TRD_DIR to a folder that only you can use",
        )
    return found.st_dev, found.st_ino


def _let_ourselves_in(path: str, user: int) -> None:
    """Restore our own rights to a folder that is closed to all other users."""
    found = os.stat(path)
    mode = found.st_mode & 0o777
    if stat.S_ISDIR(found.st_mode) and found.st_uid == user and not mode & 0o077 and mode != 0o700:
        os.chmod(path, 0o700)


def keep_private(path: str) -> None:
    """Close a folder to other users again. Use it only inside a private folder, to which they had no access."""
    try:
        found = os.lstat(path)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and found.st_mode & 0o777 != 0o700:
            os.chmod(path, 0o700)
    except OSError:
        pass  # The folder does not exist, or `private_folder` reports the problem.


def _check_parent(parent: os.stat_result, user: int, path: str, where: str) -> None:
    """Refuse a parent that belongs to another user, or to which others may write: they could replace the folder.

    Root's folders pass: root owns `/tmp`, and a container's volume is often writable for all without a sticky bit. In a
    user namespace, root's `/tmp` seems to belong to uid `_NOBODY`.
    """
    shared = parent.st_mode & 0o022
    if parent.st_uid in (0, user) or not shared or (parent.st_mode & stat.S_ISVTX and parent.st_uid == _NOBODY):
        return
    folder = os.path.dirname(path)
    found = f"is in {folder}, which belongs to uid {parent.st_uid} and which others may write to"
    raise DiscoveryError(BACKEND, where, f"{path} {found}: set TRD_DIR to a folder of your own")


def _refused(path: str, where: str, found: str) -> DiscoveryError:
    return DiscoveryError(BACKEND, where, f"{path} {found}: run as that user, or set TRD_DIR to a folder of your own")

"""API keys: only their hashes are kept, and they are compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

HASH = "sha256:"
"""The beginning of a hash in place of a key: `printf %s KEY | sha256sum` makes the digits after it."""


class Keys:
    """The keys that a request may have. Without any, all requests are allowed.

    Args:
        given: keys, or their hashes as `sha256:` and 64 hexadecimal digits.

    Raises:
        ValueError: a key is empty or has white space, or a hash is malformed.
    """

    def __init__(self, given: Iterable[str] = ()) -> None:
        self._hashes = [_hash(each) for each in given]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def allow(self, authorization: bytes) -> bool:
        """Whether a request may pass.

        Args:
            authorization: the value of its header `Authorization`; empty without one.
        """
        if not self._hashes:
            return True
        scheme, _, key = authorization.strip().partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        found = hashlib.sha256(key.strip()).digest()
        # All are compared, so that the time does not tell which one has matched.
        return sum([hmac.compare_digest(found, each) for each in self._hashes]) > 0


def keys_in(text: str) -> list[str]:
    """The keys or hashes in the text of a key file, one a line. Lines that begin with `#` are comments."""
    lines = (each.strip() for each in text.splitlines())
    return [each for each in lines if each and not each.startswith("#")]


def _hash(given: str) -> bytes:
    if given.startswith(HASH):
        try:
            found = bytes.fromhex(given.removeprefix(HASH))
        except ValueError:
            found = b""
        if len(found) != 32:
            raise ValueError("the hash of an API key is sha256: and 64 hexadecimal digits")
        return found
    if not given or given.split() != [given]:
        raise ValueError("an API key is a text without white space")
    return hashlib.sha256(given.encode()).digest()

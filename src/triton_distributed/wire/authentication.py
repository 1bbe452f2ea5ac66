"""Both ends of a session prove that they know the same token, and never send it.

    dialer                                           acceptor
    HELLO  versions, "token", challenge d  ──▶  ◀──  HELLO  versions, "token", challenge a     both at once
    AUTH   proof as dialer, real hello     ──▶                                                once a has come
                                                ◀──  AUTH   proof as acceptor, real hello      if the proof is valid

A proof is HMAC-SHA256 (RFC 2104) with the token as its key, over a label, the role, d, a, and the hello in the same
frame. The roles differ, so an end does not accept its own proof; the challenges are fresh, so no proof is valid twice.
The dialer goes first, so it learns nothing from a worker before it has given a proof. An observer can test guesses of
the token against a proof offline, so the token must be hard to guess: 32 random characters are enough. The proofs
authenticate the two ends. They do not protect the traffic between them; TLS does.

Until both proofs are verified, every other frame is a protocol error, and the error's text is only `REFUSED`.
"""

from __future__ import annotations

import hashlib
import hmac

from triton_distributed.errors import RemoteProtocolError
from triton_distributed.wire.hello import Hello

FEATURE = "token"
CHALLENGE_BYTES = 32
PROOF_BYTES = hashlib.sha256().digest_size
REFUSED = "refused: the two ends do not share one token, see TRD_TOKEN"

_LABEL = b"triton-distributed session 1\0"
_DIALER, _ACCEPTOR = b"D", b"A"


class Authentication:
    """One end's part in the authentication of one session.

    Args:
        token: the secret that both ends know, at least a byte.
        challenge: `CHALLENGE_BYTES` random bytes, made for this session.
        dialer: True if this end dialled.

    Attributes:
        dialer: as given.
        heard: the peer's challenge has arrived.
    """

    def __init__(self, token: bytes, challenge: bytes, dialer: bool) -> None:
        if not token or len(challenge) != CHALLENGE_BYTES:
            raise ValueError(f"a token has at least a byte, a challenge {CHALLENGE_BYTES}")
        self.dialer = dialer
        self.heard = False
        self._token, self._challenge, self._theirs = token, challenge, b""

    def opening(self, hello: Hello) -> Hello:
        """Return the first hello, with only what the peer needs to go on; `hello` itself follows in AUTH."""
        return Hello(version=hello.version, lowest=hello.lowest, features=[FEATURE], challenge=self._challenge)

    def hear(self, opening: Hello) -> None:
        """Read the peer's first hello.

        Raises:
            RemoteProtocolError: the peer has no token, or sends our own challenge back.
        """
        theirs = opening.challenge
        if FEATURE not in opening.features or len(theirs) != CHALLENGE_BYTES or theirs == self._challenge:
            raise RemoteProtocolError(REFUSED)
        self._theirs, self.heard = theirs, True

    def prove(self, hello: bytes) -> bytes:
        """Return the payload of this end's AUTH, with its real hello."""
        return self._proof(self.dialer, hello) + hello

    def verify(self, payload: bytes) -> bytes:
        """Return the real hello from the peer's AUTH; it is not read before the proof is verified.

        Raises:
            RemoteProtocolError: the proof is wrong.
        """
        proof, hello = payload[:PROOF_BYTES], payload[PROOF_BYTES:]
        if not hmac.compare_digest(proof, self._proof(not self.dialer, hello)):
            raise RemoteProtocolError(REFUSED)
        return hello

    def _proof(self, by_dialer: bool, hello: bytes) -> bytes:
        mine, theirs = self._challenge, self._theirs
        both = mine + theirs if self.dialer else theirs + mine
        role = _DIALER if by_dialer else _ACCEPTOR
        return hmac.digest(self._token, _LABEL + role + both + hello, "sha256")
